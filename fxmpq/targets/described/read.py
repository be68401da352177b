"""Reading a target of one's own from a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from fxmpq.costs.cost import COSTS
from fxmpq.costs.figures import MetricFigures
from fxmpq.errors import FxmpqError, TargetError
from fxmpq.explain import explain
from fxmpq.formats import Precision
from fxmpq.granularity import PerBlock
from fxmpq.graph.operators import OPERATORS
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.vocabulary import MEETINGS
from fxmpq.solver.budget import WORDS
from fxmpq.targets.described.schema import TargetFile
from fxmpq.targets.target import Target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_target(path: str | Path, known: Mapping[str, Target]) -> Target:
    """Read a target file.

    What the file leaves out is as in the target that it is `based_on`, whose converter writes the
    model; `operators` are always the file's own.

    Args:
        path: A TOML file; the guide to targets describes its keys.
        known: The targets there are by name.

    Returns:
        The target.

    Raises:
        TargetError: If the file is not there, is no TOML, has unknown keys or wrong values, or a
            metric lacks the figure of a default candidate; with the key and what would work.

    Examples:
        >>> import tempfile
        >>> from fxmpq.targets.registry import TARGETS
        >>> path = Path(tempfile.mkdtemp()) / "npu.toml"
        >>> _ = path.write_text('''
        ... name = "npu"
        ... description = "an example"
        ... default_candidates = ["w8a8"]
        ... operators.conv = {weights = [8], activations = [8]}
        ... metrics.cycles.macs_per_unit = {w8a8 = 256}
        ... ''')
        >>> read_target(path, TARGETS).metrics["cycles"].general.per_mac["w8a8"]
        0.00390625
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"cannot read the target file {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"the target file {file} is no TOML: {error}") from error
    try:
        found = TargetFile.model_validate(content)
    except ValidationError as error:
        explained = explain(error, TargetFile)
        raise TargetError(f"the target file {file} cannot be used:\n{explained}") from error
    try:
        return _target(found, known)
    except FxmpqError as error:
        raise TargetError(f"the target file {file} cannot be used: {error}") from error


def _target(found: TargetFile, known: Mapping[str, Target]) -> Target:
    if found.name in known:
        raise TargetError(f"name {found.name!r} is taken by a target of fxmpq; choose another")
    if found.based_on not in known:
        raise TargetError(
            f"based_on is {found.based_on!r}; the targets to base one on are {', '.join(known)}"
        )
    base = known[found.based_on]
    rules = _rules(found, base.rules)
    rules.check(rules.default_candidates)
    for kind, operator in rules.operators.items():
        if not operator.weight_bits and not operator.floats and not operator.is_activation_only:
            raise TargetError(f"operators.{kind} has neither weights nor floats")
        _check_converter(kind, operator, base)
        if found.operators[kind].integer_biases:
            _check_biases(kind, operator)
    metrics = {name: metric.named(name) for name, metric in found.metrics.items()}
    for metric in metrics.values():
        if metric.metric in COSTS:
            raise TargetError(
                f"{metric.metric!r} is a metric of every target, as are {', '.join(COSTS)}; name "
                "it otherwise"
            )
        if metric.metric in WORDS:
            raise TargetError(
                f"{metric.metric!r} means something else in a budget, as do {', '.join(WORDS)}; "
                "name the metric otherwise"
            )
        _check_figures(metric, rules)
    return replace(base, rules=rules, description=found.description, metrics=metrics, latency=None)


def _check_biases(kind: str, rule: OperatorRule) -> None:
    """Refuse integer biases of a kind whose layers have none."""
    biased = [entry.kind for entry in OPERATORS.values() if entry.bias is not None]
    if kind not in biased or not rule.activation_bits - {None}:
        raise TargetError(
            f"operators.{kind} has integer_biases, which layers with biases on integers have: "
            f"kinds {', '.join(dict.fromkeys(biased))}, with widths in activations"
        )


def _check_converter(kind: str, rule: OperatorRule, base: Target) -> None:
    """Refuse what the base's converter cannot write."""
    legal = base.rules.operators.get(kind)
    if legal is None:
        raise TargetError(
            f"operators.{kind} is based on {base.name!r}, which has no quantized {kind}; it has "
            f"{', '.join(base.rules.operators)}"
        )
    blocks = bool(legal.block_sizes) and PerBlock in rule.granularities
    fits = (
        rule.weight_bits <= legal.weight_bits
        and rule.activation_bits <= legal.activation_bits
        and rule.floats <= legal.floats
        and rule.granularities <= legal.granularities
        and rule.dynamic <= legal.dynamic
        and not (blocks and not (rule.block_sizes and rule.block_sizes <= legal.block_sizes))
    )
    if not fits:
        raise TargetError(
            f"operators.{kind} asks for {rule.describe()}, but it is based on {base.name!r}, which "
            f"runs {legal.describe()}"
        )


