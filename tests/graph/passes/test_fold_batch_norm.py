from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fxmpq.graph.passes.fold_batch_norm import fold_batch_norm
from fxmpq.graph.passes.merge_weights import merge_weights

Randomize = Callable[..., nn.Module]


def folded(model: nn.Module, x: Tensor, expected: int) -> fx.GraphModule:
    """Export, fold, and compare with the model, whose tensors must stay as they were."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(x)
        graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)
        copied = fx.GraphModule(graph, graph.graph)
        assert fold_batch_norm(copied) == expected
        found = copied(x)
    assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    return copied


def norms(graph: fx.GraphModule) -> int:
    return sum(node.target is torch.ops.aten.batch_norm.default for node in graph.graph.nodes)


LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "conv without bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "same padding": (nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "strided groups": (nn.Conv2d(4, 8, 3, 2, 1, groups=4), nn.BatchNorm2d(8), (2, 4, 7, 7)),
    "conv1d": (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (2, 3, 9)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "transposed groups": (
        nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm1d(6),
        (2, 4, 6),
    ),
    "transposed depthwise": (nn.ConvTranspose1d(4, 8, 3, groups=4), nn.BatchNorm1d(8), (2, 4, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 4, 4, 4)),
    "linear": (nn.Linear(5, 4), nn.BatchNorm1d(4), (3, 5)),
    "linear without bias": (nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), (3, 5)),
    "norm without affine": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, affine=False), (2, 3, 9)),
    "large epsilon": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, eps=0.5), (2, 3, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_computes_the_same(name: str, randomize: Randomize) -> None:
    layer, norm, shape = LAYERS[name]
    model = randomize(nn.Sequential(layer, norm, nn.ReLU()))
    graph = folded(model, torch.randn(shape), 1)
    assert norms(graph) == 0
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    assert names == {"0.weight", "0.bias"}


class Shared(nn.Module):
    """The norm is not the only reader of the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class SharedWeight(nn.Module):
    """One convolution, called twice, with a norm behind the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.conv(x)))


class SharedBias(nn.Module):
    """Two convolutions that add one bias, of which one has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)
        self.two.bias, self.norm = self.one.bias, nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x) + self.norm(self.one(x))


class Sequence(nn.Module):
    """A linear layer over [N, C, L] whose channels are not the norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


class ComputedGamma(nn.Module):
    """A norm whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.batch_norm(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight * 3, norm.bias
        )


class BatchStatistics(nn.Module):
    """A norm that always uses the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Shared, (2, 3, 9)),
        (SharedWeight, (2, 4, 9)),
        (SharedBias, (2, 4, 9)),
        (Sequence, (2, 4, 4)),
        (ComputedGamma, (2, 4, 9)),
        (BatchStatistics, (2, 4, 9)),
    ],
)
def test_what_cannot_be_folded_stays(
    model: type[nn.Module], shape: tuple[int, ...], randomize: Randomize
) -> None:
    made = randomize(model())
    x = torch.randn(shape)
    with torch.no_grad():
        graph = torch.export.export(made, (x,), strict=False).module(check_guards=False)
        merge_weights(graph)
        assert fold_batch_norm(graph) == 0
        assert norms(graph) == 1
        assert torch.allclose(graph(x), made(x), atol=1e-5)


class OneModule(nn.Module):
    """Two weights and an unrelated bias in one module, each weight with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.first = nn.Parameter(torch.randn(4, 3, 3))
        self.inner.second = nn.Parameter(torch.randn(4, 4, 3))
        self.inner.bias = nn.Parameter(torch.randn(4, 1))
        self.norm1, self.norm2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(functional.conv1d(x, self.inner.first)) + self.inner.bias
        return self.norm2(functional.conv1d(x, self.inner.second))


def test_new_biases_take_free_names(randomize: Randomize) -> None:
    folded(randomize(OneModule()), torch.randn(2, 3, 12), 2)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.conv1d(x, self.kernel))


def test_a_weight_of_the_model_itself(randomize: Randomize) -> None:
    folded(randomize(Root()), torch.randn(2, 3, 12), 1)


def test_tiny_variances_are_folded_in_double_precision(randomize: Randomize) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4, eps=1e-12)).eval()
    model[1].running_var.fill_(1e-9)
    model[1].running_mean.fill_(100.0)
    x = torch.randn(2, 3, 12)
    with torch.no_grad():
        graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)
        fold_batch_norm(graph)
        expected = model.double()(x.double())
        assert torch.allclose(graph(x).double(), expected, rtol=1e-5)


def test_a_norm_over_the_positions_of_one_sample_stays(randomize: Randomize) -> None:
    class OneSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            # [4 channels, 4 positions]; the norm takes the positions for channels.
            return self.norm(self.conv(x.mean(0)))

    model, x = randomize(OneSample()).eval(), torch.randn(2, 3, 6)
    with torch.no_grad():
        graph = torch.export.export(model, (x,), strict=False).module(check_guards=False)
        assert fold_batch_norm(graph) == 0
        assert torch.equal(graph(x), model(x))
