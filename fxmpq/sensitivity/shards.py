"""Shards: what several processes project on their samples, and how it joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxmpq.errors import FxmpqError
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.signal import check_signal


@dataclass(frozen=True, eq=False)
class ProjectionShard:
    """What some of the samples contribute to the projected estimate.

    Args:
        rows: `a_nr(g, c) = v_nr^T J_n d_n(g, c)`, `[samples, probes, entries]`, not normalised.
        powers: Output power `||y_n||^2` of each sample, `[samples]`.
        first_sample: Number of the first sample.
        entries: (group, precision) of each column.
        fingerprint: Of the model.
        seed: Of the probes.
    """

    rows: NDArray[np.float64]
    powers: NDArray[np.float64]
    first_sample: int
    entries: tuple[tuple[str, str], ...]
    fingerprint: str
    seed: int


def join_shards(shards: Sequence[ProjectionShard]) -> Sensitivity:
    """Join what processes projected on their samples: what one process finds on all of them.

    Args:
        shards: In any order; together they hold consecutive samples, each once.

    Returns:
        Sensitivity with projections, one row per sample and probe.

    Raises:
        FxmpqError: If there are no shards, they differ in model, candidates or seed, or samples
            are missing or held twice.
        CalibrationError: If the outputs are all zero, NaN or infinite.

    Examples:
        >>> def shard(first, a):
        ...     entries = (("fc", "w2a8"),)
        ...     return ProjectionShard(np.array([[[a]]]), np.ones(1), first, entries, "model", 0)
        >>> join_shards([shard(1, 0.1), shard(0, 0.3)]).value("fc", "w2a8")
        0.05
    """
    ordered = sorted(shards, key=lambda shard: shard.first_sample)
    _check_shards(ordered)
    powers = np.concatenate([shard.powers for shard in ordered])
    signal = float(powers.sum())
    check_signal(signal)
    rows = stack_rows([shard.rows for shard in ordered])
    # Normalised so that the mean over rows of a squared entry is the value itself.
    matrix = rows.reshape(-1, rows.shape[-1]) * (len(rows) / signal) ** 0.5
    values = np.square(matrix).mean(axis=0).tolist()
    table: dict[str, dict[str, float]] = {}
    for (group, precision), value in zip(ordered[0].entries, values, strict=True):
        table.setdefault(group, {})[precision] = value
    fingerprint = ordered[0].fingerprint
    return Sensitivity(table, method="projected", fingerprint=fingerprint, projections=matrix)


def stack_rows(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Concatenate the rows of several batches.

    Where fewer probes were exact, zeros stand for the others and the rows grow to make up for
    them, so that means over probes stay what they were.

    Args:
        parts: Each `[samples, probes, entries]`.

    Returns:
        Shape `[samples of all, most probes, entries]`.
    """
    probes = max(part.shape[1] for part in parts)
    return np.concatenate(
        [
            np.pad(
                part * (probes / part.shape[1]) ** 0.5,
                ((0, 0), (0, probes - part.shape[1]), (0, 0)),
            )
            for part in parts
        ]
    )


def _check_shards(ordered: Sequence[ProjectionShard]) -> None:
    if not ordered:
        raise FxmpqError("there are no shards to join; pass what project_shard returned")
    following = ordered[0].first_sample
    for shard in ordered:
        for name in ("fingerprint", "entries", "seed"):
            if getattr(shard, name) != getattr(ordered[0], name):
                raise FxmpqError(
                    f"the shard from sample {shard.first_sample} differs from the first in its "
                    f"{name}; project all shards with the same graph, candidates and seed"
                )
        if shard.first_sample != following:
            raise FxmpqError(
                f"expected a shard from sample {following}, found one from {shard.first_sample}; "
                "give each shard the number of samples before it as first_sample"
            )
        following += len(shard.rows)
