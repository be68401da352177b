"""Pairwise: every single change and every pair of changes, measured by forward passes alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxmpq.errors import FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.batches import Batch, materialize
from fxmpq.graph.state import require
from fxmpq.sensitivity.scores import (
    Asked,
    OutputScore,
    StartedOnce,
    find_score,
    is_metric,
    scorer,
    unit_of,
)
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.signal import check_base, check_signal
from fxmpq.sensitivity.sweep import Sweep, measuring
from fxmpq.training.loss import LossFunction
from fxmpq.work import Work

Entry = tuple[str, str]
Matrix = NDArray[np.float64]

_FLOAT = str(Precision())


def pairwise(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    score: Asked = "noise",
    work: Work = Work(),
) -> Sensitivity:
    """Measure the loss increase of every (group, precision) and of every pair of them.

    With `D_i(m)` the increase over float of group `i` alone at precision `m`, and `D_ij(m, n)`
    that of two groups together (Deng et al. 2023, CLADO, arXiv:2307.05657),

        `G_(i,m),(i,m) = 2 D_i(m)`, `G_(i,m),(j,n) = D_ij(m, n) - D_i(m) - D_j(n)`,

    and `x^T G x / 2` predicts the increase of a plan with one-hot choice `x` to second order:
    exactly, where increases are quadratic in the changes. Two precisions of one group never
    meet; their entry is 0. `M = G / 2 = V diag(lambda) V^T` is projected onto the nearest
    positive semi-definite matrix, `sum_k max(lambda_k, 0) v_k v_k^T`, which makes the program
    convex and takes out gains that two large errors seem to make together. Predictions then
    differ from what was measured, for single entries by `diag(found.pairs())` minus the
    values: small ones, of many bits, can gain several times their value. Values are the raw
    `D_i`, so an additive program does not depend on the projection.

    `"noise"` is quadratic in the output's error, so it suits the second-order picture better
    than `"kl"` where few bits make large errors.

    Cost: `|B| L + |B|^2 L (L - 1) / 2` forward passes for `L` groups of `|B|` candidates, of
    which only the nodes downstream are run again: downstream of the later group for pairs,
    about a third of a pass. The float values of one batch and those of one changed group are
    kept in memory. Labels only if the loss needs them; no training.

    Args:
        graph: A calibrated graph.
        batches: What the model takes; with a loss, what the loss takes.
        score: `"noise"`, `"kl"` or a loss, as in `sqnr`. Noise is closest to quadratic, so that
            the projection moves it least; the published method takes a labelled loss.
        work: Shows progress, and records one unit per (batch, group, precision): a row of
            pairs.

    Returns:
        Sensitivity whose `pairs()` is the projected `M`.

    Raises:
        FxmpqError: If the score is unknown or a metric, or an increase is NaN or infinite.
        CalibrationError: If there are no batches, or the float model's score is no number.

    Examples:
        >>> import fxmpq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
        >>> batch = torch.randn(8, 4)
        >>> prepared = fxmpq.prepare(
        ...     fxmpq.trace(model, batch), "reference", candidates=["w4a8", "w8a8"]
        ... )
        >>> found = pairwise(fxmpq.calibrate(prepared, [batch]), [batch])
        >>> found.entries
        (('0', 'w4a8'), ('0', 'w8a8'), ('1', 'w4a8'), ('1', 'w8a8'))
        >>> found.pairs().shape
        (4, 4)
    """
    state = require(graph, stage="calibrated")
    asked = find_score(score)
    if is_metric(asked):
        raise FxmpqError(
            f"pairwise takes a smooth score, and {type(asked).__name__} is a metric; give 'kl', "
            "'noise' or a callable loss(model, batch)"
        )
    entries = [(group.name, str(c)) for group in state.groups for c in group.candidates]
    with measuring():
        found = _pair_increases(Sweep(graph), materialize(batches), asked, entries, work)
    _check_finite(found, entries)
    values: dict[str, dict[str, float]] = {}
    for index, (group, precision) in enumerate(entries):
        values.setdefault(group, {})[precision] = float(found[index, index])
    return Sensitivity(
        values,
        method="pairwise",
        fingerprint=state.fingerprint,
        projections=semidefinite_factor(assemble(found, [name for name, _ in entries])),
        unit=unit_of(asked),
    )


def assemble(increases: Matrix, groups: Sequence[str]) -> Matrix:
    """The interaction matrix `M = G / 2` from measured increases.

    Args:
        increases: `D`, `[entries, entries]`: increases of single entries on the diagonal, of
            pairs above it.
        groups: The group of each entry.

    Returns:
        Symmetric: `M_ii = D_i`, `M_ij = (D_ij - D_i - D_j) / 2` for two groups, and 0 for two
        precisions of one group.

    Examples:
        >>> assemble(np.array([[1.0, 7.0], [0.0, 2.0]]), ["a", "b"])
        array([[1., 2.],
               [2., 2.]])
    """
    single = np.diag(increases)
    upper = np.triu(increases - single[:, None] - single[None, :], 1) / 2
    names = np.array(groups)
    upper[names[:, None] == names[None, :]] = 0.0
    matrix: Matrix = upper + upper.T + np.diag(single)
    return matrix


def semidefinite_factor(matrix: Matrix) -> Matrix:
    """Projections `P` with `P^T P / draws` the nearest positive semi-definite matrix.

    Args:
        matrix: Symmetric, `[entries, entries]`.

    Returns:
        `[draws, entries]`, a row `sqrt(draws * lambda) v` per eigenvector `v` of positive
        eigenvalue `lambda`; one row of zeros if there is none.

    Examples:
        >>> factor = semidefinite_factor(np.diag([3.0, -1.0]))
        >>> (factor.T @ factor / len(factor)).round(12).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = eigenvalues > 0
    if not kept.any():
        return np.zeros((1, len(matrix)))
    factor: Matrix = np.sqrt(eigenvalues[kept] * kept.sum())[:, None] * vectors[:, kept].T
    return factor


