from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.calibration.calibrate import calibrate, mean_output
from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.formats import NumberFormat, Precision, Scheme
from fxmpq.graph.attributes import get_tensor
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import copy_graph, require, state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.histogram import StreamingHistogram
from fxmpq.quantizers.means import MeanInput
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import RANGES, ActivationRange
from fxmpq.quantizers.weight_scale import mse_weight_scales
from fxmpq.targets.reference import REFERENCE

LAYERS = {
    "conv2d": (nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "padded": (nn.Conv2d(3, 4, 3, padding=2), (3, 7, 6)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, padding=1), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), (4, 5, 5)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding=1), (3, 7, 6)),
    "same": (nn.Conv2d(3, 4, (3, 2), padding="same"), (3, 7, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (3, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2, padding=1, bias=False), (2, 4, 4, 3)),
    "linear": (nn.Linear(6, 4), (6,)),
    "linear over positions": (nn.Linear(6, 4, bias=False), (5, 6)),
}


def data(shape: tuple[int, ...]) -> list[Tensor]:
    """Uneven batches whose mean is far from zero and differs by position."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator)
    return [mean + torch.randn(n, *shape, generator=generator) for n in (5, 2, 3)]


def channel_means(graph: fx.GraphModule, batches: list[Tensor], axis: int) -> Tensor:
    outputs = torch.cat([run_batch(graph, batch)[0] for batch in batches])
    return outputs.movedim(axis, 0).flatten(1).mean(dim=1)


@pytest.mark.parametrize("name", LAYERS)
def test_bias_correction_keeps_the_mean_of_every_channel(name: str) -> None:
    layer, shape = LAYERS[name]
    batches = data(shape)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    model = nn.Sequential(layer)
    prepared = insert_quantizers(
        trace(model, batches[0]), REFERENCE.rules, candidates=[Precision(2), Precision(8)]
    )
    exact = channel_means(prepared, batches, axis)
    for choice in ("w2", "w8"):
        corrected = with_choices(calibrate(prepared, batches, progress=False), {"0": choice})
        assert torch.allclose(channel_means(corrected, batches, axis), exact, atol=2e-5)
    plain = calibrate(prepared, batches, bias_correction=False, progress=False)
    uncorrected = channel_means(with_choices(plain, {"0": "w2"}), batches, axis)
    assert float((uncorrected - exact).abs().max()) > 1e-3


def test_bias_correction_weighs_inputs_of_several_shapes() -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(n, 3, size, generator=generator) + size for n, size in ((4, 9), (2, 5))]
    layer = nn.Conv1d(3, 4, 3, padding=1)
    prepared = insert_quantizers(
        trace(nn.Sequential(layer), batches[0]), REFERENCE.rules, candidates=[Precision(2)]
    )
    node = next(node for node in prepared.graph.nodes if node.name.startswith("conv1d"))
    mean = MeanInput()
    for batch in batches:
        mean.update(batch)
    found = mean_output(node, layer.weight.detach(), mean)
    with torch.no_grad():
        outputs = [
            nn.functional.conv1d(batch, layer.weight, padding=1).movedim(1, 0).flatten(1)
            for batch in batches
        ]
    assert torch.allclose(found, torch.cat(outputs, dim=1).mean(dim=1), atol=1e-5)


def test_bias_correction_lowers_the_noise_of_a_network(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules, candidates=[Precision(3)])
    noise = []
    for corrected in (True, False):
        graph = calibrate(prepared, images, bias_correction=corrected, progress=False)
        groups = require(graph, stage="calibrated").groups
        graph = with_choices(graph, {group.name: "w3" for group in groups})
        error = run_batch(graph, images[0])[0] - run_batch(conv_graph, images[0])[0]
        noise.append(float(error.square().sum()))
    assert noise[0] < noise[1]


def test_every_candidate_is_calibrated(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Callable[..., fx.GraphModule]
) -> None:
    graph = calibrated(conv_graph, images)
    state = require(graph, stage="calibrated")
    for group in state.groups:
        for layer in group.layers:
            weight = graph.get_submodule(str(layer.weight_quantizer))
            correction = graph.get_submodule(str(layer.bias_correction))
            assert isinstance(weight, WeightQuantizer)
            assert isinstance(correction, BiasCorrection)
            scales = mse_weight_scales(get_tensor(graph, layer.weight), weight.formats, 0)
            for number_format, scale in zip(weight.formats, scales, strict=True):
                assert torch.equal(weight.scale(number_format), scale)
                shift = correction.shift(number_format)
                assert shift is not None
                assert shift.shape == scale.shape
        for name in group.activation_quantizers:
            activation = graph.get_submodule(name)
            assert isinstance(activation, ActivationQuantizer)
            assert set(activation.ranges) == {"uint8"}
    assert torch.equal(run_batch(graph, images[0])[0], run_batch(conv_graph, images[0])[0])


def test_the_prepared_graph_is_left_alone(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    before = set(prepared.state_dict())
    calibrate(prepared, images, progress=False)
    assert set(prepared.state_dict()) == before
    assert not state_of(prepared).calibrated


def test_the_ranges_do_not_depend_on_the_batches(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules, candidates=[Precision(4, 8)])
    together = torch.cat(images)
    found = []
    for batches in ([together], list(together.split(1)), [together[8:], together[:8]]):
        graph = calibrate(prepared, batches, progress=False)
        choices = {g.name: "w4a8" for g in require(graph, stage="calibrated").groups}
        found.append(run_batch(with_choices(graph, choices), together)[0])
    for other in found[1:]:
        # The lattice of bins starts from the first batch, so ranges differ by a bin.
        noise = float((other - found[0]).square().sum() / found[0].square().sum())
        assert noise < 1e-4


def test_calibration_takes_any_iterable_and_leaves_gradients_alone(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    with torch.inference_mode():
        graph = calibrate(prepared, (image * 1 for image in images), progress=False)
    buffers = dict(graph.named_buffers())
    assert buffers
    assert not any(buffer.is_inference() or buffer.requires_grad for buffer in buffers.values())
    assert all(parameter.grad is None for parameter in graph.parameters())


@pytest.mark.parametrize("batches", [[], (), iter([])])
def test_no_data_is_an_error(conv_graph: fx.GraphModule, batches: object) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    with pytest.raises(CalibrationError, match="calibration data is empty"):
        calibrate(prepared, batches)


def test_one_tensor_instead_of_batches_is_an_error(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    with pytest.raises(BatchError, match="Wrap it in a list"):
        calibrate(prepared, images[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_names_its_layer(
    conv_graph: fx.GraphModule, images: list[Tensor], bad: float
) -> None:
    graph = copy_graph(conv_graph)
    weight = graph.conv2.weight.detach().clone()
    weight[1, 2, 0, 0] = bad
    graph.conv2.weight = nn.Parameter(weight)
    prepared = insert_quantizers(graph, REFERENCE.rules)
    with pytest.raises(CalibrationError, match="weight of layer 'conv2' holds NaN or infinite"):
        calibrate(prepared, images, progress=False)


def test_an_unused_row_of_a_table_is_checked_too(
    bert_graph: fx.GraphModule, token_batches: list[dict[str, Tensor]]
) -> None:
    graph = copy_graph(bert_graph)
    table = graph.bert.embeddings.word_embeddings
    weight = table.weight.detach().clone()
    weight[0, 0] = float("nan")
    table.weight = nn.Parameter(weight)
    prepared = insert_quantizers(graph, REFERENCE.rules)
    with pytest.raises(CalibrationError, match="layer 'bert.embeddings.word_embeddings'"):
        calibrate(prepared, token_batches, progress=False)


def test_bad_data_names_the_layer(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    with pytest.raises(CalibrationError, match="layer 'stem.0' reads"):
        calibrate(prepared, [images[0] * float("nan")], progress=False)


def test_an_unprepared_graph_is_an_error(conv_graph: fx.GraphModule, images: list[Tensor]) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        calibrate(conv_graph, images)


def test_a_table_tied_to_the_head_is_calibrated_once(tied_head: nn.Module) -> None:
    ids = torch.arange(8).reshape(2, 4)
    traced = trace(tied_head, ids)
    prepared = insert_quantizers(traced, REFERENCE.rules, candidates=[Precision(8, 8)])
    graph = calibrate(prepared, [ids], progress=False)
    (group,) = require(graph, stage="calibrated").groups
    quantizer = graph.get_submodule(str(group.layers[0].weight_quantizer))
    assert isinstance(quantizer, WeightQuantizer)
    assert quantizer.scale(NumberFormat(8)).shape == (9,)
    exact, found = (
        run_batch(graph, ids)[0],
        run_batch(with_choices(graph, {"table": "w8a8"}), ids)[0],
    )
    assert 0 < float((found - exact).abs().max()) < 0.1


@pytest.mark.parametrize("rule", ["minmax", "mse", "sigma"])
def test_tensors_of_one_range_get_that_of_all_their_values(
    conv_graph: fx.GraphModule, images: list[Tensor], chip_rules: TargetRules, rule: str
) -> None:
    prepared = insert_quantizers(conv_graph, chip_rules)
    found = calibrate(prepared, images, ranges=rule, progress=False)
    free = calibrate(
        insert_quantizers(conv_graph, replace(chip_rules, shared_ranges=frozenset())),
        images,
        ranges=rule,
        progress=False,
    )
    (shared,) = state_of(prepared).shared_ranges
    assert ranges_of(found, shared[0]) == ranges_of(found, shared[1])
    assert ranges_of(free, shared[0]) != ranges_of(free, shared[1])
    others = [name for name in activation_quantizers(found) if name not in shared]
    assert all(ranges_of(found, name) == ranges_of(free, name) for name in others)
    # The reference: one histogram of both tensors.
    histogram = StreamingHistogram()
    for batch in images:
        for value in both_operands(conv_graph, batch):
            histogram.update(value)
    expected = RANGES[rule].find(histogram, NumberFormat(8, Scheme.AFFINE))
    assert ranges_of(found, shared[0]) == {"uint8": expected}


def both_operands(graph: fx.GraphModule, batch: Tensor) -> list[Tensor]:
    """The tensors that meet in the graph's only add."""
    seen: list[Tensor] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.target is torch.ops.aten.add.Tensor:
                seen.extend(self.env[arg] for arg in n.args)
            return result

    with torch.no_grad():
        Recorder(graph).run(batch)
    return seen


def activation_quantizers(graph: fx.GraphModule) -> list[str]:
    return [n for n, module in graph.named_modules() if isinstance(module, ActivationQuantizer)]


def ranges_of(graph: fx.GraphModule, name: str) -> dict[str, ActivationRange]:
    quantizer = graph.get_submodule(name)
    assert isinstance(quantizer, ActivationQuantizer)
    return quantizer.ranges
