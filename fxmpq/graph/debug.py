"""The debug mode: with `FXMPQ_DEBUG=1` every pass and step is checked as soon as it has run."""

from __future__ import annotations

import os

from torch import fx

from fxmpq.graph.legality.stages import check_rules, check_stage, rules_behind, stage_of
from fxmpq.graph.passes import Pass
from fxmpq.graph.state import state_of

VARIABLE = "FXMPQ_DEBUG"


def is_debugging() -> bool:
    """Whether the environment variable `FXMPQ_DEBUG` is set, to anything but nothing or 0."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def checked_pass(graph: fx.GraphModule, canonical_pass: Pass) -> None:
    """In debug mode, check what must hold behind a canonical pass.

    Args:
        graph: What the pass has gone over; only read.
        canonical_pass: One of `CANONICAL_PASSES`.

    Raises:
        LegalityError: Naming the pass, the rule and the places that break it.
    """
    if is_debugging():
        name = getattr(canonical_pass, "__name__", str(canonical_pass))
        check_rules(graph, rules_behind(canonical_pass), after=f"the pass {name!r}")


def checked(graph: fx.GraphModule, step: str, stage: str | None = None) -> fx.GraphModule:
    """In debug mode, check that the graph that a step made is legal at its stage.

    Args:
        graph: From the step, with its state; only read.
        step: The step's name.
        stage: A key of `STAGES`; the one that the graph's state tells if `None`.

    Returns:
        The graph.

    Raises:
        LegalityError: Naming the step, the rule and the places that break it.
    """
    if is_debugging():
        check_stage(graph, stage or stage_of(state_of(graph)), after=f"the step {step!r}")
    return graph
