"""Stages: which rules hold when, and checking a graph against them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from fxmpq.errors import FxmpqError, LegalityError, closest
from fxmpq.graph.legality.calibrated import CALIBRATED, PLANNED
from fxmpq.graph.legality.canonical import (
    FOLDED,
    KNOWN_NORMS,
    LINEAR,
    LINEAR_EINSUMS,
    NO_NEEDLESS,
    ONE_READER,
    POSITIONAL,
    STACKS,
    STORED_WEIGHTS,
)
from fxmpq.graph.legality.exported import EXPORTED
from fxmpq.graph.legality.prepared import INPUTS, PREPARED
from fxmpq.graph.legality.rule import Rule, Subject
from fxmpq.graph.legality.trainable import TRAINABLE
from fxmpq.graph.passes import CANONICAL_PASSES, Pass
from fxmpq.graph.passes.drop_identities import drop_identities
from fxmpq.graph.passes.fold_batch_norm import fold_batch_norm
from fxmpq.graph.passes.fold_constants import fold_constants
from fxmpq.graph.passes.make_functional import make_functional
from fxmpq.graph.passes.make_linear import make_linear
from fxmpq.graph.passes.make_linear_einsum import make_linear_einsum
from fxmpq.graph.passes.merge_weights import merge_weights
from fxmpq.graph.passes.restore_batch_norm import restore_batch_norm
from fxmpq.graph.passes.store_experts import store_experts
from fxmpq.graph.state import GraphState, state_of

# What holds behind each pass, and from there on.
ESTABLISHED: Mapping[Pass, tuple[Rule, ...]] = {
    make_functional: EXPORTED,
    drop_identities: (NO_NEEDLESS,),
    merge_weights: (ONE_READER,),
    restore_batch_norm: (KNOWN_NORMS,),
    make_linear: (POSITIONAL, LINEAR),
    make_linear_einsum: (LINEAR_EINSUMS,),
    store_experts: (STACKS,),
    fold_constants: (STORED_WEIGHTS,),
    fold_batch_norm: (FOLDED,),
}


def rules_behind(canonical_pass: Pass) -> tuple[Rule, ...]:
    """The rules that hold of a graph once a canonical pass has gone over it.

    Args:
        canonical_pass: One of `CANONICAL_PASSES`.
    """
    passed = CANONICAL_PASSES[: CANONICAL_PASSES.index(canonical_pass) + 1]
    return tuple(rule for found in passed for rule in ESTABLISHED.get(found, ()))


STAGES: Mapping[str, tuple[Rule, ...]] = {
    "exported": EXPORTED,
    "canonical": (*rules_behind(CANONICAL_PASSES[-1]), INPUTS),
    "prepared": PREPARED,
    "calibrated": CALIBRATED,
    "planned": PLANNED,
    "trainable": TRAINABLE,
}


def stage_of(state: GraphState) -> str:
    """The stage that a graph's state says it has reached; one that trains does not tell.

    Args:
        state: Of a graph from `trace` or a later step.
    """
    if state.target is None:
        return "canonical"
    if not state.calibrated:
        return "prepared"
    return "planned" if state.choices else "calibrated"


def check_rules(
    graph: fx.GraphModule,
    rules: tuple[Rule, ...],
    state: GraphState | None = None,
    *,
    after: str = "",
) -> None:
    """Check a graph against rules in their order; the first that it breaks is an error.

    Later rules may rely on earlier ones, so they are not looked at once one is broken. The time
    is linear in the graph's size.

    Args:
        graph: Only read.
        rules: Of `STAGES`, or of `rules_behind`.
        state: The graph's state, where it has one.
        after: The pass or step that made the graph, for people.

    Raises:
        LegalityError: Naming the rule, up to three places that break it, and `after`.
    """
    subject = Subject(graph, state)
    for rule in rules:
        places = list(rule.breaches(subject))
        if places:
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            raise LegalityError(
                f"{'the graph' if not after else f'after {after} the graph'} breaks the rule "
                f"{rule.name!r} ({rule.says}): {'; '.join(places[:3])}{more}"
            )


def check_stage(
    graph: fx.GraphModule,
    stage: str,
    state: GraphState | None = None,
    *,
    after: str = "",
    needed_only: bool = False,
) -> None:
    """Check that a graph is legal at a stage.

    Args:
        graph: From `fxmpq.trace` or a later step; only read.
        stage: A key of `STAGES`.
        state: To check it against; the graph's own if `None`.
        after: The step that made the graph, for people.
        needed_only: Whether to check only the rules that later steps cannot do without.

    Raises:
        LegalityError: Naming the rule, up to three places that break it, and `after`.
        FxmpqError: If there is no such stage, or the graph did not come from `fxmpq.trace`.

    Examples:
        >>> import torch, fxmpq
        >>> graph = fxmpq.trace(torch.nn.Linear(3, 2), torch.ones(2, 3))
        >>> check_stage(graph, "canonical")
        >>> check_stage(graph, "calibrated")
        Traceback (most recent call last):
        fxmpq.errors.LegalityError: the graph breaks the rule 'calibrated' (the state says so): ...
    """
    if stage not in STAGES:
        raise FxmpqError(f"there is no stage {stage!r}; the closest are {closest(stage, STAGES)}")
    rules = STAGES[stage]
    if needed_only:
        rules = tuple(rule for rule in rules if rule.needed)
    check_rules(graph, rules, state_of(graph) if state is None else state, after=after)
