from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.formats import Precision
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.integer_biases import round_biases
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.state import Layer, copy_graph, require
from fxmpq.graph.switch import switch_group, with_choices
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer

Made = Callable[..., fx.GraphModule]
WIDTH = 6
aten = torch.ops.aten


def rules(width: int | None = WIDTH) -> TargetRules:
    """Hardware that adds the biases of convolutions in integers, those of linear layers not."""
    widths = frozenset({2, 4, 8})
    return TargetRules(
        "integers",
        {
            "conv": OperatorRule(widths, frozenset({8, None}), bias_width=width),
            "linear": OperatorRule(widths, frozenset({8, None})),
        },
        tuple(map(Precision.parse, ("w2a8", "w4a8", "w8a8", "w4"))),
        through=frozenset({aten.max_pool2d.default}),
    )


class Pooled(nn.Module):
    """The second convolution reads codes through a pooling, and has a channel without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.fc = nn.Linear(5, 2)
        with torch.no_grad():
            self.second.weight[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.fc(self.second(pooled).mean((2, 3)))


@pytest.fixture(scope="module")
def batch() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def traced(batch: Tensor) -> fx.GraphModule:
    torch.manual_seed(0)
    return fxmpq.trace(Pooled(), batch)


@pytest.fixture(scope="module")
def graph(traced: fx.GraphModule, batch: Tensor) -> fx.GraphModule:
    prepared = insert_quantizers(traced, rules())
    return fxmpq.calibrate(prepared, [batch], progress=False)


def at(graph: fx.GraphModule, precision: str) -> fx.GraphModule:
    groups = require(graph, stage="calibrated").groups
    return with_choices(graph, {group.name: precision for group in groups})


def layer_names(graph: fx.GraphModule) -> list[str]:
    groups = require(graph, stage="calibrated").groups
    return [layer.name for group in groups for layer in group.layers]


def layer_of(graph: fx.GraphModule, name: str) -> Layer:
    groups = require(graph, stage="calibrated").groups
    return next(layer for group in groups for layer in group.layers if layer.name == name)


def parts(
    graph: fx.GraphModule, name: str
) -> tuple[BiasCorrection, WeightQuantizer, ActivationQuantizer]:
    layer = layer_of(graph, name)
    assert layer.bias_units is not None
    names = (layer.bias_correction, layer.weight_quantizer, layer.bias_units.source)
    found = tuple(graph.get_submodule(str(entry)) for entry in names)
    assert [type(module) for module in found] == [
        BiasCorrection,
        WeightQuantizer,
        ActivationQuantizer,
    ]
    return found  # type: ignore[return-value]


def test_layers_know_the_units_of_their_biases(
    graph: fx.GraphModule, traced: fx.GraphModule
) -> None:
    first, second, fc = (layer_of(graph, name) for name in ("first", "second", "fc"))
    assert first.bias_units is not None
    assert second.bias_units is not None
    assert first.bias_units.source == first.input_quantizer
    assert first.bias_units.width == second.bias_units.width == WIDTH
    assert second.input_quantizer is None
    [reading] = list(graph.graph.find_nodes(op="call_module", target=second.bias_units.source))
    assert [user.target for user in reading.users] == [aten.max_pool2d.default]
    assert fc.bias_units is None
    for group in fxmpq.graph.state.state_of(insert_quantizers(traced, rules(None))).groups:
        assert all(layer.bias_units is None for layer in group.layers)


@pytest.mark.parametrize(("precision", "finer"), [("w2a8", 16), ("w4a8", 4), ("w8a8", 1)])
def test_a_bias_is_the_nearest_whole_number_of_units(
    graph: fx.GraphModule, precision: str, finer: int
) -> None:
    planned = at(graph, precision)
    for name in ("first", "second"):
        correction, weight, source = parts(planned, name)
        assert weight.active is not None
        assert source.active is not None
        bias = get_tensor(planned, f"{name}.bias").detach()
        shift = correction.shift(weight.active)
        assert shift is not None
        units = weight.scale(weight.active).double() * source.ranges["uint8"].scale / finer
        codes = weight.codes(get_tensor(planned, f"{name}.weight").detach(), weight.active)
        for channel, unit in enumerate(units.tolist()):
            real = float(bias[channel].double() + shift[channel].double())
            found = float(correction(bias)[channel])
            if not codes[channel].any():
                assert found == pytest.approx(real, rel=1e-6)
                continue
            assert found == pytest.approx(round(real / unit) * unit, rel=1e-6, abs=1e-3 * unit)


def test_channels_without_weights_are_exact(graph: fx.GraphModule) -> None:
    correction, *_ = parts(at(graph, "w8a8"), "second")
    assert correction.added_rounding is not None
    assert correction.added_rounding[1] == 0
    assert correction.added_rounding.count_nonzero() == 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=4, max_size=4),
)
def test_a_rounding_is_of_half_a_unit_at_most(graph: fx.GraphModule, values: list[float]) -> None:
    planned = copy_graph(at(graph, "w8a8"))
    correction, weight, source = parts(planned, "first")
    assert weight.active is not None
    bias = torch.tensor(values) - correction.shift(weight.active)
    planned.get_submodule("first").bias = nn.Parameter(bias)
    round_biases(planned)
    units = weight.scale(weight.active) * source.ranges["uint8"].scale
    assert correction.added_rounding is not None
    assert bool((correction.added_rounding.abs() <= 0.5001 * units).all())
    before = correction.added_rounding
    round_biases(planned)
    assert torch.equal(correction.added_rounding, before)


@pytest.mark.parametrize("precision", ["w4", "fp32"])
def test_layers_on_real_numbers_add_real_biases(
    traced: fx.GraphModule, batch: Tensor, precision: str
) -> None:
    candidates = [Precision.parse(name) for name in ("w4", "w8a8", "fp32")]
    prepared = insert_quantizers(traced, rules(), candidates=candidates)
    planned = at(fxmpq.calibrate(prepared, [batch], progress=False), precision)
    for name in ("first", "second"):
        assert parts(planned, name)[0].added_rounding is None


def test_ranges_found_at_every_run_and_blocks_have_no_units(
    traced: fx.GraphModule, batch: Tensor
) -> None:
    base = rules()
    operators = {
        kind: replace(
            rule,
            granularities=frozenset({fxmpq.granularity.PerBlock, fxmpq.granularity.PerChannel}),
            dynamic=frozenset({fxmpq.granularity.Dynamic.TENSOR}),
        )
        for kind, rule in base.operators.items()
    }
    free = replace(base, operators=operators)
    candidates = [Precision.parse(name) for name in ("w8a8d", "w8b4a8")]
    prepared = insert_quantizers(traced, free, candidates=candidates)
    calibrated = fxmpq.calibrate(prepared, [batch], progress=False)
    for candidate in candidates:
        correction, *_ = parts(at(calibrated, str(candidate)), "first")
        assert correction.added_rounding is None


def test_a_rounding_is_gone_with_its_precision(graph: fx.GraphModule) -> None:
    planned = at(graph, "w8a8")
    correction, *_ = parts(planned, "first")
    for group in require(planned, stage="calibrated").groups:
        switch_group(planned, group, group.candidate("w4a8"))
    assert correction.added_rounding is None
    again = at(at(graph, "w4a8"), "w8a8")
    found, expected = parts(again, "first")[0], parts(at(graph, "w8a8"), "first")[0]
    assert found.added_rounding is not None
    assert expected.added_rounding is not None
    assert torch.equal(found.added_rounding, expected.added_rounding)


def test_without_integer_biases_nothing_is_rounded(traced: fx.GraphModule, batch: Tensor) -> None:
    prepared = insert_quantizers(traced, rules(None))
    planned = at(fxmpq.calibrate(prepared, [batch], progress=False), "w8a8")
    found = [module for module in planned.modules() if isinstance(module, BiasCorrection)]
    assert len(found) == 3
    assert all("rounding" not in module.state_dict() for module in found)


def test_a_layer_without_a_bias_rounds_its_shift(batch: Tensor) -> None:
    torch.manual_seed(0)
    traced = fxmpq.trace(nn.Conv2d(3, 4, 3, bias=False), batch)
    prepared = insert_quantizers(traced, rules())
    for is_corrected in (True, False):
        calibrated = fxmpq.calibrate(
            prepared, [batch], bias_correction=is_corrected, progress=False
        )
        [correction] = [
            module
            for module in at(calibrated, "w4a8").modules()
            if isinstance(module, BiasCorrection)
        ]
        assert (correction.added_rounding is not None) == is_corrected


@pytest.mark.parametrize("precision", ["w8a8", "w8ta8"])
def test_groups_of_a_transposed_convolution_share_units(precision: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(2, 4, 5, 5)
    traced = fxmpq.trace(nn.ConvTranspose2d(4, 6, 3, groups=2), batch)
    legal = frozenset({fxmpq.granularity.PerTensor, fxmpq.granularity.PerChannel})
    rule = OperatorRule(frozenset({8}), frozenset({8}), granularities=legal, bias_width=0)
    wanted = (Precision.parse(precision),)
    prepared = insert_quantizers(traced, TargetRules("integers", {"conv_transpose": rule}, wanted))
    planned = at(fxmpq.calibrate(prepared, [batch], progress=False), precision)
    correction, weight, source = parts(planned, layer_names(planned)[0])
    assert weight.active is not None
    units = weight.scale(weight.active).double() * source.ranges["uint8"].scale
    steps = correction(get_tensor(planned, "bias").detach()).double() / units.expand(3).repeat(2)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-2)


def test_refining_rounds_again(graph: fx.GraphModule, batch: Tensor) -> None:
    planned = at(graph, "w4a8")
    refined = fxmpq.refine(planned, None, [batch], method="gptq", progress=False)
    again = copy_graph(refined)
    round_biases(again)
    for name in ("first", "second"):
        found, before = parts(refined, name)[0], parts(planned, name)[0]
        assert found.added_rounding is not None
        assert before.added_rounding is not None
        assert torch.equal(found.added_rounding, parts(again, name)[0].added_rounding)
        assert not torch.equal(found.added, before.added)


def test_units_and_roundings_are_stored(
    graph: fx.GraphModule, batch: Tensor, tmp_path: Path
) -> None:
    planned = at(graph, "w4a8")
    loaded = fxmpq.load(fxmpq.save(planned, tmp_path))
    assert layer_of(loaded, "second").bias_units == layer_of(planned, "second").bias_units
    assert torch.equal(loaded(batch), planned(batch))
    assert torch.equal(parts(loaded, "first")[0].added, parts(planned, "first")[0].added)
