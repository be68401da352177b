"""Orthogonality: layers whose features are unlike all others' keep more bits (OMPQ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.graph.batches import Batch
from fxmpq.graph.state import Group, require
from fxmpq.sensitivity.features import FeatureGrams, gram
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.sensitivity.weightless import check_all_have_weights
from fxmpq.training.loss import batch_samples
from fxmpq.work import Work

CREDITS = ("suffix", "own")
_FEWEST_SAMPLES = 3
_FLOAT_BITS = 32


def orthogonality(
    graph: fx.GraphModule,
    batches: Sequence[Batch],
    *,
    center: bool = True,
    beta: float = 0.3,
    credit: str = "suffix",
    work: Work = Work(),
) -> Sensitivity:
    """Score groups by how little their features resemble those of the other groups.

    With `F_i` the features of group `i` (its layers' outputs behind the activation or residual
    sum, flattened per sample; see `feature_nodes`) and `K_i = F_i F_i^T`,

        `ORM_ij  = <K_i, K_j> / (|K_i| |K_j|)`            (centred: linear CKA)
        `gamma_i = sum_{j != i} ORM_ij`
        `theta_i = exp(-beta (gamma_i - min gamma))`      (the largest is 1, for any `beta`)
        `c_i     = mean_{j >= i} theta_j`                 (`credit="own"`: `theta_i`)

    and the value of precision `p` is `c_i (b_max - b_p) / 8`, with `b` the bits of a weight (32
    in float) and `b_max` the most bits among the group's candidates: a score. Minimising its
    sum is OMPQ's linear program, which maximises `sum_i c_i x_i` over the bytes `x_i` of a
    weight (Ma et al. 2021, arXiv:2109.07865). OMPQ sets activation widths globally, so two
    precisions with equal weights have equal values; budgets on BOPs alone tell them apart.

    Every group takes part in `gamma`, those that are excluded or kept at one precision too. A
    group whose features are the same for all samples (a table of positions) is unlike any
    other: its `ORM` is 0.

    `beta` says how sharply likeness costs: a group that resembles the others by as much as one
    more group equal to it (`gamma` larger by 1) counts `exp(-beta)` as much. On a trained
    ResNet-20 `gamma` spreads by 4.6, so that at the default of 0.3 importance spreads by a
    factor of 4; a larger `beta` leaves most groups no weight, and its plans are worse there. At
    1e-6 or less all `theta` are equal to any precision that matters, and the values only say
    "bits to small layers first"; at 100 the most unlike group alone has any weight.

    Cost: one forward pass, and `n^2` products per feature value. Needs no labels and no
    training. Memory: `groups * n^2` doubles for the `n` samples of one batch; features are
    dropped as they come. Samples are compared within a batch, since batches may differ in
    shape, and the inner products are added up over batches (the Gram matrix of all samples
    with zeros between batches), so give one batch of 32 to 64 samples for the published
    measure; few samples make all features look alike.

    Args:
        graph: A calibrated graph.
        batches: What the model takes; one batch must have 3 samples or more.
        center: Whether Gram matrices are centred; without it, what all samples have in common
            makes features look alike.
        beta: Positive.
        credit: `suffix` as published (a group also has credit for all groups behind it), or
            `own`.
        work: Shows progress, and records one unit per batch.

    Returns:
        Sensitivity of unit `score`, without projections.

    Raises:
        FxmpqError: If `beta` is not positive and finite, there is no such `credit`, or a group has
            nothing but products of activations to choose for.
        CalibrationError: If every batch has fewer than 3 samples, or features are NaN or
            infinite.

    Examples:
        >>> import fxmpq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(),
        ...                             torch.nn.Linear(4, 2)).eval()
        >>> x = torch.randn(8, 4)
        >>> graph = fxmpq.prepare(fxmpq.trace(model, x), "reference", candidates=["w4a8", "w8a8"])
        >>> graph = fxmpq.calibrate(graph, [x], progress=False)
        >>> round(orthogonality(graph, [x]).value("0", "w4a8"), 6)  # both groups have c = 1
        0.5
    """
    state = require(graph, stage="calibrated")
    _check_options(beta, credit)
    check_all_have_weights(state.groups, "'orthogonality'")
    _check_samples(batches)
    features = FeatureGrams(graph, center=center)
    products = torch.zeros(len(state.groups), len(state.groups), dtype=torch.float64)
    for index, batch in enumerate(work.track(batches, "comparing features")):
        compared = work.unit(f"batch {index}", partial(_compared, features, batch))
        products += torch.tensor(compared, dtype=torch.float64).reshape(products.shape)
    shares = importance(_normalised(products), beta)
    if credit == "suffix":
        shares = suffix_means(shares)
    values = {
        group.name: _values(group, share)
        for group, share in zip(state.groups, shares.tolist(), strict=True)
    }
    return Sensitivity(values, method="orthogonality", fingerprint=state.fingerprint, unit="score")


def orm(features: Sequence[Tensor], *, center: bool = True) -> Tensor:
    """OMPQ's orthogonality metric between every two features.

    `ORM_ij = |F_j^T F_i|^2 / (|F_i^T F_i| |F_j^T F_j|)` with Frobenius norms, computed from `n`
    by `n` Gram matrices. Centred it is linear CKA (Kornblith et al. 2019, arXiv:1905.00414).
    It does not change if a feature is rotated or scaled.

    Args:
        features: One sample a row, `[n, d_i]` each, with the same `n`.
        center: Whether to take the mean over samples from each feature first.

    Returns:
        Symmetric, in `[0, 1]`, shape `[features, features]`; 0 where a feature is zero, which
        centred it is if it does not vary.

    Examples:
        >>> one = torch.tensor([[1.0], [0.0]])
        >>> orm([one, 3 * one, 1 - one], center=False)
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    return orm_of_grams(torch.stack([gram(entry, center=center) for entry in features]))