def _rules(found: TargetFile, base: TargetRules) -> TargetRules:
    """The base's rules with what the file says."""
    operators = {kind: _operator(kind, found, base) for kind in found.operators}
    changes: dict[str, object] = {
        "name": found.name,
        "operators": operators,
        "default_candidates": _default_candidates(found, operators, base),
        # Of what is inherited, what no operator of the file is about falls away.
        "quantize_outputs_of": base.quantize_outputs_of & {*operators, *MEETINGS},
        "symmetric_inputs_of": base.symmetric_inputs_of & {*operators, *MEETINGS},
        "quantize_residuals_of": base.quantize_residuals_of & {*operators},
    }
    for key in ("fusions", "joins"):
        if getattr(found, key) is not None:
            changes[key] = getattr(found, key)
    for key in (
        "quantize_outputs_of",
        "shared_ranges",
        "symmetric_inputs_of",
        "quantize_residuals_of",
    ):
        if getattr(found, key) is not None:
            changes[key] = frozenset(getattr(found, key))
    outputs = changes["quantize_outputs_of"]
    assert isinstance(outputs, frozenset)
    changes["stored_if_read"] = base.stored_if_read & outputs
    if found.through is not None:
        changes["through"] = frozenset(
            overload for name in found.through for overload in _overloads(name, base)
        )
    return replace(base, **changes)  # type: ignore[arg-type]  # the keys of its fields


def _operator(kind: str, found: TargetFile, base: TargetRules) -> OperatorRule:
    """A rule of the file, with what only the base's converter knows of the kind."""
    rule, legal = found.operators[kind].rule(kind), base.operators.get(kind)
    if legal is None:
        return rule
    return replace(
        rule,
        blocks_are_weight_only=legal.blocks_are_weight_only,
        blocks_are_whole=legal.blocks_are_whole,
        only=legal.only,
        bias_width=rule.bias_width if legal.bias_width is None else legal.bias_width,
    )


def _default_candidates(
    found: TargetFile, operators: Mapping[str, OperatorRule], base: TargetRules
) -> tuple[Precision, ...]:
    """The file's default candidates; without any, those of the base's that its operators run."""
    if found.default_candidates:
        return tuple(Precision.parse(name) for name in found.default_candidates)
    kept = tuple(
        entry
        for entry in base.default_candidates
        if any(rule.runs(entry) for rule in operators.values())
    )
    if not kept:
        raise TargetError(
            f"default_candidates is missing, and the operators run none of those of {base.name!r} "
            f"({', '.join(map(str, base.default_candidates))}); give those that are to be tried"
        )
    return kept


def _overloads(name: str, base: TargetRules) -> list[object]:
    """All forms of an operator in ATen that the base's converter moves quantizers past."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise TargetError(f"through names {name!r}, which is no ATen operator, as 'max_pool2d'")
    names: Sequence[str] = packet.overloads()  # type: ignore[no-untyped-call]
    found = [getattr(packet, overload) for overload in names]
    if base.through and base.through.isdisjoint(found):
        known = {str(entry).split(".")[1] for entry in base.through}
        raise TargetError(
            f"through names {name!r}, which the converter of {base.name!r} does not know; it knows "
            f"{', '.join(sorted(known))}"
        )
    return found


def _check_figures(metric: MetricFigures, rules: TargetRules) -> None:
    """Refuse a metric that cannot price a default candidate."""
    look_ups = {entry.kind for entry in OPERATORS.values() if not entry.quantizes_input}
    for kind in rules.operators:
        if kind in look_ups:
            continue
        figures = metric.of(kind)
        for candidate in rules.candidates_for(kind, rules.default_candidates):
            if str(candidate) not in figures.per_mac:
                raise TargetError(
                    f"metrics.{metric.metric} has no figure for {kind} at {candidate}; give one in "
                    f"metrics.{metric.metric}.per_mac or macs_per_unit, or under "
                    f"metrics.{metric.metric}.operators.{kind}"
                )
