from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.calibration.calibrate import calibrate
from fxmpq.errors import FxmpqError, PatternError, PrecisionError, TargetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.findings import Join
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.rules import OperatorRule, TargetRules
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require, state_of
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.target import Target

Planned = Callable[..., fx.GraphModule]
TARGETS = pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME], ids=lambda t: t.name)


@TARGETS
def test_with_every_quantizer_off_the_graph_computes_the_same_bits(
    target: Target,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    resnet_graph: fx.GraphModule,
    resnet_batches: list[dict[str, Tensor]],
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
) -> None:
    cases = [
        (conv_graph, images[0]),
        (resnet_graph, resnet_batches[0]),
        (bert_graph, token_batches[1]),
    ]
    for graph, batch in cases:
        prepared = insert_quantizers(graph, target.rules)
        for one, other in zip(run_batch(graph, batch), run_batch(prepared, batch), strict=True):
            assert torch.equal(one, other)


@TARGETS
def test_every_group_knows_its_quantizers(target: Target, conv_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(conv_graph, target.rules)
    owned: list[str] = []
    for group in require(prepared, stage="prepared").groups:
        owned += group.activation_quantizers
        for layer in group.layers:
            assert isinstance(prepared.get_submodule(layer.weight_quantizer), WeightQuantizer)
            assert isinstance(prepared.get_submodule(layer.bias_correction), BiasCorrection)
            # A quantizer that moved up past the max pooling is not read directly.
            is_behind_pool = target is ONNXRUNTIME and group.name == "conv1"
            assert (layer.input_quantizer is None) == is_behind_pool
    found = [
        name for name, module in prepared.named_modules() if isinstance(module, ActivationQuantizer)
    ]
    assert sorted(owned) == sorted(found)


def test_formats_are_those_of_the_candidates(conv_graph: fx.GraphModule) -> None:
    candidates = [Precision(4, 8), Precision(4, 4), Precision(8, 8)]
    prepared = insert_quantizers(conv_graph, REFERENCE.rules, candidates=candidates)
    group = require(prepared, stage="prepared").group("fc")
    weight = prepared.get_submodule(str(group.layers[0].weight_quantizer))
    activation = prepared.get_submodule(group.activation_quantizers[0])
    assert isinstance(weight, WeightQuantizer)
    assert isinstance(activation, ActivationQuantizer)
    assert weight.formats == (NumberFormat(4), NumberFormat(8))
    assert {entry.name for entry in activation.formats} == {"uint4", "uint8"}


def test_the_targets_own_candidates_are_the_default(conv_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(conv_graph, ONNXRUNTIME.rules)
    group = require(prepared, stage="prepared").group("fc")
    assert group.candidates == ONNXRUNTIME.rules.default_candidates


def test_the_traced_graph_is_left_alone(conv_graph: fx.GraphModule) -> None:
    before = [str(node) for node in conv_graph.graph.nodes]
    insert_quantizers(conv_graph, ONNXRUNTIME.rules)
    assert [str(node) for node in conv_graph.graph.nodes] == before
    assert state_of(conv_graph).target is None


def test_what_stays_float_has_a_reason(bert_graph: fx.GraphModule) -> None:
    prepared = insert_quantizers(bert_graph, ONNXRUNTIME.rules, exclude=["classifier"])
    reasons = {entry.name: entry.reason for entry in state_of(prepared).left_float}
    assert reasons["classifier"] == "kept in float by the user"
    assert sum("fused attention" in reason for reason in reasons.values()) == 2
    rules = TargetRules(
        "chip", {"linear": OperatorRule(frozenset({8}), frozenset({8}))}, (Precision(8, 8),)
    )
    reasons = {e.name: e.reason for e in state_of(insert_quantizers(bert_graph, rules)).left_float}
    assert reasons["bert.embeddings.word_embeddings"] == "target 'chip' has no quantized embedding"


@pytest.mark.parametrize("layer", [nn.Conv3d(2, 3, 2), nn.ConvTranspose3d(2, 3, 2)])
def test_convolutions_over_more_dimensions_than_run_are_refused(layer: nn.Module) -> None:
    graph = trace(nn.Sequential(layer), torch.ones(2, 2, 3, 3, 3))
    assert state_of(insert_quantizers(graph, REFERENCE.rules)).groups
    rules = replace(REFERENCE.rules, convolved_dimensions=2)
    with pytest.raises(TargetError, match="'0' is a convolution over 3 dimensions; .* 2 at most"):
        insert_quantizers(graph, rules)
    flat = trace(nn.Sequential(nn.Conv2d(2, 3, 2)), torch.ones(2, 2, 3, 3))
    assert state_of(insert_quantizers(flat, rules)).groups


def test_unusable_requests_are_errors(conv_graph: fx.GraphModule) -> None:
    with pytest.raises(PrecisionError, match="'onnxruntime' cannot run w4a4"):
        insert_quantizers(conv_graph, ONNXRUNTIME.rules, candidates=[Precision(4, 4)])
    with pytest.raises(PrecisionError, match="'onnxruntime' cannot run w5a8"):
        insert_quantizers(conv_graph, ONNXRUNTIME.rules, keep={"fc": Precision(5, 8)})
    with pytest.raises(PatternError, match="no layer matches 'fcc'; .*'fc'"):
        insert_quantizers(conv_graph, REFERENCE.rules, exclude=["fcc"])
    with pytest.raises(FxmpqError, match="call fxmpq.trace"):
        insert_quantizers(fx.symbolic_trace(nn.ReLU()), REFERENCE.rules)


def test_tied_weights_have_one_quantizer(tied_head: nn.Module) -> None:
    graph = trace(tied_head, torch.ones(2, 3, dtype=torch.long))
    prepared = insert_quantizers(graph, REFERENCE.rules)
    (group,) = require(prepared, stage="prepared").groups
    table, head = group.layers
    assert table.weight_quantizer == head.weight_quantizer
    assert table.bias_correction is None
    assert head.bias_correction is not None


class ComputedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias * x.mean())


def test_a_computed_bias_is_not_corrected() -> None:
    prepared = insert_quantizers(trace(ComputedBias(), torch.ones(2, 4)), REFERENCE.rules)
    (group,) = require(prepared, stage="prepared").groups
    assert group.layers[0].bias_correction is None
    assert group.layers[0].weight_quantizer is not None


def test_a_prepared_graph_goes_into_training_mode_and_back(
    conv_graph: fx.GraphModule, images: list[Tensor]
) -> None:
    prepared = insert_quantizers(conv_graph, REFERENCE.rules)
    expected = prepared(images[0])
    assert prepared.train()(images[0]).equal(expected)
    assert prepared.eval()(images[0]).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_weights_than_single_precision_are_an_error(dtype: torch.dtype) -> None:
    graph = trace(nn.Linear(4, 3).to(dtype), torch.ones(2, 4, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(PrecisionError, match=rf"has {name} weights; .* model.float\(\)"):
        insert_quantizers(graph, REFERENCE.rules)
    kept = insert_quantizers(graph, REFERENCE.rules, exclude=["*"])
    x = torch.randn(2, 4).to(dtype)
    assert torch.equal(run_batch(kept, x)[0], run_batch(graph, x)[0])


def test_the_state_tells_fusions_joins_and_what_did_not_fire(conv_graph: fx.GraphModule) -> None:
    state = require(insert_quantizers(conv_graph, ONNXRUNTIME.rules), stage="prepared")
    assert [(fusion.name, fusion.layer) for fusion in state.fusions] == [
        ("conv-relu", "stem.0"),
        ("conv-relu", "conv1"),
        ("add-relu", ""),
    ]
    assert state.joins == (Join("shared_input", "downsample.0", "conv1"),)
    assert {entry.place for entry in state.missed} == {"conv2", "downsample.0"}
    assert state.shared_ranges == ()
    bare = require(insert_quantizers(conv_graph, REFERENCE.rules), stage="prepared")
    assert (bare.fusions, bare.missed, bare.joins) == ((), (), state.joins)


def test_a_chip_that_ties_what_it_adds_computes_the_same_while_off(
    conv_graph: fx.GraphModule, images: list[Tensor], chip_rules: TargetRules
) -> None:
    prepared = insert_quantizers(conv_graph, chip_rules, ties=[("fc", "stem*")])
    assert torch.equal(prepared(images[0]), conv_graph(images[0]))
    state = require(prepared, stage="prepared")
    assert [group.name for group in state.groups] == ["stem.0", "conv1"]
    assert {name for names in state.shared_ranges for name in names} <= {
        name for group in state.groups for name in group.activation_quantizers
    }


class Pair(nn.Module):
    """A layer whose result another one and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y


@pytest.mark.parametrize(
    ("choices", "stored", "read"),
    [
        (("w8a8", "fp32"), "uint8", None),
        (("w8a8", "w8a8dt"), "uint8", "uint8dt"),
        (("w8a8", "w8a8"), "uint8", "uint8"),
        (("w8a8dt", "w8a8"), None, "uint8"),
        (("w8a8dt", "w8a8dt"), None, "uint8dt"),
        (("fp32", "fp32"), None, None),
    ],
)
def test_a_layer_decides_how_its_own_result_is_stored(
    choices: tuple[str, str],
    stored: str | None,
    read: str | None,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    candidates = [Precision.parse(name) for name in ("w8a8", "w8a8dt", "fp32")]
    traced = trace(Pair(), x)
    prepared = insert_quantizers(traced, EXECUTORCH.rules, candidates=candidates)
    assert torch.equal(run_batch(prepared, x)[0], run_batch(traced, x)[0])
    graph = calibrate(prepared, [x], progress=False)
    plan = with_choices(graph, dict(zip(("first", "second"), choices, strict=True)))
    (sum_,) = [node for node in plan.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    written, first = sum_.args
    second = written.args[0]
    for node, expected in ((first, stored), (second.args[0], read)):
        quantizer = plan.get_submodule(str(node.target))
        assert isinstance(quantizer, ActivationQuantizer)
        assert (quantizer.active and quantizer.active.name) == expected
    # What the sum reads is what the layer stores; what the second layer reads lies behind it.
    assert second.args[0].args[0] is first
    assert first.args[0].name == state_of(plan).group("first").layers[0].node