def orm_of_grams(grams: Tensor) -> Tensor:
    """OMPQ's orthogonality metric from Gram matrices, `<K_i, K_j> / (|K_i| |K_j|)`.

    Args:
        grams: Positive semi-definite, shape `[features, n, n]`.

    Returns:
        Shape `[features, features]`; see `orm`.
    """
    return _normalised(_inner_products(grams))


def importance(matrix: Tensor, beta: float) -> Tensor:
    """OMPQ's importance `exp(-beta * gamma)`, scaled so that the largest is 1.

    Args:
        matrix: Orthogonality metric, shape `[groups, groups]`.
        beta: Positive.

    Returns:
        Shape `[groups]`, in `[0, 1]`.

    Examples:
        >>> importance(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), 1.0)
        tensor([1.0000, 0.3679, 0.3679])
    """
    gamma = matrix.sum(dim=1) - matrix.diagonal()
    return torch.exp(-beta * (gamma - gamma.min()))


def suffix_means(values: Tensor) -> Tensor:
    """The mean of each entry and all behind it, `c_i = sum_{j >= i} v_j / (L - i + 1)`.

    Args:
        values: Shape `[L]`.

    Returns:
        Shape `[L]`.

    Examples:
        >>> suffix_means(torch.tensor([1.0, 2.0, 6.0]))
        tensor([3., 4., 6.])
    """
    counts = torch.arange(len(values), 0, -1).to(values)
    return values.flip(0).cumsum(0).flip(0) / counts


def _inner_products(grams: Tensor) -> Tensor:
    flat = grams.flatten(1)
    return flat @ flat.T


def _compared(features: FeatureGrams, batch: Batch) -> list[float]:
    """Inner products between the Gram matrices of every two groups on one batch, row by row."""
    found: list[float] = _inner_products(features.grams(batch)).flatten().tolist()
    return found


def _normalised(products: Tensor) -> Tensor:
    """Divide inner products by the norms; zero where a norm is."""
    norms = products.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return (products * torch.outer(scale, scale)).clamp(0, 1)


def _values(group: Group, share: float) -> dict[str, float]:
    bits = {str(c): c.weight_bits or _FLOAT_BITS for c in group.candidates}
    widest = max(bits.values())
    return {name: share * (widest - width) / 8 for name, width in bits.items()}


def _check_options(beta: float, credit: str) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise FxmpqError(f"beta must be a positive number; found {beta}. 0.3 is the default")
    if credit not in CREDITS:
        raise FxmpqError(f"no credit {credit!r}; there are {', '.join(CREDITS)}")


def _check_samples(batches: Sequence[Batch]) -> None:
    largest = max((batch_samples(batch) for batch in batches), default=0)
    if largest < _FEWEST_SAMPLES:
        raise CalibrationError(
            f"orthogonality compares the samples of a batch and needs at least {_FEWEST_SAMPLES} "
            f"in one; the largest of {len(batches)} batches has {largest}. Give a batch of 32 to "
            "64 samples (and trace the model with a batch of several, if it takes only one size)"
        )
