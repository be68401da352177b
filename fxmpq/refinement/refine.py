"""Refine: make a planned graph keep the accuracy that its bits allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import fx

from fxmpq.errors import FxmpqError, PlanError, closest
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.batches import Batch, flat_inputs, materialize
from fxmpq.graph.calibration_identity import calibration_identity
from fxmpq.graph.debug import checked
from fxmpq.graph.integer_biases import round_biases
from fxmpq.graph.state import Refinement, copy_graph, require, with_state
from fxmpq.graph.switch import switch_group, with_choices
from fxmpq.identity import identity
from fxmpq.journal import data_digest
from fxmpq.quantizers.modules import BiasCorrection, WeightQuantizer
from fxmpq.refinement.methods import (
    METHODS,
    RECIPES,
    Refine,
    methods_of,
    needed_options,
    options_of,
)
from fxmpq.refinement.units import Units
from fxmpq.solver.plan import Plan, choices_of


def refine(
    graph: fx.GraphModule,
    plan: Plan | Mapping[str, str] | None,
    calibration: Iterable[object],
    *,
    method: str = "light",
    progress: bool = True,
    resume: str | Path | None = None,
    **options: object,
) -> fx.GraphModule:
    """Optimise rounding, scales, ranges and biases of a planned graph on unlabelled samples.

    The float weights stay as they are (but for `equalization` and `qat`); what is found is kept
    in the quantizers: codes, scales, bias shifts, ranges. The result simulates the plan and
    converts like any planned graph.

    Args:
        graph: From `calibrate`, `apply` or `refine`; copied, not changed.
        plan: From `solve`, or precision names per group; `None` refines a graph whose precisions
            are chosen already. A calibrated graph without a plan gets every weight format
            rounded by itself, all layers at that format (methods that only round), so that
            `measure` sees what will be deployed and a plan chooses among the rounded copies
            (stitching, Pandey et al. 2023, arXiv:2302.05397).
        calibration: Batches of what the model takes, up to about 1,024 samples; for a method
            that trains, of what its `loss` takes, labels included.
        method: A recipe, a key of `RECIPES`, or one method, a key of `REFINEMENTS`; the guide
            says which to choose.
        progress: Whether to show progress bars.
        resume: A folder. What is finished of each layer is kept there, and an interrupted run
            that is called again with the same graph, plan, data and options goes on from it.
        **options: Of a single method; a recipe takes none.

    Returns:
        The refined graph. `fxmpq.graph.state.state_of` tells by its `refinements` what each
        method did to each layer.

    Raises:
        FxmpqError: If the method or an option is unknown.
        PlanError: If the plan was made for another model or names other groups, or there is
            none and the method needs one.
        CalibrationError: If there are no batches.
        BatchError: If a batch does not fit the model.
        FileFormatError: If `resume` names something else than an interrupted run's folder.

    Examples:
        >>> import torch, fxmpq
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(4, 2)), batches[0])
        >>> graph = fxmpq.prepare(graph, "reference", candidates=["w3a8", "w8a8"])
        >>> graph = fxmpq.calibrate(graph, batches, progress=False)
        >>> refined = fxmpq.refine(graph, {"0": "w3a8"}, batches, method="gptq", progress=False)
        >>> [found] = fxmpq.graph.state.state_of(refined).refinements
        >>> found.after <= found.before
        True
    """
    require(graph, stage="calibrated")
    check_refinement(method, options)
    names = methods_of(method)
    planned = _planned(graph, plan)
    is_stitching = not require(planned, stage="calibrated").choices
    if is_stitching:
        _check_stitching(names)
    batches = _batches(graph, calibration, names)
    units = Units(resume, _run(planned, batches, names, options) if resume else {}, shown=progress)
    done: list[Refinement] = []
    with torch.inference_mode(False), torch.no_grad():
        for name in names:
            run = _bound(METHODS[name].refine, batches, units, options)
            done += _stitch(planned, run) if is_stitching else run(planned)
            checked(planned, f"refine, method {name}")
        if not is_stitching:
            round_biases(planned)
    state = require(planned, stage="calibrated")
    return with_state(planned, replace(state, refinements=(*state.refinements, *done)))


def check_refinement(method: str, options: Iterable[str] = (), *, has_labels: bool = True) -> None:
    """Refuse an unknown recipe or method, and options that it does not take.

    Args:
        method: As asked.
        options: Names of the options as asked.
        has_labels: Whether a method that trains can be given what it trains with.

    Raises:
        FxmpqError: With the methods or options there are.
    """
    names, given = methods_of(method), list(options)
    legal = options_of(method) if method not in RECIPES else {}
    for option in given:
        if method in RECIPES:
            raise FxmpqError(
                f"the recipe {method!r} takes no options, found {option!r}; give options to one "
                f"of its methods: {', '.join(names)}"
            )
        if option not in legal:
            there_are = f"there are {closest(option, legal)}" if legal else "it takes none"
            raise FxmpqError(f"no option {option!r} with the refinement {method!r}; {there_are}")
    lacking = [name for name in needed_options(method) if name not in given] if legal else []
    trains = [name for name in names if METHODS[name].trains]
    if trains and not has_labels:
        raise FxmpqError(
            f"the refinement {trains[0]!r} trains with labels; refine with it afterwards: "
            f"fxmpq.refine(graph, plan, batches, method={trains[0]!r}, ...)"
        )
    if lacking:
        raise FxmpqError(f"the refinement {method!r} needs the option {lacking[0]!r}")


def _planned(graph: fx.GraphModule, plan: Plan | Mapping[str, str] | None) -> fx.GraphModule:
    """A copy of the graph with the plan's precisions, or as it is."""
    if plan is None:
        return copy_graph(graph)
    state = require(graph, stage="calibrated")
    return with_choices(graph, choices_of(plan, state.fingerprint))