def _pair_increases(
    sweep: Sweep,
    batches: Sequence[Batch],
    score: OutputScore | LossFunction,
    entries: Sequence[Entry],
    work: Work,
) -> Matrix:
    """Increases of single entries on the diagonal, of pairs of groups above it."""
    found = scorer(score, sweep)
    base = weight = 0.0
    totals = np.zeros((len(entries), len(entries)))
    started = StartedOnce(found, batches[0])
    units = [(index, row) for index in range(len(batches)) for row in range(len(entries))]
    for index, row in work.track(units, "pairs"):
        if row == 0:
            started = StartedOnce(found, batches[index])
            part, batch_weight = work.unit(f"batch {index}", started.base)
            check_base(part)
            base, weight = base + part, weight + batch_weight
        columns = _columns(entries, row)
        later = [entries[column] for column in columns[1:]]
        group, precision = entries[row]
        name = f"batch {index}, {group} at {precision}"
        totals[row, columns] += work.unit(name, partial(_row, sweep, started, entries[row], later))
    check_signal(weight)
    for row, (_, precision) in enumerate(entries):
        if precision == _FLOAT:
            totals[row, row:] = np.diag(totals)[row:]
    return (totals - base) / weight


def _check_finite(increases: Matrix, entries: Sequence[Entry]) -> None:
    """Name the first increase that is no number."""
    for row, column in np.argwhere(~np.isfinite(increases)).tolist():
        pair = dict.fromkeys([entries[row], entries[column]])
        names = " with ".join(f"{group!r} at {precision}" for group, precision in pair)
        raise FxmpqError(
            f"the score's increase for {names} is {increases[row, column]}; every increase must "
            "be finite. Check the loss, or leave out candidates of so few bits"
        )


def _columns(entries: Sequence[Entry], row: int) -> list[int]:
    """An entry itself and those it is paired with: float changes nothing beside another."""
    group, precision = entries[row]
    if precision == _FLOAT:
        return [row]
    return [row, *(c for c in range(row, len(entries)) if entries[c][0] != group)]


def _row(sweep: Sweep, started: StartedOnce, first: Entry, later: Sequence[Entry]) -> list[float]:
    """Parts of one entry alone and with each later one."""
    started.base()
    with sweep.fixed(dict([first])):
        return started.parts([{}, *(dict([entry]) for entry in later)])
