"""Probes: the random output directions of the projected estimator, a stream for every sample."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmpq.errors import FxmpqError

_STREAMS = 2**64
"""Seeds and sample numbers are the two halves of a counter-based generator's key."""

_ALIGNED = 1e-6
"""Below this squared length a reflection is ill-conditioned; the output lies on the axis anyway."""


def most_probes(width: int) -> int:
    """How many probes of one sample make its estimate exact: the next power of two.

    Args:
        width: Output values of a sample, at least 1.

    Examples:
        >>> [most_probes(width) for width in (1, 2, 10, 1000)]
        [1, 2, 16, 1024]
    """
    return 1 << (width - 1).bit_length()


def check_probes(probes: int, seed: int, first_sample: int) -> None:
    """Refuse numbers that no stream of probes has.

    Args:
        probes: Random directions per sample.
        seed: Of all streams.
        first_sample: Number of the first sample.

    Raises:
        FxmpqError: If there is no probe, or the seed or sample number is outside 0..2**64 - 1.
    """
    if probes < 1:
        raise FxmpqError(f"probes={probes}; at least one random direction per sample is needed")
    for name, value in (("seed", seed), ("first_sample", first_sample)):
        if not 0 <= value < _STREAMS:
            raise FxmpqError(f"{name}={value}; it must lie between 0 and 2**64 - 1")


def draw_probes(outputs: Tensor, probes: int, *, seed: int, first_sample: int = 0) -> Tensor:
    """Draw directions `v` with `E[v v^T] = I` for every sample, orthogonal to one another.

    For outputs of width `d`, the probes of sample `n` are `v_r = R_n (s * h_r)[:d]`: rows `h_r`
    of a Hadamard matrix of order `P`, the next power of two, chosen without replacement; one
    vector `s` of random signs; and the reflection `R_n` that puts the first axis on the
    sample's own output `y_n`. Each `v_r` alone is a vector of independent signs in an
    orthonormal basis, so `E[(v_r^T e)^2] = ||e||^2` for every `e`. All `P` of them have
    `sum_r v_r v_r^T = P I`: then the estimate is exact.

    A vector of signs estimates `||e||^2` with variance `2 (||e||^4 - sum_k e_k^4)`, where `e_k`
    are the coordinates in the basis: none for an error along an axis. Networks err along their
    output more than along a coordinate: two logits that mirror each other lie on one axis of
    the reflected basis, but at 45 degrees to the coordinates, where the variance is largest.

    Signs and rows come from a counter-based stream of the sample (Philox, keyed with the seed
    and the sample's number), so they do not depend on how samples are split into batches or
    over processes. The first probes of a sample do not depend on how many follow.

    Args:
        outputs: Float outputs, `[samples, width]`.
        probes: Directions per sample; at most `most_probes(width)` are drawn.
        seed: Of all streams.
        first_sample: Number of the first sample.

    Returns:
        Shape `[probes, samples, width]`, in the outputs' dtype and on their device.

    Examples:
        >>> vectors = draw_probes(torch.tensor([[2.0, -2.0]]), 2, seed=0)
        >>> torch.allclose(vectors[:, 0].T @ vectors[:, 0], 2 * torch.eye(2))
        True
    """
    samples, width = outputs.shape
    kept = min(probes, most_probes(width))
    signs = np.empty((kept, samples, width))
    for sample in range(samples):
        signs[:, sample] = _signs(width, kept, seed, first_sample + sample)
    found = torch.from_numpy(signs)
    return _reflected(found, outputs.detach().double().cpu()).to(outputs)


def _signs(width: int, probes: int, seed: int, sample: int) -> NDArray[np.int8]:
    """Sign-flipped rows of a Hadamard matrix, cut to `width` columns: `[probes, width]`."""
    stream = np.random.Philox(key=np.array([seed, sample], dtype=np.uint64))
    words = stream.random_raw(-(-width // 64)).astype("<u8")
    flips = np.unpackbits(words.view(np.uint8), count=width).astype(np.int8)
    columns = np.arange(width, dtype=np.uint64)
    rows = _distinct(stream, probes, most_probes(width))
    # A Hadamard matrix of order 2^m has the entries (-1)^popcount(row & column).
    parity = np.stack([_parity(columns & row) for row in rows])
    signs: NDArray[np.int8] = 1 - 2 * (parity ^ flips)
    return signs


def _distinct(stream: np.random.Philox, count: int, order: int) -> list[np.uint64]:
    """Draw `count` different numbers below `order`, a power of two."""
    found: dict[np.uint64, None] = {}
    while len(found) < count:
        found[np.uint64(stream.random_raw()) & np.uint64(order - 1)] = None
    return list(found)


def _parity(values: NDArray[np.uint64]) -> NDArray[np.int8]:
    """Whether an odd number of bits is set."""
    for shift in (32, 16, 8, 4, 2, 1):
        values = values ^ (values >> np.uint64(shift))
    odd: NDArray[np.int8] = (values & np.uint64(1)).astype(np.int8)
    return odd


def _reflected(signs: Tensor, outputs: Tensor) -> Tensor:
    """Reflect `[probes, samples, width]` so that each sample's first axis is its output.

    The mirror stands between the first axis and the reverse of the output's direction; an
    output that lies there already, or is zero, leaves the coordinates as they are.
    """
    lengths = outputs.norm(dim=1, keepdim=True)
    normal = outputs / lengths.clamp_min(torch.finfo(outputs.dtype).tiny)
    normal[:, 0] += 1
    squared = normal.square().sum(dim=1)
    moves = (lengths[:, 0] > 0) & (squared > _ALIGNED)
    scale = torch.where(moves, 2 / squared.clamp_min(_ALIGNED), torch.zeros_like(squared))
    along = torch.einsum("pnd,nd->pn", signs, normal) * scale
    reflected: Tensor = signs - along.unsqueeze(2) * normal
    return reflected
