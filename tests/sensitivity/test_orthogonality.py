from __future__ import annotations

import itertools
import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.errors import CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.journal import Journal
from fxmpq.sensitivity.features import FeatureGrams
from fxmpq.sensitivity.orthogonality import (
    importance,
    orm,
    orm_of_grams,
    orthogonality,
    suffix_means,
)
from fxmpq.work import Work

Planned = Callable[..., fx.GraphModule]
CANDIDATES = [Precision.parse(name) for name in ("w2a8", "w4a4", "w4a8", "w8a8")]
SEEDS = st.integers(0, 2**31)


def draw(seed: int, samples: int, *widths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(samples, width, generator=generator).double() for width in widths]


def hsic(one: Tensor, two: Tensor) -> Tensor:
    """Biased HSIC of two kernels, centred by its definition."""
    center = torch.eye(len(one)).double() - 1 / len(one)
    return torch.trace(one @ center @ two @ center)


@given(SEEDS, st.integers(3, 8), st.lists(st.integers(1, 7), min_size=2, max_size=4))
def test_equals_the_frobenius_norms_of_feature_products(
    seed: int, samples: int, widths: list[int]
) -> None:
    found = draw(seed, samples, *widths)
    for center in (True, False):
        seen = [f - f.mean(0) for f in found] if center else found
        expected = [
            [(g.T @ f).norm() ** 2 / ((f.T @ f).norm() * (g.T @ g).norm()) for g in seen]
            for f in seen
        ]
        torch.testing.assert_close(
            orm(found, center=center), torch.tensor(expected).double(), rtol=1e-6, atol=1e-6
        )


@given(SEEDS, st.integers(3, 8))
def test_centred_is_linear_cka(seed: int, samples: int) -> None:
    one, two = draw(seed, samples, 3, 5)
    k, l_ = one @ one.T, two @ two.T
    expected = hsic(k, l_) / torch.sqrt(hsic(k, k) * hsic(l_, l_))
    assert float(orm([one, two])[0, 1]) == pytest.approx(float(expected), rel=1e-9)


@given(SEEDS, st.booleans(), st.floats(1e-3, 1e3))
def test_rotations_and_scales_of_a_feature_change_nothing(
    seed: int, center: bool, scale: float
) -> None:
    one, two, turn = draw(seed, 6, 4, 4, 6)
    rotation = torch.linalg.qr(turn[:4, :4]).Q
    expected = orm([one, two], center=center)
    torch.testing.assert_close(orm([scale * one @ rotation, two], center=center), expected)


@given(SEEDS, st.booleans())
def test_is_symmetric_between_0_and_1_with_ones_on_the_diagonal(seed: int, center: bool) -> None:
    found = orm(draw(seed, 5, 1, 2, 9), center=center)
    torch.testing.assert_close(found, found.T, rtol=1e-12, atol=1e-15)
    assert found.min() >= 0
    assert found.max() <= 1
    torch.testing.assert_close(found.diagonal(), torch.ones(3).double())


def test_features_of_orthogonal_samples_have_none_and_shifts_need_centring() -> None:
    one, two = torch.tensor([[1.0], [-1.0], [0.0], [0.0]]), torch.tensor([[0.0], [0], [1], [-1]])
    assert orm([one, two])[0, 1] == 0
    assert orm([one, two + 5])[0, 1] == 0
    assert orm([one + 5, two + 5], center=False)[0, 1] > 0.9


def test_a_feature_without_variation_resembles_none() -> None:
    (one,) = draw(0, 4, 3)
    found = orm([one, torch.ones(4, 2), torch.zeros(4, 1)])
    assert found[0].tolist() == pytest.approx([1, 0, 0])
    assert found[1:].abs().max() == 0


