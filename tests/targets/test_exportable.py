from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.trace import trace
from fxmpq.steps import apply
from fxmpq.targets.convert import convert
from fxmpq.targets.exportable import make_exportable, return_tensors_alone

aten = torch.ops.aten


class Complement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * torch.rsub(mask.unsqueeze(-1), 1.0) + torch.rsub(x, 2)


@pytest.fixture(name="batch")
def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(3, 4, generator=generator), "mask": torch.tensor([0, 1, 0])}


@pytest.fixture(name="graph")
def make_graph(batch: dict[str, Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    return trace(Complement().eval(), batch)


def test_a_number_minus_a_tensor_is_written_as_a_sum_with_the_same_bits(
    graph: fx.GraphModule, batch: dict[str, Tensor]
) -> None:
    expected = graph(**batch)
    assert make_exportable(graph) == 2
    assert not [node for node in graph.graph.nodes if node.target is aten.rsub.Scalar]
    assert torch.equal(graph(**batch), expected)
    graph.graph.lint()


def test_a_factor_is_kept_and_rounded_by_itself() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.rsub(x, 2, alpha=3)

    x = torch.tensor([[0.1, -0.7], [1e4, 0.0]])
    graph = trace(Scaled().eval(), x)
    assert make_exportable(graph) == 1
    assert torch.equal(graph(x), -(3 * x) + 2)


def test_what_the_exporter_takes_is_left_as_it_is(batch: dict[str, Tensor]) -> None:
    graph = trace(nn.Linear(4, 4).eval(), batch["x"])
    code = graph.code
    assert make_exportable(graph) == 0
    assert graph.code == code


def test_the_converted_model_runs_at_another_batch_size(
    graph: fx.GraphModule, batch: dict[str, Tensor], calibrated: Callable[..., fx.GraphModule]
) -> None:
    ready = calibrated(graph, [batch], "onnxruntime")
    planned = apply(ready, {"fc": "w8a8"})
    converted = convert(planned, verify=[{name: value[:2] for name, value in batch.items()}])
    assert converted.sqnr_db > 60


class Labelled(nn.Module):
    """Returns constants between what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"version": 3, "y": self.fc(x), "rest": (None, x, 2.5, x.shape[0])}


def test_only_tensors_are_returned() -> None:
    x = torch.arange(8.0).reshape(2, 4)
    graph = trace(Labelled().eval(), x)
    expected = graph(x)
    # The number of samples is free, so the graph computes it.
    assert expected["rest"][-1] == 2
    return_tensors_alone(graph)
    y, same = graph(x)
    assert torch.equal(y, expected["y"])
    assert torch.equal(same, x)


def test_a_structure_without_constants_is_left_as_it_is(
    graph: fx.GraphModule, batch: dict[str, Tensor]
) -> None:
    code = graph.code
    return_tensors_alone(graph)
    assert graph.code == code
    assert isinstance(graph(**batch), Tensor)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_model_that_returns_numbers_is_converted(
    target: str, calibrated: Callable[..., fx.GraphModule]
) -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    ready = calibrated(trace(Labelled().eval(), x), [x], target)
    made = convert(apply(ready, {"fc": "w8a8"}), verify=[x])
    assert [tuple(found.shape) for found in made.run(x)] == [(4, 4), (4, 4)]
