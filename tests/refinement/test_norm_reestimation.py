from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.errors import FxmpqError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.quantizers.modules import WeightQuantizer
from fxmpq.refinement.channel_statistics import channel_statistics
from fxmpq.refinement.norm_reestimation import MATCHES, norm_reestimation, scale_channels
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk

Subject = Any


def reestimate(
    graph: fx.GraphModule, batches: list, **options: str
) -> tuple[fx.GraphModule, list[Refinement]]:
    changed = copy_graph(graph)
    with torch.no_grad():
        return changed, norm_reestimation(changed, batches, units=Units(), **options)


def quantizers(graph: fx.GraphModule) -> dict[str, WeightQuantizer]:
    return {name: m for name, m in graph.named_modules() if isinstance(m, WeightQuantizer)}


def planned_linear(plan_of: Callable, weight: Tensor, precision: str = "w4a8") -> tuple:
    """One linear layer without a bias, and its only weight quantizer."""
    model = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    batches = [torch.randn(n, weight.shape[1], generator=GENERATOR) + 0.5 for n in (40, 30)]
    subject = plan_of(model, batches, (precision,))
    graph = copy_graph(subject.planned)
    [quantizer] = quantizers(graph).values()
    return graph, quantizer, batches


GENERATOR = torch.Generator().manual_seed(0)
INT4 = NumberFormat(4)


@pytest.mark.parametrize("match", MATCHES)
def test_codes_stay_and_means_become_the_float_ones(subject: Subject, match: str) -> None:
    before = {name: q for name, q in quantizers(subject.planned).items() if q.active}
    changed, done = reestimate(subject.planned, subject.batches, match=match)
    after = quantizers(changed)
    found = iter(done)
    for view in Walk(changed, subject.batches).layers():
        old, new = before[view.layer.weight_quantizer], after[view.layer.weight_quantizer]
        codes = old.codes(view.weight, view.number_format)
        assert torch.equal(codes, new.codes(view.weight, view.number_format))
        if view.correction is None:
            continue
        statistics = channel_statistics(view)
        size = (statistics.mean.square() + statistics.variance).sum().sqrt()
        assert float(statistics.error_mean.abs().max()) <= 1e-5 * float(size)
        ratio = new.scale(view.number_format) / old.scale(view.number_format)
        assert float(ratio.min()) > 0.249
        assert float(ratio.max()) < 4.001
        entry = next(found)
        assert (entry.method, entry.layer) == ("norm_reestimation", view.layer.name)
        assert entry.after == pytest.approx(view.error(), rel=1e-3, abs=1e-9)
        if match == "regression":
            assert entry.after <= entry.before
    assert next(found, None) is None


def test_regression_is_the_least_squares_line(plan_of: Callable) -> None:
    graph, quantizer, batches = planned_linear(plan_of, torch.randn(5, 6, generator=GENERATOR))
    scale = quantizer.scale(INT4).clone()
    with torch.no_grad():
        found = torch.cat([graph(batch) for batch in batches]).double()
        weight = next(iter(graph.parameters())).detach()
        expected = torch.cat([batch @ weight.T for batch in batches]).double()
        norm_reestimation(graph, batches, units=Units())
        after = torch.cat([graph(batch) for batch in batches]).double()
    for channel in range(5):
        columns = torch.stack([found[:, channel], torch.ones(len(found))], dim=1)
        line = torch.linalg.lstsq(columns, expected[:, channel]).solution
        factor = float(quantizer.scale(INT4)[channel] / scale[channel])
        assert factor == pytest.approx(float(line[0]), rel=1e-4)
        assert torch.allclose(after[:, channel], columns @ line, atol=1e-5)


def test_deviation_gives_every_channel_its_float_spread(subject_of: Callable) -> None:
    subject = subject_of("conv")
    changed, _ = reestimate(subject.planned, subject.batches, match="deviation")
    for view in Walk(changed, subject.batches).layers():
        statistics = channel_statistics(view)
        assert torch.allclose(statistics.quantized_variance, statistics.variance, rtol=1e-3)


