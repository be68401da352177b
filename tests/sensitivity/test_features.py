from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, fx, nn

from fxmpq.errors import BatchError, CalibrationError, FxmpqError
from fxmpq.formats import Precision
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.trace import trace
from fxmpq.sensitivity import features
from fxmpq.sensitivity.features import FeatureGrams, feature_nodes, gram
from fxmpq.targets.registry import get_target

Planned = Callable[..., fx.GraphModule]
MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(2, 6), st.integers(1, 9)),
    elements=st.floats(-4, 4, width=16),
)


def prepared(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph = trace(model.eval(), tuple(inputs))
    return insert_quantizers(graph, get_target("reference").rules)


def operators(graph: fx.GraphModule) -> dict[str, list[str]]:
    """Names of the operators at which each group's features are taken, quantizers passed over."""
    found: dict[str, list[str]] = {}
    for group, nodes in feature_nodes(graph).items():
        for node in nodes:
            source = node.args[0] if node.op == "call_module" else node
            assert isinstance(source, fx.Node)
            found.setdefault(group, []).append(str(source.target).split(".")[1])
    return found


def by_definition(*parts: Tensor, center: bool) -> Tensor:
    """The Gram matrix of features side by side, sample by sample."""
    rows = torch.cat([part.detach().double().flatten(1) for part in parts], dim=1)
    rows = rows - rows.mean(0) if center else rows
    return torch.stack([torch.stack([torch.dot(a, b) for b in rows]) for a in rows])


@given(MATRICES)
def test_a_centred_gram_is_the_double_centred_kernel(values: np.ndarray) -> None:
    rows = torch.from_numpy(values)
    samples = len(rows)
    center = torch.eye(samples).double() - 1 / samples
    kernel = rows.double() @ rows.double().T
    torch.testing.assert_close(gram(rows, center=False), kernel)
    torch.testing.assert_close(gram(rows), center @ kernel @ center, atol=1e-9, rtol=1e-9)


def test_chunks_of_features_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 23, generator=torch.Generator().manual_seed(0))
    whole = gram(rows)
    monkeypatch.setattr(features, "_CHUNK", 5 * 4)
    torch.testing.assert_close(gram(rows), whole, rtol=1e-12, atol=1e-12)


def test_what_does_not_vary_beyond_rounding_has_a_gram_of_exact_zeros() -> None:
    same = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)).expand(4, -1)
    rounded = same * (1 + 1e-7 * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None])
    assert not torch.equal(rounded[0], rounded[1])
    assert gram(rounded).abs().max() == 0
    assert gram(rounded, center=False).min() > 0
    assert gram(same + 0.01 * torch.eye(4, 50)).trace() > 0


@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
@pytest.mark.parametrize("center", [True, False])
def test_residual_network_equals_hooks_on_the_module(
    conv_net: nn.Module,
    conv_graph: fx.GraphModule,
    images: list[Tensor],
    calibrated: Planned,
    target: str,
    center: bool,
) -> None:
    net, x = conv_net, images[0]
    with torch.no_grad():
        stem = net.stem(x)
        pooled = net.pool(stem)
        inner = torch.relu(net.bn1(net.conv1(pooled)))
        shortcut = net.downsample(pooled)
        block = torch.relu(net.bn2(net.conv2(inner)) + shortcut)
        expected = torch.stack(
            [
                by_definition(stem, center=center),
                by_definition(inner, shortcut, center=center),
                by_definition(block, center=center),
                by_definition(net(x), center=center),
            ]
        )
    found = FeatureGrams(calibrated(conv_graph, images, target), center=center).grams(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Late(nn.Module):
    """A shortcut of its own group, called after the layers it goes around."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.around = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.two(self.one(x).relu())
        return torch.tanh(deep + self.around(x.abs()))


def test_where_ways_meet_the_deeper_layer_goes_on() -> None:
    found = operators(prepared(Late(), torch.randn(3, 4)))
    assert found == {"one": ["relu"], "two": ["tanh"], "around": ["linear"]}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm, self.slopes = nn.LayerNorm(4), nn.PReLU()
        self.head, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        y = self.norm(y + x)
        return self.last(nn.functional.hardswish(self.slopes(self.head(y))))


def test_gates_are_passed_and_norms_are_not() -> None:
    found = operators(prepared(Gated(), torch.randn(3, 4)))
    assert found == {"gate": ["mul"], "down": ["add"], "head": ["hardswish"], "last": ["linear"]}


class Squeezed(nn.Module):
    """Channel attention: the sigmoid is spread over the map that it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))


