"""Size on disk: what the files of a plan take, found from files that are written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import fx

from fxmpq.costs.cost import count
from fxmpq.costs.measurable import calibrated_on_example, with_float
from fxmpq.costs.parts import MetricParts
from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.state import Group, require_groups
from fxmpq.graph.switch import with_choices
from fxmpq.progress import track

Write = Callable[[fx.GraphModule, Path], object]
"""Writes a planned graph's files to a folder."""

Count = Callable[[Group, Precision], int]
"""Counts the bytes of a group's weights."""

_FLOAT = Precision()


def file_size(graph: fx.GraphModule, write: Write, *, progress: bool = False) -> MetricParts:
    """Find what each group adds to the bytes of all files that are written for a plan.

    A plan takes `fixed + sum over groups g of (weights(g) + sum over formats f of n(g, f) s(f))`,
    with `weights` as `weight_bytes` counts them. `fixed` is what the float model's files hold
    besides weights. `s(f)` is what a weight or an activation in codes of a format adds: nodes,
    names, grids. `n(g, f)` is how many of the group's layers have weights in it, or how many
    activations it quantizes to it. The `s` are those of least squares on the float plan and the
    uniform plans of all candidates, which are written to a temporary folder and fit by
    construction where each format is told from the others; of several solutions the smallest one
    is taken. Mixed plans are predicted. Where weights of a format take less than `weight_bytes`
    counts, as where a runtime stores scales in 2 bytes, `n(g, f)` is those bytes instead, as
    all of them shrink. A weight that several layers share counts once for each of them where the
    files tell that the runtime stores it so.

    Args:
        graph: From `prepare` or later; not changed. One that is not calibrated is, on its example
            alone, which does not change how much is stored.
        write: The target's.
        progress: Whether to show a progress bar.

    Returns:
        What groups add, in whole bytes, with the float model's total.

    Raises:
        FxmpqError: If the graph has no groups, or nothing was written.
        TargetError: As converting a plan does.

    Examples:
        >>> import torch, fxmpq
        >>> from fxmpq.targets.reference import REFERENCE
        >>> graph = fxmpq.trace(torch.nn.Sequential(torch.nn.Linear(100, 10)), torch.ones(2, 100))
        >>> graph = fxmpq.prepare(graph, "reference", candidates=["w4a8", "w8a8"])
        >>> found = file_size(graph, REFERENCE.convert)
        >>> found.rows["0"]["w8a8"] - found.rows["0"]["w4a8"]
        500
    """
    state = require_groups(graph, stage="prepared")
    table = count(graph)
    names = {str(entry): None for group in state.groups for entry in group.candidates}
    plans = [table.uniform(name) for name in names if name != str(_FLOAT)]
    plans.insert(0, dict.fromkeys(table.groups, str(_FLOAT)))
    plans = [plan for index, plan in enumerate(plans) if plan not in plans[:index]]
    calibrated = graph if state.calibrated else calibrated_on_example(graph, bias_correction=True)
    switchable = with_float(calibrated)
    sizes = [
        _written_bytes(with_choices(switchable, plan), write)
        for plan in track(plans, "writing files", shown=progress)
    ]
    if not min(sizes):
        raise FxmpqError(
            f"target {state.target!r} wrote no files, so their size cannot be predicted; limit "
            "'weights' instead"
        )
    return fitted(state.groups, plans, sizes)


def _written_bytes(planned: fx.GraphModule, write: Write) -> int:
    with TemporaryDirectory(prefix="fxmpq-") as folder:
        write(planned, Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def fitted(
    groups: Sequence[Group], plans: Sequence[Mapping[str, str]], sizes: Sequence[int]
) -> MetricParts:
    """Find what formats add from the sizes of files; see `file_size`.

    Args:
        groups: Of the graph.
        plans: Those that were written, the float one first.
        sizes: Bytes of each one's files.
    """
    chosen = [[(group, Precision.parse(plan[group.name])) for group in groups] for plan in plans]
    stored = _by_layer if _is_stored_by_layer(chosen, sizes) else weight_bytes
    counted = [sum(stored(*choice) for choice in choices) for choices in chosen]
    fixed = max(0, sizes[0] - counted[0])
    # Float weights are among them where a runtime narrows them, or stores equal ones once.
    shrinking = {_FLOAT} if sizes[0] < counted[0] else set[Precision]()
    while True:
        terms = [
            _sum(_terms(*choice, shrinking, stored) for choice in choices) for choices in chosen
        ]
        rest = [size - fixed - known for size, known in zip(sizes, counted, strict=True)]
        added = _least_squares(terms, rest, sizes)
        further = {key for key, value in added.items() if key.weight is not None and value < 0}
        if further <= shrinking:
            break
        shrinking |= further
    rows = {
        group.name: {
            str(entry): _group_bytes(
                stored(group, entry), _terms(group, entry, shrinking, stored), added
            )
            for entry in group.candidates
        }
        for group in groups
    }
    return MetricParts(rows, fixed=fixed, float_total=sizes[0])


def _by_layer(group: Group, precision: Precision) -> int:
    """Bytes of a group's weights, with those that layers share once for each."""
    alone = [replace(group, layers=(layer,)) for layer in group.layers]
    return sum(weight_bytes(entry, precision) for entry in alone)


def _is_stored_by_layer(
    chosen: Sequence[Sequence[tuple[Group, Precision]]], sizes: Sequence[int]
) -> bool:
    """Whether what layers share is stored again: what is no weight then shrinks with its bits."""
    once = [sum(weight_bytes(*choice) for choice in choices) for choices in chosen]
    again = [sum(_by_layer(*choice) for choice in choices) for choices in chosen]
    repeated = [more - less for more, less in zip(again, once, strict=True)]
    least = repeated.index(min(repeated))
    shrinks = (sizes[0] - once[0]) - (sizes[least] - once[least])
    return 2 * shrinks > repeated[0] - repeated[least] > 0


def _terms(
    group: Group, precision: Precision, shrinking: Collection[Precision], stored: Count
) -> Counter[Precision]:
    """How much of each format a group has: layers, or bytes where those shrink; activations."""
    weight, activation = precision.weight_only, precision.activation_only
    found = Counter[Precision]()
    if weight in shrinking:
        found[weight] = stored(group, precision)
    elif not weight.is_float:
        found[weight] = len(group.layers)
    if not activation.is_float:
        found[activation] = len(group.activation_quantizers)
    return found


def _sum(counts: Iterable[Counter[Precision]]) -> Counter[Precision]:
    total = Counter[Precision]()
    for entry in counts:
        total.update(entry)
    return total


def _least_squares(
    terms: Sequence[Mapping[Precision, int]], rest: Sequence[int], sizes: Sequence[int]
) -> dict[Precision, float]:
    """What one of each format adds, with the least relative errors of sizes.

    Where that leaves a choice, formats are taken to add equally much where most of each is.
    """
    keys = sorted({key for row in terms for key in row}, key=lambda key: key.sort_key)
    amounts = np.array([[row.get(key, 0) for key in keys] for row in terms], dtype=np.float64)
    most = np.maximum(amounts.max(axis=0), 1)
    errors = np.array(sizes, dtype=np.float64)
    found, *_ = np.linalg.lstsq(amounts / most / errors[:, None], rest / errors, rcond=1e-9)
    return dict(zip(keys, (found / most).tolist(), strict=True))


def _group_bytes(
    stored: int, terms: Mapping[Precision, int], added: Mapping[Precision, float]
) -> int:
    further = math.fsum(amount * added.get(key, 0.0) for key, amount in terms.items())
    return max(0, round(stored + further))