def _batches(
    graph: fx.GraphModule, calibration: Iterable[object], names: Sequence[str]
) -> list[object]:
    """The batches, each of which fits the model."""
    batches = materialize(calibration)
    if not any(METHODS[name].trains for name in names):
        for batch in batches:
            flat_inputs(graph, cast(Batch, batch))
    return batches


def _bound(
    method: Refine, batches: Sequence[object], units: Units, options: Mapping[str, object]
) -> Callable[[fx.GraphModule], list[Refinement]]:
    """A method that takes nothing but a graph any more."""
    return lambda graph: method(graph, batches, units=units, **options)


def _check_stitching(names: Sequence[str]) -> None:
    for name in names:
        if not METHODS[name].rounds:
            rounding = ", ".join(repr(key) for key, entry in METHODS.items() if entry.rounds)
            raise PlanError(
                f"the refinement {name!r} needs a plan, from fxmpq.solve or as precision names "
                f"per group; without one, every weight format can be rounded by itself with "
                f"{rounding or 'no method yet'}"
            )


def _stitch(
    graph: fx.GraphModule, run: Callable[[fx.GraphModule], list[Refinement]]
) -> list[Refinement]:
    """Refine every integer weight format by itself; all findings go into one graph."""
    formats = {
        candidate.weight: None
        for group in require(graph, stage="calibrated").groups
        for candidate in group.candidates
        if candidate.weight is not None and candidate.weight.is_integer
    }
    done: list[Refinement] = []
    for found in sorted(formats, key=lambda entry: (entry.bits, entry.name)):
        alone = _homogeneous(graph, found)
        done += [replace(entry, weight_format=found.name) for entry in run(alone)]
        _keep(alone, graph, found)
    return done


def _homogeneous(graph: fx.GraphModule, weight_format: NumberFormat) -> fx.GraphModule:
    """A copy with one weight format wherever there is a candidate with it, and float elsewhere.

    Of the candidates with this format each group gets the one whose activations are widest.
    """
    state = require(graph, stage="calibrated")
    alone = copy_graph(graph)
    choices = {}
    for group in state.groups:
        fitting = [entry for entry in group.candidates if entry.weight == weight_format]
        chosen = max(fitting, key=lambda entry: entry.sort_key, default=Precision())
        switch_group(alone, group, chosen)
        choices[group.name] = str(chosen)
    return with_state(alone, replace(state, choices=choices))


def _keep(source: fx.GraphModule, target: fx.GraphModule, found: NumberFormat) -> None:
    """Copy scales, codes and bias shifts of the format that one run refined."""
    for name, module in source.named_modules():
        if isinstance(module, WeightQuantizer) and module.active == found:
            weight = target.get_submodule(name)
            assert isinstance(weight, WeightQuantizer)
            weight.set_scale(found, module.scale(found))
            weight.set_codes(found, module.stored_codes(found))
        elif isinstance(module, BiasCorrection) and module.active == found:
            correction, shift = target.get_submodule(name), module.shift(found)
            assert isinstance(correction, BiasCorrection)
            if shift is not None:
                correction.set_shift(found, shift)


def _run(
    graph: fx.GraphModule,
    batches: Sequence[object],
    names: Sequence[str],
    options: Mapping[str, object],
) -> dict[str, object]:
    """What identifies a run: its folder is no other's."""
    return {
        "methods": {name: identity({**options_of(name), **options}) for name in names},
        "choices": dict(require(graph, stage="calibrated").choices),
        **calibration_identity(graph),
        "data": data_digest(batches),
    }
