from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.sensitivity import entropy as module
from fxmpq.sensitivity.entropy import code_entropy, entropy

Planned = Callable[..., fx.GraphModule]
TWO = [Precision(2, 8), Precision(4, 8)]
CODES = st.lists(st.integers(-8, 7), min_size=1, max_size=60)


@given(CODES)
def test_equals_scipy(codes: list[int]) -> None:
    counts = np.bincount(np.array(codes) + 8)
    expected = scipy.stats.entropy(counts, base=2)
    assert code_entropy(torch.tensor(codes), -8, 7) == pytest.approx(expected, abs=1e-12)


@given(CODES)
def test_order_repetition_and_names_of_codes_do_not_matter(codes: list[int]) -> None:
    expected = code_entropy(torch.tensor(codes), -8, 7)
    mirrored = torch.tensor([-1 - code for code in reversed(codes)] * 3)
    assert code_entropy(mirrored, -8, 7) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_uniform_codes_have_as_many_bits_as_the_format(bits: int) -> None:
    chosen = NumberFormat(bits)
    codes = torch.arange(chosen.qmin, chosen.qmax + 1).reshape(2, -1)
    assert code_entropy(codes, chosen.qmin, chosen.qmax) == pytest.approx(bits)


def test_equal_codes_have_none() -> None:
    assert code_entropy(torch.full((3, 4), -2, dtype=torch.int8), -2, 1) == 0


def test_codes_of_a_gaussian_have_its_differential_entropy() -> None:
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    step = 0.05
    expected = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(step)
    assert code_entropy((weight / step).round().long(), -128, 127) == pytest.approx(
        expected, abs=5e-3
    )


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-8, 8, (7, 11), generator=torch.Generator().manual_seed(0))
    whole = code_entropy(codes, -8, 7)
    monkeypatch.setattr(module, "_COUNTED_AT_ONCE", 10)
    assert code_entropy(codes, -8, 7) == whole


def test_codes_must_exist_and_fit() -> None:
    with pytest.raises(FxmpqError, match="no codes"):
        code_entropy(torch.zeros(0, dtype=torch.int8), -2, 1)
    with pytest.raises(FxmpqError, match=r"codes lie in \[-2, 2\]; expected \[-2, 1\]"):
        code_entropy(torch.tensor([-2, 2]), -2, 1)
    with pytest.raises(FxmpqError, match=r"codes lie in \[-3, 0\]"):
        code_entropy(torch.tensor([-3, 0]), -2, 1)


def expected_entropy(graph: fx.GraphModule, layer: str, bits: int, scales: str) -> float:
    """From the weight, with numpy."""
    weight = graph.get_parameter(f"{layer}.weight").detach()
    chosen = NumberFormat(bits)
    rows = weight.flatten(1) if scales == "channel" else weight.reshape(1, -1)
    (scale,) = mse_weight_scales(rows, [chosen], 0)
    codes = np.clip(np.round((rows / scale[:, None]).numpy()), chosen.qmin, chosen.qmax)
    _, counts = np.unique(codes, return_counts=True)
    return float(scipy.stats.entropy(counts, base=2))


