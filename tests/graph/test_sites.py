from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.asked_products import AskedProducts
from fxmpq.graph.fusions import find_fusions
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.products import find_products
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import find_sites
from fxmpq.graph.state import node_shape
from fxmpq.graph.trace import trace
from fxmpq.recipes.models.resnet20 import ResNet20
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE
from fxmpq.targets.registry import get_target

Found = dict[str, tuple[str, set[str] | None]]


def sites_of(
    graph: fx.GraphModule,
    rules: TargetRules,
    exclude: tuple[str, ...] = (),
    candidate: Precision = Precision(8, 8),
) -> Found:
    """Value to (owning group, readers)."""
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, [candidate], {}, exclude).groups
    sites = find_sites(graph, groups, rules, find_fusions(graph, layers, rules.fusions).fusions)
    order = [node.name for node in graph.graph.nodes]
    assert [site.value.name for site in sites] == sorted(
        (site.value.name for site in sites), key=order.index
    )
    return {
        site.value.name: (
            site.group,
            None if site.readers is None else {reader.name for reader in site.readers},
        )
        for site in sites
    }


def test_the_reference_quantizes_what_layers_read(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, REFERENCE.rules) == {
        "x": ("stem.0", {"conv2d"}),
        "max_pool2d": ("conv1", {"conv2d_1", "conv2d_3"}),
        "relu": ("conv2", {"conv2d_2"}),
        "mean": ("fc", {"linear"}),
    }


def test_onnxruntime_stores_what_convolutions_and_adds_write(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, ONNXRUNTIME.rules) == {
        "x": ("stem.0", {"conv2d"}),
        # The quantizer moves up past the max pooling, to the fused activation.
        "relu_": ("conv1", None),
        "relu": ("conv2", None),
        "conv2d_2": ("conv2", None),
        "conv2d_3": ("conv1", None),
        # The sum of stored tensors and its activation belong to the first that computes them.
        "relu__1": ("conv2", None),
        "mean": ("fc", {"linear"}),
    }


def test_an_excluded_convolution_keeps_its_neighbourhood_in_float(
    conv_graph: fx.GraphModule,
) -> None:
    found = sites_of(conv_graph, ONNXRUNTIME.rules, exclude=("conv2",))
    assert "conv2d_2" not in found
    assert "relu__1" not in found
    # The first convolution of the block still writes codes.
    assert found["relu"] == ("conv1", None)
    assert found["conv2d_3"] == ("conv1", None)


def test_excluding_a_reader_leaves_its_input_alone(conv_graph: fx.GraphModule) -> None:
    found = sites_of(conv_graph, REFERENCE.rules, exclude=("conv1",))
    assert found["max_pool2d"] == ("downsample.0", {"conv2d_3"})


def test_weight_only_quantizes_no_activation(conv_graph: fx.GraphModule) -> None:
    assert sites_of(conv_graph, REFERENCE.rules, candidate=Precision(4)) == {}


def test_linear_layers_read_shared_inputs_once(bert_graph: fx.GraphModule) -> None:
    found = sites_of(bert_graph, ONNXRUNTIME.rules)
    query = "bert.encoder.layer.0.attention.self.query"
    ((value, readers),) = [(v, r) for v, (group, r) in found.items() if group == query]
    assert readers is not None
    assert len(readers) == 3
    # An embedding reads indices, which are no activation: 4 sites a layer, pooler, classifier.
    assert len(found) == 2 * 4 + 2
    assert value.startswith("layer_norm")