def test_a_scale_that_is_wrong_is_found_again(plan_of: Callable) -> None:
    graph, quantizer, batches = planned_linear(plan_of, torch.randn(4, 6, generator=GENERATOR))
    weight = next(iter(graph.parameters())).detach()
    quantizer.set_codes(INT4, quantizer.codes(weight, INT4))
    right = quantizer.scale(INT4).clone()
    quantizer.set_scale(INT4, right * torch.tensor([0.5, 1.0, 2.0, 1e-3]))
    [entry] = reestimate(graph, batches)[1]
    changed, _ = reestimate(graph, batches)
    [found] = quantizers(changed).values()
    assert torch.allclose(found.scale(INT4)[:3], right[:3], rtol=0.02)
    # No factor is larger than 4.
    assert float(found.scale(INT4)[3] / right[3]) == pytest.approx(4e-3, rel=1e-4)
    assert entry.after < 0.5 * entry.before


def test_a_dead_channel_keeps_its_scale(plan_of: Callable) -> None:
    weight = torch.randn(3, 6, generator=GENERATOR)
    weight[1] = 0
    graph, quantizer, batches = planned_linear(plan_of, weight)
    before = quantizer.scale(INT4).clone()
    norm_reestimation(graph, batches, units=Units())
    after = quantizer.scale(INT4)
    assert after[1] == before[1]
    assert torch.isfinite(after).all()
    assert (after[[0, 2]] != before[[0, 2]]).all()


@pytest.mark.parametrize("precision", ["w4ta8", "w4b4a8", "we2m1b16", "we2m1b32", "we4m3"])
def test_scales_of_every_granularity(plan_of: Callable, precision: str) -> None:
    graph, quantizer, batches = planned_linear(
        plan_of, torch.randn(4, 64, generator=GENERATOR), precision
    )
    found = Precision.parse(precision).weight
    assert found is not None
    before = quantizer.scale(found).clone()
    weight = next(iter(graph.parameters())).detach()
    codes = quantizer.codes(weight, found)
    [entry] = norm_reestimation(graph, batches, units=Units())
    assert entry.after <= entry.before
    assert torch.equal(quantizer.codes(weight, found), codes)
    ratio = quantizer.scale(found) / before
    if precision in ("w4b4a8", "we4m3"):
        assert (ratio != 1).any()
        assert torch.allclose(
            ratio, ratio.reshape(4, -1)[:, :1].reshape(4, *[1] * (ratio.dim() - 1))
        )
    else:
        assert (ratio == 1).all()


def test_a_weight_that_is_called_twice_is_scaled_once(subject_of: Callable) -> None:
    subject = subject_of("tied")
    before = quantizers(subject.planned)
    changed = copy_graph(subject.planned)
    for view in Walk(changed, subject.batches).layers():
        if view.layer.name == "twice":
            moments = channel_statistics(view)
            wanted = (moments.variance + moments.error_covariance) / moments.quantized_variance
            name, number_format = str(view.layer.weight_quantizer), view.number_format
    changed, done = reestimate(subject.planned, subject.batches)
    assert {"twice", "twice#2"} <= {entry.layer for entry in done}
    after = quantizers(changed)[name].scale(number_format)
    ratio = after.double() / before[name].scale(number_format)
    assert torch.allclose(ratio, wanted, rtol=1e-5)


def test_scaling_channels_multiplies_rows_and_says_so() -> None:
    weight = torch.randn(2, 4, generator=GENERATOR)
    quantizer = WeightQuantizer("w", [INT4], axis=0)
    quantizer.set_scale(INT4, torch.tensor([0.1, 0.2]))
    before = quantizer.quantize(weight, INT4)
    assert scale_channels(quantizer, weight, INT4, torch.tensor([2.0, 0.5]))
    after = quantizer.quantize(weight, INT4)
    assert torch.allclose(after, before * torch.tensor([[2.0], [0.5]]))


def test_scales_that_groups_share_are_left() -> None:
    # A transposed convolution of two groups: four output channels, two scales.
    weight = torch.randn(6, 2, 3, generator=GENERATOR)
    quantizer = WeightQuantizer("w", [INT4], axis=1)
    quantizer.set_scale(INT4, torch.tensor([0.1, 0.2]))
    assert not scale_channels(quantizer, weight, INT4, torch.tensor([2.0, 0.5, 1.0, 1.0]))
    assert quantizer.scale(INT4).tolist() == pytest.approx([0.1, 0.2])
    assert scale_channels(quantizer, weight, INT4, torch.tensor([2.0, 0.5]))
    assert quantizer.scale(INT4).tolist() == pytest.approx([0.2, 0.1])


def test_an_unknown_match_is_refused(subject_of: Callable) -> None:
    subject = subject_of("conv")
    with pytest.raises(FxmpqError, match="'variance'.*regression or deviation"):
        reestimate(subject.planned, subject.batches, match="variance")