def test_readers_of_another_shape_end_the_way() -> None:
    found = operators(prepared(Squeezed(), torch.randn(3, 2, 6, 6)))
    assert found == {"conv": ["conv2d"], "scale": ["sigmoid"]}


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.relu() + x.sigmoid()


def test_two_elementwise_readers_end_the_way() -> None:
    assert operators(prepared(Forked(), torch.randn(3, 4))) == {"layer": ["linear"]}


class Compared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, self.layer(x) > 0


def test_features_are_real() -> None:
    assert operators(prepared(Compared(), torch.randn(3, 4))) == {"layer": ["linear"]}


class PositionsFirst(nn.Module):
    """Positions before samples, and both merged, as attention modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x.transpose(0, 1)).relu()
        return self.head(hidden.reshape(-1, 5)).view(x.shape[1], x.shape[0], 3).transpose(0, 1)


def test_samples_that_do_not_lie_first(calibrated: Planned) -> None:
    torch.manual_seed(0)
    model, x = PositionsFirst(), torch.randn(4, 3, 4)
    graph = calibrated(trace(model, x), [x])
    hidden = model.inner(x).relu()
    expected = [by_definition(part, center=True) for part in (hidden, model.head(hidden))]
    torch.testing.assert_close(
        FeatureGrams(graph).grams(x), torch.stack(expected), rtol=1e-5, atol=1e-5
    )


class Table(nn.Module):
    """A layer over a table that belongs to no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.scores, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.scores(self.table).mean(0)


def test_what_samples_share_is_the_same_for_each(calibrated: Planned) -> None:
    torch.manual_seed(0)
    model, x = Table(), torch.randn(3, 4)
    graph = calibrated(trace(model, x), [x], candidates=[Precision(8, 8)])
    position = list(feature_nodes(graph)).index("scores")
    shared = FeatureGrams(graph, center=False).grams(x)[position]
    power = model.scores(model.table).detach().double().square().sum()
    torch.testing.assert_close(shared, power.expand(3, 3), rtol=1e-5, atol=0)
    assert FeatureGrams(graph).grams(x)[position].abs().max() == 0


def test_bert_batches_of_several_lengths(
    bert: nn.Module,
    bert_graph: fx.GraphModule,
    token_batches: list[dict[str, Tensor]],
    calibrated: Planned,
) -> None:
    graph = calibrated(bert_graph, token_batches)
    layer = "bert.encoder.layer.1.intermediate.dense"
    position = list(feature_nodes(graph)).index(layer)
    grams = FeatureGrams(graph)
    seen: list[Tensor] = []
    module = bert.get_submodule(layer.removesuffix(".dense"))
    handle = module.register_forward_hook(lambda m, args, result: seen.append(result))
    for batch in token_batches:
        bert(**batch)
        expected = by_definition(seen[-1], center=True)
        torch.testing.assert_close(grams.grams(batch)[position], expected, rtol=1e-4, atol=1e-4)
    handle.remove()
    assert seen[0].shape != seen[1].shape


def test_infinite_features_name_their_group(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    grams = FeatureGrams(calibrated(conv_graph, images))
    with pytest.raises(CalibrationError, match=r"group 'stem\.0' holds NaN or infinite"):
        grams.grams(torch.full((3, 3, 16, 16), torch.inf))
    assert torch.isfinite(grams.grams(images[0])).all()


def test_bad_batches_and_graphs_are_errors(
    conv_graph: fx.GraphModule, images: list[Tensor], calibrated: Planned
) -> None:
    with pytest.raises(FxmpqError, match="fxmpq.prepare"):
        feature_nodes(conv_graph)
    with pytest.raises(BatchError, match="must have shape"):
        FeatureGrams(calibrated(conv_graph, images)).grams(images[0][:, :2])