class Chain(nn.Module):
    """A residual chain whose identity is the sum of the block before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.one(x) + x).relu()
        x = self.two(x) + x
        return (x + 1).mean((2, 3))


def test_sums_of_stored_tensors_are_stored_in_turn() -> None:
    graph = trace(Chain(), torch.ones(2, 3, 8, 8))
    found = sites_of(graph, ONNXRUNTIME.rules)
    assert found == {
        "x": ("stem", {"conv2d"}),
        "relu": ("one", None),
        "conv2d_1": ("one", None),
        "relu_1": ("two", None),
        "conv2d_2": ("two", None),
        "add_1": ("two", None),
    }


def test_adding_a_constant_is_not_stored() -> None:
    graph = trace(Chain(), torch.ones(2, 3, 8, 8))
    assert "add_2" not in sites_of(graph, ONNXRUNTIME.rules)


@pytest.mark.parametrize("target", [REFERENCE, ONNXRUNTIME])
def test_every_site_is_a_real_tensor(resnet_graph: fx.GraphModule, target: object) -> None:
    nodes = {node.name: node for node in resnet_graph.graph.nodes}
    found = sites_of(resnet_graph, target.rules)  # type: ignore[attr-defined]
    assert found
    for name in found:
        assert nodes[name].meta["val"].is_floating_point()
        assert node_shape(nodes[name]) is not None


# Counted before fusions were data, as (sites, sites that every reader sees in codes).
RECORDED = {
    ("resnet20", "reference"): (20, 0),
    ("resnet20", "onnxruntime"): (32, 30),
    ("conv", "reference"): (4, 0),
    ("conv", "onnxruntime"): (7, 5),
    ("bert", "reference"): (10, 0),
    ("bert", "onnxruntime"): (10, 0),
}


@pytest.mark.parametrize(("model", "target"), RECORDED)
def test_sites_are_where_they_always_were(
    conv_graph: fx.GraphModule, bert_graph: fx.GraphModule, model: str, target: str
) -> None:
    if model == "resnet20":
        graph = trace(ResNet20().eval(), torch.randn(2, 1, 28, 28))
    else:
        graph = {"conv": conv_graph, "bert": bert_graph}[model]
    found = sites_of(graph, get_target(target).rules)
    stored = [readers for _, readers in found.values() if readers is None]
    assert (len(found), len(stored)) == RECORDED[model, target]
    if (model, target) == ("resnet20", "onnxruntime"):
        by_group: dict[str, str] = {}
        for value, (group, _) in found.items():
            by_group[group] = f"{by_group.get(group, '')} {value}".lstrip()
        assert by_group == RESNET20_CODES
        # Only the image and what the classifier reads are in float for other readers.
        assert [name for name, (_, readers) in found.items() if readers] == ["x", "flatten"]


RESNET20_CODES = {
    "conv": "x",
    "stage1.0.conv1": "relu",
    "stage1.0.conv2": "relu_1 conv2d_2",
    "stage1.1.conv1": "relu_2",
    "stage1.1.conv2": "relu_3 conv2d_4",
    "stage1.2.conv1": "relu_4",
    "stage1.2.conv2": "relu_5 conv2d_6",
    "stage2.0.conv1": "relu_6 conv2d_9",
    "stage2.0.conv2": "relu_7 conv2d_8",
    "stage2.1.conv1": "relu_8",
    "stage2.1.conv2": "relu_9 conv2d_11",
    "stage2.2.conv1": "relu_10",
    "stage2.2.conv2": "relu_11 conv2d_13",
    "stage3.0.conv1": "relu_12 conv2d_16",
    "stage3.0.conv2": "relu_13 conv2d_15",
    "stage3.1.conv1": "relu_14",
    "stage3.1.conv2": "relu_15 conv2d_18",
    "stage3.2.conv1": "relu_16",
    "stage3.2.conv2": "relu_17 conv2d_20 relu_18",
    "classifier": "flatten",
}


class Skips(nn.Module):
    """A sum whose other operand is computed by a layer, or by nothing that is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.two(self.one(x).relu()) + x).relu()
        return self.three(y) + torch.softmax(y, 1)


def test_a_sum_that_is_fused_into_a_layer_is_stored_as_that_layers_output() -> None:
    graph = trace(Skips().eval(), torch.randn(2, 3, 4, 4))
    chains = (("conv", "relu"), ("conv", "add", "relu"), ("conv", "add"))
    rules = replace(ONNXRUNTIME.rules, fusions=chains, quantize_outputs_of=frozenset({"conv"}))
    assert sites_of(graph, rules) == {
        # The fused layer reads the codes of the skip too.
        "x": ("one", {"conv2d", "add"}),
        "relu": ("two", None),
        "relu_1": ("three", None),
        "add_1": ("three", None),
    }


def test_a_concatenation_of_codes_is_stored_in_codes(chip_rules: TargetRules) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], 1) * 2

    graph = trace(Joined().eval(), torch.randn(2, 3, 4, 4))
    assert sites_of(graph, chip_rules) == {
        "x": ("one", {"conv2d", "conv2d_1"}),
        "conv2d": ("one", None),
        "conv2d_1": ("one", None),
        "cat": ("one", None),
    }


