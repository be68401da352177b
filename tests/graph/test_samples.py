from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.graph.samples import SampleStrides, samples_first, sum_per_sample
from fxmpq.graph.trace import trace

_LAYER = re.compile(r"(linear|conv\dd)(_\d+)?")


class Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, samples: int) -> None:
        super().__init__(graph)
        self.strides = SampleStrides(graph)
        self.strides.start(samples)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        self.strides.record(n, result)
        if isinstance(result, Tensor):
            self.values[n] = result
        return result


def samples_seen(model: nn.Module, batch: Tensor) -> dict[str, bool]:
    """Whether each tensor's samples are known, having checked that they are right.

    A sample that changes must change its own values in every tensor and no others.
    """
    graph = trace(model.eval(), batch)
    samples = len(batch)
    base, moved = Recorder(graph, samples), Recorder(graph, samples)
    changed = batch.clone()
    changed[1] += 1 if not batch.is_floating_point() else 0.37
    with torch.no_grad():
        base.run(batch, enable_io_processing=False)
        moved.run(changed, enable_io_processing=False)
    known: dict[str, bool] = {}
    for node, value in base.values.items():
        stride = base.strides.stride(node)
        known[node.name] = stride is not None
        if stride is None:
            continue
        difference = (value.double() - moved.values[node].double()).abs().detach()
        per_sample = sum_per_sample(difference, stride, samples)
        assert float(per_sample.sum() - per_sample[1]) == 0, node
        if _LAYER.fullmatch(node.name) or node.op == "placeholder":
            assert float(per_sample[1]) > 0, node
    return known


def layers(known: dict[str, bool]) -> set[bool]:
    return {found for name, found in known.items() if _LAYER.fullmatch(name)}


def test_convolutions_and_heads() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )
    known = samples_seen(model, torch.randn(3, 3, 8, 8))
    assert layers(known) == {True}


def test_an_empty_slice_has_no_samples_and_what_joins_it_has() -> None:
    class FullRotary(nn.Module):
        """Rotates all of a head: nothing is left for the other part, as in Phi-3."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            rotated, kept = hidden[..., :8], hidden[..., 8:]
            return self.out(torch.cat([rotated.neg(), kept * 2], dim=-1))

    known = samples_seen(FullRotary(), torch.randn(3, 5, 8))
    assert layers(known) == {True}
    assert not known["mul"]
    assert known["cat"]


@pytest.mark.parametrize("positions", [3, 6, 7])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_that_puts_positions_first(positions: int, batch_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            if batch_first:
                return self.head(self.encoder(x).mean(1))
            return self.head(self.encoder(x.transpose(0, 1)).mean(0))

    known = samples_seen(Encoder(), torch.randn(3, positions, 8))
    assert layers(known) == {True}


class Frames(nn.Module):
    """Runs a convolution on every frame, frames of a sample together or apart."""

    def __init__(self, *, frames_first: bool) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.frames_first = frames_first

    def forward(self, x: Tensor) -> Tensor:
        samples, frames = x.shape[:2]
        if self.frames_first:
            x = x.transpose(0, 1)
        x = self.conv(x.reshape(samples * frames, *x.shape[2:])).relu().mean((2, 3))
        x = self.fc(x)
        return x.view(frames, -1, 2).mean(0) if self.frames_first else x.view(-1, frames, 2).mean(1)


@pytest.mark.parametrize("frames_first", [True, False])
def test_frames_merged_with_the_batch(frames_first: bool) -> None:
    known = samples_seen(Frames(frames_first=frames_first), torch.randn(3, 6, 3, 5, 5))
    assert layers(known) == {True}


def test_windows_cut_from_images() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 2, 3, 2, 3, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 4)
            return self.fc(x).view(-1, 4, 9, 4).sum((1, 2))

    known = samples_seen(Windows(), torch.randn(3, 6, 6, 4))
    assert layers(known) == {True}


class Sorted(nn.Module):
    """Rows of all samples in another order and back, as a mixture of experts has them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 4)
        order = rows.sum(1).argsort(descending=True)
        moved = self.fc(rows[order])
        return torch.zeros_like(moved).index_put((order,), moved).view_as(x)


def test_rows_that_are_sorted_have_no_samples() -> None:
    assert layers(samples_seen(Sorted(), torch.randn(3, 5, 4))) == {False}


class Shares(nn.Module):
    """A layer that sees no sample, and one whose batch is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))
        self.shared, self.doubled = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = self.doubled(torch.cat([x, x.flip(1)]))
        one, other = both.chunk(2)
        return one + other + self.shared(self.table).sum(0)


def test_what_samples_share_or_mix_is_unknown() -> None:
    known = samples_seen(Shares(), torch.randn(3, 4))
    assert known["linear"] is False
    assert known["linear_1"] is False


def test_a_fixed_batch_comes_first() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.arange(2.0)[:, None])

    assert layers(samples_seen(Fixed(), torch.randn(2, 4))) == {True}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_sums_and_orders_by_sample(outer: int, samples: int, inner: int, width: int) -> None:
    owners = torch.arange(samples).repeat_interleave(inner).repeat(outer).double()
    values = (owners[:, None] + torch.zeros(width)).reshape(outer * samples * inner, width)
    stride = inner * width
    sums = sum_per_sample(values, stride, samples)
    assert sums.tolist() == [sample * outer * inner * width for sample in range(samples)]
    rows = samples_first(values, stride, samples, 1)
    assert rows is not None
    assert rows[:, 0].tolist() == torch.arange(samples).repeat_interleave(outer * inner).tolist()
    flat = samples_first(values, stride, samples, 0)
    assert flat is not None
    assert flat.tolist() == rows.flatten().tolist()


def test_samples_inside_a_row_are_refused() -> None:
    assert samples_first(torch.zeros(2, 6), 2, 3, 1) is None
