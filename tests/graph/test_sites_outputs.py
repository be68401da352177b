from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.fusions import find_fusions
from fxmpq.graph.groups import form_groups
from fxmpq.graph.layers import find_layers
from fxmpq.graph.rules import TargetRules
from fxmpq.graph.sites import find_sites
from fxmpq.graph.trace import trace
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.onnxruntime import ONNXRUNTIME
from fxmpq.targets.reference import REFERENCE

from .conftest import sites_of, symmetric_of


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


def stored_of(
    graph: fx.GraphModule, rules: TargetRules, candidates: Sequence[str], **keep: str
) -> list[tuple[str, str, set[str] | None]]:
    layers = find_layers(graph).layers
    wanted = [Precision.parse(name) for name in candidates]
    pins = {name: Precision.parse(found) for name, found in keep.items()}
    groups = form_groups(graph, layers, rules, wanted, pins, ()).groups
    fusions = find_fusions(graph, layers, rules.fusions).fusions
    return [
        (site.value.name, site.group, site.readers and {reader.name for reader in site.readers})
        for site in find_sites(graph, groups, rules, fusions)
    ]


class Stack(nn.Module):
    """Linear layers with a sum that only normalisation reads, and one that a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.a(x))
        return self.c(x + self.b(x))


@pytest.fixture(scope="module")
def stack() -> fx.GraphModule:
    return trace(Stack(), torch.ones(2, 4))


def test_a_layers_own_precision_decides_whether_its_result_is_stored(stack: fx.GraphModule) -> None:
    rules = EXECUTORCH.rules
    reads = [("x", "a", {"linear"}), ("layer_norm", "b", {"linear_1"})]
    # On ranges found at every run a layer writes real numbers.
    found = stored_of(stack, rules, ["w8a8dt"])
    assert found == [*reads, ("add_1", "c", {"linear_2"})]
    # Where all that reads it is in codes, one quantizer is enough.
    found = stored_of(stack, rules, ["w4a8", "w8a8"])
    outputs = [("linear", "a", None), ("linear_1", "b", None), ("linear_2", "c", None)]
    norm = ("layer_norm", "b", {"linear_1", "add_1"})
    assert found == [reads[0], outputs[0], norm, outputs[1], ("add_1", "c", None), outputs[2]]
    # Else there are two: what the layer stores, and behind it what the next one reads. The sum
    # reads what it adds to the layer's result in float, since that may have no range.
    found = stored_of(stack, rules, ["w8a8", "w8a8dt"])
    sums = [("add_1", "b", None), ("add_1", "c", {"linear_2"})]
    assert found == [reads[0], outputs[0], reads[1], outputs[1], *sums, outputs[2]]
    one = stored_of(stack, replace(rules, own_outputs=False), ["w8a8", "w8a8dt"])
    assert one == [reads[0], outputs[0], norm, outputs[1], ("add_1", "c", None), outputs[2]]


def test_a_sum_is_stored_if_a_layer_reads_it(stack: fx.GraphModule) -> None:
    read_too = replace(EXECUTORCH.rules, stored_if_read=frozenset())
    names = [
        {name for name, *_ in stored_of(stack, rules, ["w8a8"])}
        for rules in (EXECUTORCH.rules, read_too)
    ]
    assert names[1] - names[0] == {"add"}
    assert "add_1" in names[0]
    # Real numbers are added in float.
    found = stored_of(stack, EXECUTORCH.rules, ["w8a8", "w8a8dt"], b="w8a8dt")
    assert ("add_1", "c", {"linear_2"}) in found
    assert "linear_1" not in {name for name, *_ in found}


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
