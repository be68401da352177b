from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from fxmpq.graph.export import quiet_torch
from fxmpq.targets.executorch.lowered import lower_program
from fxmpq.targets.executorch.places import Place


class Shared(nn.Module):
    """A weight that two calls read, around a kernel that XNNPACK has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)

    def forward(self, index: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.layer(self.table(index))))
        return self.layer(self.norm(x))


@pytest.fixture(scope="module")
def places() -> dict[str, list[Place]]:
    index = torch.tensor([1, 4])
    with quiet_torch():
        program = export(Shared(), (index,))
    return lower_program(program).places


def test_calls_are_found_in_the_order_they_run(places: dict[str, list[Place]]) -> None:
    linear = "aten.linear"
    expected = [Place(linear, 0, 0), Place(linear, 0, 1), Place(linear, 1, 0)]
    assert places["layer.weight"] == expected


def test_what_xnnpack_does_not_run_is_in_no_call(places: dict[str, list[Place]]) -> None:
    assert places["table.weight"] == [Place("aten.embedding")]
    assert set(places) == {"layer.weight", "table.weight"}