@pytest.fixture(scope="module")
def two_widths(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> fx.GraphModule:
    return calibrated(conv_graph, images, candidates=TWO)


@pytest.mark.parametrize("scales", ["tensor", "channel"])
@pytest.mark.parametrize("gain", ["entropy", "difference"])
def test_two_widths_and_linked_layers(two_widths: fx.GraphModule, gain: str, scales: str) -> None:
    found = entropy(two_widths, [], gain=gain, scales=scales)
    assert (found.method, found.unit, found.projections) == ("entropy", "score", None)
    assert found.fingerprint == require(two_widths, stage="calibrated").fingerprint
    members = {"conv1": ["conv1", "downsample.0"]}
    for group, row in found.values.items():
        layers = members.get(group, [group])
        value = sum(expected_entropy(two_widths, name, 4, scales) for name in layers)
        if gain == "difference":
            value -= sum(expected_entropy(two_widths, name, 2, scales) for name in layers)
        assert row == pytest.approx({"w2a8": value, "w4a8": 0.0}, rel=1e-9)


def test_defaults_are_the_difference_on_one_grid_a_weight(two_widths: fx.GraphModule) -> None:
    found = entropy(two_widths, [])
    assert found.values == entropy(two_widths, [], gain="difference", scales="tensor").values
    assert found.values != entropy(two_widths, [], gain="difference", scales="channel").values


def test_more_widths_telescope(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    wanted = [Precision(2, 8), Precision(4, 4), Precision(4, 8), Precision(8, 8), Precision()]
    graph = calibrated(conv_graph, images, candidates=wanted)
    row = entropy(graph, images).values["fc"]
    bits = {width: expected_entropy(graph, "fc", width, "tensor") for width in (2, 4, 8)}
    expected = {"w2a8": bits[8] - bits[2], "w4a4": bits[8] - bits[4], "w8a8": 0.0, "fp32": 0.0}
    assert row == pytest.approx({**expected, "w4a8": expected["w4a4"]}, rel=1e-9)
    with pytest.raises(FxmpqError, match=r"'stem\.0' has 3: 2, 4, 8"):
        entropy(graph, images, gain="entropy")


def test_formats_of_one_width_have_entropies_of_their_own(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    names = ["w4a8", "w4b8a8", "we2m1a8", "w8a8", "we4m3a8"]
    graph = calibrated(conv_graph, images, candidates=[Precision.parse(name) for name in names])
    row = entropy(graph, []).values["fc"]
    assert (row["w8a8"], row["we4m3a8"]) == (0.0, 0.0)
    # One step for the whole weight leaves no blocks.
    assert row["w4a8"] == row["w4b8a8"] != row["we2m1a8"]
    pooled = entropy(graph, [], scales="channel").values["fc"]
    assert len({pooled[name] for name in names[:3]}) == 3
    weight = graph.get_parameter("fc.weight").detach()
    quantizer = graph.get_submodule("quantizers.weight_fc_weight")
    assert isinstance(quantizer, WeightQuantizer)
    held = {}
    for name in ("we2m1", "we4m3"):
        number_format = Precision.parse(name).weight
        assert number_format is not None
        spread = quantizer.spread_scale(weight, number_format)
        # Numbers rather than bit patterns: -0 and 0 are one.
        numbers = quantizer.quantize(weight, number_format) / spread
        _, counts = np.unique(numbers.round(decimals=4).numpy() + 0.0, return_counts=True)
        held[name] = float(scipy.stats.entropy(counts, base=2))
    assert pooled["we2m1a8"] == pytest.approx(held["we4m3"] - held["we2m1"], rel=1e-9)


def test_pinned_and_excluded_groups_lose_nothing(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    graph = calibrated(
        conv_graph, images, candidates=TWO, exclude=["fc"], keep={"stem.0": Precision(8, 8)}
    )
    for gain in ("entropy", "difference"):
        found = entropy(graph, [], gain=gain)
        assert found.values["fc"] == {"fp32": 0.0}
        assert found.values["stem.0"] == {"w8a8": 0.0}
        assert found.value("conv2", "w2a8") > 0


class Twice(nn.Module):
    """A layer called twice, one of ternary weights and one of Gaussian weights."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.ternary, self.dense = (nn.Linear(16, 16) for _ in range(3))
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(-1, 2, (16, 16), generator=generator).float()
        with torch.no_grad():
            self.ternary.weight.copy_(signs)
            self.dense.weight.copy_(torch.randn(16, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(x).relu()).relu()
        return self.dense(self.ternary(x).relu())


def test_a_weight_counts_once_and_few_codes_score_low(calibrated: Planned) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    graph = calibrated(trace(Twice().eval(), x), [x], candidates=TWO)
    found = entropy(graph, [], gain="entropy")
    assert len(require(graph, stage="calibrated").group("again").layers) == 2
    once = expected_entropy(graph, "again", 4, "tensor")
    assert found.value("again", "w2a8") == pytest.approx(once, rel=1e-9)
    assert found.value("ternary", "w2a8") <= math.log2(3)
    assert found.value("dense", "w2a8") > 3
    # Ternary weights lose nothing at two bits.
    assert entropy(graph, []).value("ternary", "w2a8") == pytest.approx(0, abs=1e-9)


def test_bad_options_and_graphs_are_errors(
    two_widths: fx.GraphModule, conv_graph: fx.GraphModule
) -> None:
    with pytest.raises(FxmpqError, match="no gain 'sum'; there are difference, entropy"):
        entropy(two_widths, [], gain="sum")
    with pytest.raises(FxmpqError, match="no scales 'row'; there are tensor, channel"):
        entropy(two_widths, [], scales="row")
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        entropy(conv_graph, [])