def test_importance_is_the_published_one_up_to_a_factor() -> None:
    matrix = orm(draw(0, 8, 3, 4, 5, 6))
    gamma = [sum(float(matrix[i, j]) for j in range(4) if j != i) for i in range(4)]
    published = np.exp([-2.0 * entry for entry in gamma])
    found = importance(matrix, 2.0).numpy()
    np.testing.assert_allclose(found, published / published.max(), rtol=1e-12)


def test_importance_counts_the_others_only() -> None:
    matrix = orm([torch.ones(4, 2), *draw(0, 4, 3, 5)])
    expected = [1.0, *[math.exp(-float(matrix[1, 2]))] * 2]
    assert importance(matrix, 1.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("beta", [100.0, 1e6])
def test_a_large_beta_cannot_make_every_importance_vanish(beta: float) -> None:
    matrix = 0.9 + 0.1 * torch.eye(60).double()
    matrix[0, 1:] = matrix[1:, 0] = 0.85
    assert math.exp(-beta * 0.85 * 59) == 0
    assert importance(matrix, beta)[0] == 1


def test_a_tiny_beta_makes_all_importance_equal() -> None:
    matrix = orm(draw(0, 8, 3, 4, 5))
    np.testing.assert_allclose(importance(matrix, 1e-9), np.ones(3), atol=1e-8)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_suffix_means(values: list[float]) -> None:
    expected = [np.mean(values[index:]) for index in range(len(values))]
    found = suffix_means(torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.fixture(scope="module")
def graph(conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned) -> fx.GraphModule:
    return calibrated(conv_graph, images, candidates=CANDIDATES)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("credit", ["suffix", "own"])
def test_values_from_the_modules_own_features(
    conv_net: nn.Module, graph: fx.GraphModule, images: list[Tensor], center: bool, credit: str
) -> None:
    net, x = conv_net, images[0]
    with torch.no_grad():
        stem = net.stem(x)
        pooled = net.pool(stem)
        inner, shortcut = torch.relu(net.bn1(net.conv1(pooled))), net.downsample(pooled)
        block = torch.relu(net.bn2(net.conv2(inner)) + shortcut)
        both = torch.cat([inner, shortcut], dim=1)
        features = [part.flatten(1).double() for part in (stem, both, block, net(x))]
    gamma = orm(features, center=center).sum(1) - 1
    shares = torch.exp(-0.7 * (gamma - gamma.min())).tolist()
    if credit == "suffix":
        shares = [sum(shares[index:]) / (4 - index) for index in range(4)]
    found = orthogonality(graph, [x], center=center, beta=0.7, credit=credit)
    assert (found.method, found.unit, found.projections) == ("orthogonality", "score", None)
    assert found.fingerprint == require(graph, stage="calibrated").fingerprint
    for share, row in zip(shares, found.values.values(), strict=True):
        expected = {"w2a8": 0.75 * share, "w4a4": 0.5 * share, "w4a8": 0.5 * share, "w8a8": 0}
        assert row == pytest.approx(expected, rel=1e-4)


def test_batches_count_as_one_gram_with_zeros_between(
    graph: fx.GraphModule, images: list[Tensor]
) -> None:
    batches = [images[0], images[1][:4], images[1][4:5]]
    grams = FeatureGrams(graph)
    parts = [grams.grams(batch) for batch in batches]
    blocks = [torch.block_diag(*matrices) for matrices in zip(*parts, strict=True)]
    shares = importance(orm_of_grams(torch.stack(blocks)), 0.3).tolist()
    found = orthogonality(graph, batches, credit="own")
    values = [row["w2a8"] for row in found.values.values()]
    assert values == pytest.approx([0.75 * share for share in shares], rel=1e-9)
    one_batch = orthogonality(graph, images[:1], credit="own").values["conv2"]["w2a8"]
    assert values[2] != pytest.approx(one_batch, rel=1e-3)


def test_least_sum_is_most_credited_bytes(graph: fx.GraphModule, images: list[Tensor]) -> None:
    groups = require(graph, stage="calibrated").groups
    found = orthogonality(graph, images)
    credit = [found.value(group.name, "w2a8") / 0.75 for group in groups]
    weights = [sum(math.prod(layer.weight_shape) for layer in g.layers) for g in groups]
    scored = []
    for choice in itertools.product((2, 4, 8), repeat=len(groups)):
        size = sum(count * bits for count, bits in zip(weights, choice, strict=True))
        names = [f"w{bits}a8" for bits in choice]
        loss = sum(found.value(g.name, name) for g, name in zip(groups, names, strict=True))
        gain = sum(c * bits / 8 for c, bits in zip(credit, choice, strict=True))
        assert loss + gain == pytest.approx(sum(credit))
        scored.append((size, loss, gain, choice))
    for budget in (2.2, 3.0, 5.0, 7.0):
        fitting = [entry for entry in scored if entry[0] <= budget * sum(weights)]
        assert min(fitting, key=lambda e: e[1])[3] == max(fitting, key=lambda e: e[2])[3]


def test_float_counts_32_bits_and_excluded_groups_take_part(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned, graph: fx.GraphModule
) -> None:
    wanted = [Precision(8, 8), Precision()]
    partly = calibrated(conv_graph, images, candidates=wanted, exclude=["stem.0"])
    found = orthogonality(partly, images)
    assert found.values["stem.0"] == {"fp32": 0.0}
    whole = orthogonality(graph, images)
    for name in ("conv1", "conv2", "fc"):
        assert found.value(name, "fp32") == 0
        share = whole.value(name, "w2a8") / 0.75
        assert found.value(name, "w8a8") == pytest.approx(3 * share)


def test_the_graph_is_unchanged_and_answers_are_bit_identical(
    graph: fx.GraphModule, images: list[Tensor]
) -> None:
    before = run_batch(graph, images[0])[0]
    found = orthogonality(graph, images)
    with torch.inference_mode():
        assert orthogonality(graph, images).values == found.values
    assert torch.equal(run_batch(graph, images[0])[0], before)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(graph: fx.GraphModule, images: list[Tensor], beta: float) -> None:
    with pytest.raises(FxmpqError, match="beta must be a positive number"):
        orthogonality(graph, images, beta=beta)


def test_unknown_credit(graph: fx.GraphModule, images: list[Tensor]) -> None:
    with pytest.raises(FxmpqError, match="no credit 'prefix'; there are suffix, own"):
        orthogonality(graph, images, credit="prefix")


def test_few_samples_are_an_error(graph: fx.GraphModule, images: list[Tensor]) -> None:
    with pytest.raises(CalibrationError, match="largest of 3 batches has 2"):
        orthogonality(graph, list(images[0].split(2)))
    assert orthogonality(graph, [images[0][:3]]).values


def test_an_uncalibrated_graph_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        orthogonality(conv_graph, images)


def test_an_interrupted_measurement_goes_on(
    calibrated: Planned, conv_graph: fx.GraphModule, images: list[Tensor], tmp_path: Path
) -> None:
    """To the last bit; a batch that is recorded is not run again."""
    graph = calibrated(conv_graph, images)
    journal = tmp_path / "journal"
    expected = orthogonality(graph, images)
    orthogonality(graph, images[:1], work=Work(journal=Journal(journal, {})))
    wrong = [torch.full_like(images[0], torch.nan), *images[1:]]
    found = orthogonality(graph, wrong, work=Work(journal=Journal(journal, {})))
    assert found.values == expected.values


def test_mappings_that_torch_does_not_know_have_samples(
    calibrated: Planned, bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    """As tokenizers return."""
    graph = calibrated(bert_graph, token_batches)
    long = [{name: x.repeat(3, 1) for name, x in batch.items()} for batch in token_batches]
    found = orthogonality(graph, [UserDict(batch) for batch in long])
    assert found.values == orthogonality(graph, long).values