class Product(nn.Module):
    """A product of a layer's result and of what that layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.relu(self.fc(x)).transpose(1, 2)


def test_both_operands_of_a_product_are_sites_that_it_alone_reads() -> None:
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers, rules = find_layers(graph).layers, REFERENCE.rules
    groups = form_groups(graph, layers, rules, [Precision(8, 8)], {}, (), asked=asked).groups
    sites = {site.value.name: site for site in find_sites(graph, groups, rules, ())}
    assert {name: site.group for name, site in sites.items()} == {"x": "fc", "transpose": "fc"}
    assert {reader.name for reader in sites["x"].readers or ()} == {"linear", "matmul"}
    assert {reader.name for reader in sites["transpose"].readers or ()} == {"matmul"}


def test_a_product_that_stays_float_has_no_sites() -> None:
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers, rules = find_layers(graph).layers, REFERENCE.rules
    candidates = [Precision(8, 8)]
    groups = form_groups(graph, layers, rules, candidates, {}, ["matmul"], asked=asked).groups
    assert [site.value.name for site in find_sites(graph, groups, rules, ())] == ["x"]


def symmetric_of(graph: fx.GraphModule, rules: TargetRules, *kinds: str) -> set[str]:
    rules = replace(rules, symmetric_inputs_of=frozenset(kinds))
    layers = find_layers(graph).layers
    groups = form_groups(graph, layers, rules, [Precision(8, 8)], {}, ()).groups
    fusions = find_fusions(graph, layers, rules.fusions).fusions
    sites = find_sites(graph, groups, rules, fusions)
    return {site.value.name for site in sites if site.is_symmetric}


def test_what_kinds_with_symmetric_inputs_read_is_symmetric(conv_graph: fx.GraphModule) -> None:
    convolved = {"x", "max_pool2d", "relu"}
    assert symmetric_of(conv_graph, REFERENCE.rules) == set()
    assert symmetric_of(conv_graph, REFERENCE.rules, "conv") == convolved
    assert symmetric_of(conv_graph, REFERENCE.rules, "linear") == {"mean"}
    assert symmetric_of(conv_graph, REFERENCE.rules, "conv", "linear") == {*convolved, "mean"}
    # It moves up past the max pooling, and stored outputs are read in codes too.
    assert symmetric_of(conv_graph, ONNXRUNTIME.rules, "conv") == {"x", "relu_", "relu"}
    assert symmetric_of(conv_graph, ONNXRUNTIME.rules, "add") == {"conv2d_2", "conv2d_3"}


def test_a_site_of_two_kinds_is_symmetric_for_one_of_them() -> None:
    """A linear layer and a product read `x`, the product alone its transpose."""
    graph = trace(Product(), torch.randn(2, 3, 4))
    asked = AskedProducts(find_products(graph))
    layers = find_layers(graph).layers
    groups = form_groups(
        graph, layers, REFERENCE.rules, [Precision(8, 8)], {}, (), asked=asked
    ).groups
    found = {
        kind: {
            site.value.name
            for site in find_sites(
                graph, groups, replace(REFERENCE.rules, symmetric_inputs_of=frozenset({kind})), ()
            )
            if site.is_symmetric
        }
        for kind in ("linear", "matmul", "embedding")
    }
    assert found == {"linear": {"x"}, "matmul": {"x", "transpose"}, "embedding": set()}


def test_what_a_fused_add_adds_is_read_in_codes_by_the_add_alone() -> None:
    graph = trace(Skips().eval(), torch.randn(2, 3, 4, 4))
    chains = (("conv", "relu"), ("conv", "add", "relu"), ("conv", "add"))
    rules = replace(REFERENCE.rules, fusions=chains)
    read = {
        "x": ("one", {"conv2d"}),
        "relu": ("two", {"conv2d_1"}),
        "relu_1": ("three", {"conv2d_2"}),
    }
    assert sites_of(graph, rules) == read
    rules = replace(rules, quantize_residuals_of=frozenset({"conv"}))
    # The image is what a layer reads, too; what the last convolution adds is not.
    with_residuals = {
        **read,
        "x": ("one", {"conv2d", "add"}),
        "softmax": ("three", {"add_1"}),
    }
    assert sites_of(graph, rules) == with_residuals
    # A layer that stays float adds floats.
    assert sites_of(graph, rules, exclude=("three",)) == {
        name: found for name, found in with_residuals.items() if found[0] != "three"
    }
    assert sites_of(graph, replace(rules, quantize_residuals_of=frozenset({"linear"}))) == read
    assert symmetric_of(graph, rules, "add") == {"x", "softmax"}


def test_a_stored_tensor_that_is_added_stays_as_it_is() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shift = nn.Conv1d(2, 2, 1), nn.Parameter(torch.randn(2, 2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.shift

    graph = trace(Shifted().eval(), torch.randn(2, 2, 4))
    rules = replace(
        REFERENCE.rules, fusions=(("conv", "add"),), quantize_residuals_of=frozenset({"conv"})
    )
    assert set(sites_of(graph, rules)) == {"x"}


class Heads(nn.Module):
    """Two heads whose products read views of linear layers, one view read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).view(2, 5, 2, 4).transpose(1, 2)
        key = self.key(x).view(2, 5, 2, 4).transpose(1, 2)
        weights = torch.softmax(torch.matmul(query, key.transpose(2, 3)), -1)
        context = torch.matmul(weights, key)
        return self.out(context.transpose(1, 2).reshape(2, 5, 8))


def test_operands_of_products_are_stored_where_they_are_computed() -> None:
    graph = trace(Heads(), torch.randn(2, 5, 8))
    asked = AskedProducts(find_products(graph))
    layers = find_layers(graph).layers
    base = replace(REFERENCE.rules, symmetric_inputs_of=frozenset({"matmul"}))
    groups = form_groups(graph, layers, base, [Precision(8, 8)], {}, (), asked=asked).groups

    def found(rules: TargetRules) -> dict[str, bool]:
        sites = find_sites(graph, groups, rules, ())
        return {site.value.name: site.is_symmetric for site in sites}

    # The linear layer behind reads its own view, the one that is read twice is stored itself.
    behind = {"x": False, "reshape": False}
    assert found(base) == {
        "transpose": True,
        "transpose_1": True,
        "transpose_2": True,
        "softmax": True,
        **behind,
    }
    views = frozenset({torch.ops.aten.view.default, torch.ops.aten.transpose.int})
    rules = replace(base, product_through=views, unsigned_outputs_of=frozenset({"softmax"}))
    assert found(rules) == {"linear": True, "transpose_1": True, "softmax": False, **behind}
