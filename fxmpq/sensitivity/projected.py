"""The projected estimator: every group and candidate at the price of a few backward passes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxmpq.graph.batches import Batch, flat_inputs, materialize
from fxmpq.graph.state import require
from fxmpq.sensitivity.probes import check_probes
from fxmpq.sensitivity.projection_pass import ProjectionPass
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.shards import ProjectionShard, join_shards, stack_rows
from fxmpq.work import Work


def projected(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    probes: int = 1,
    seed: int = 0,
    work: Work = Work(),
) -> Sensitivity:
    """Estimate the output noise of every (group, precision) from random output projections.

    To first order, setting group `g` to precision `c` moves the output `y_n` of sample `n` by
    `J_n d_n(g, c)`, with `d` the local errors (rounded weights and activations, corrected
    biases) at the outputs of the group's layers and quantizers. One backward pass from a
    random direction `v_n` (see `draw_probes`) gives `v_n^T J_n` everywhere at once, hence
    `a_n(g, c) = v_n^T J_n d_n(g, c)` for all groups and candidates, and `E_v[a_n^2] = ||J_n
    d_n||^2`. The value is

        `sum_n mean_v a_n(g, c)^2 / sum_n ||y_n||^2`,

    relative output noise power (dimensionless). The `a` themselves are returned as
    projections: their Gram matrix is the interaction between every two choices, positive
    semi-definite by construction. The relative standard error of a value is about
    `sqrt(2 / (samples * probes))` where all samples err alike: more where a few err most, less
    the more errors lie along a sample's output, and none with as many probes as the next power
    of two from the number of outputs.

    Cost: one forward pass and, per probe, one backward pass to the activations and one
    per-sample weight-gradient product, whatever the number of groups and candidates. Needs no
    labels and no training. Local errors are formed layer by layer during the backward pass
    and dropped. Larger errors than first order describes (2-bit weights) are underestimated.

    Args:
        graph: A calibrated graph.
        batches: What the model takes.
        probes: Random directions per sample; more than make it exact are not drawn.
        seed: Seed of the directions; equal seeds give bit-identical results.
        work: Shows progress, and records one unit per batch.

    Returns:
        Sensitivity with projections, one row per sample and probe. They do not depend on how
        samples are batched, except in a layer over a table that belongs to no sample, whose
        error a batch shares.

    Raises:
        FxmpqError: If there is no probe, or the seed is none.
        CalibrationError: If there are no batches, or the outputs are zero, NaN or infinite.

    Examples:
        >>> import fxmpq, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)).eval()
        >>> batch = torch.randn(8, 4)
        >>> graph = fxmpq.calibrate(fxmpq.prepare(fxmpq.trace(model, batch), "reference"), [batch])
        >>> found = projected(graph, [batch])
        >>> found.value("0", "w8a8") < found.value("0", "w2a8")
        True
        >>> found.projections.shape == (8, len(found.entries))
        True
    """
    return join_shards([project_shard(graph, batches, probes=probes, seed=seed, work=work)])


def project_shard(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    *,
    probes: int = 1,
    seed: int = 0,
    first_sample: int = 0,
    work: Work = Work(),
) -> ProjectionShard:
    """Project the local errors on some of the samples, as one of several processes.

    A sample's directions follow from the seed and its number alone, so shards of the same
    samples joined by `join_shards` give what `projected` gives on all of them. Every process
    must measure the same calibrated graph.

    Cost: as `projected`, on these samples.

    Args:
        graph: A calibrated graph.
        batches: What the model takes; this shard's samples.
        probes: Random directions per sample.
        seed: Seed of the directions, the same for all shards.
        first_sample: How many samples lie in the shards before this one.
        work: Shows progress, and records one unit per batch.

    Returns:
        The shard; a frozen dataclass of arrays, which any transport between processes takes.

    Raises:
        FxmpqError: If there is no probe, or the seed or sample number is none.
        CalibrationError: If there are no batches.
    """
    state = require(graph, stage="calibrated")
    check_probes(probes, seed, first_sample)
    found = materialize(batches)
    entries = tuple((group.name, str(c)) for group in state.groups for c in group.candidates)
    pass_ = ProjectionPass(graph)
    rows: list[NDArray[np.float64]] = []
    powers: list[NDArray[np.float64]] = []
    following = first_sample
    for index, batch in enumerate(work.track(found, "projecting")):
        first = following

        def compute(batch: Batch = batch, first: int = first) -> list[float]:
            inputs = flat_inputs(graph, batch)
            part, power = pass_.project(inputs, probes, seed=seed, first_sample=first)
            return [float(len(power)), *power.tolist(), *part.flatten().tolist()]

        numbers = np.asarray(work.unit(f"batch {index} from sample {first}", compute))
        samples = int(numbers[0])
        powers.append(numbers[1 : samples + 1])
        rows.append(numbers[samples + 1 :].reshape(samples, -1, len(entries)))
        following += samples
    return ProjectionShard(
        stack_rows(rows), np.concatenate(powers), first_sample, entries, state.fingerprint, seed
    )
