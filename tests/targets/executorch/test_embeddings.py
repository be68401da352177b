from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxmpq.formats import Precision
from fxmpq.graph.run import run_batch
from fxmpq.graph.switch import with_choices
from fxmpq.graph.trace import trace
from fxmpq.targets.decomposed import to_decomposed
from fxmpq.targets.executorch.embeddings import pack_embeddings, packed_columns
from fxmpq.targets.lowering import finish

Made = Callable[..., fx.GraphModule]


@given(
    bits=st.sampled_from([2, 4]), rows=st.integers(1, 3), width=st.integers(1, 9), data=st.data()
)
@settings(deadline=None, max_examples=40)
def test_columns_come_back(bits: int, rows: int, width: int, data: st.DataObject) -> None:
    half = 1 << (bits - 1)
    values = st.lists(st.integers(-half, half - 1), min_size=width, max_size=width)
    codes = [data.draw(values) for _ in range(rows)]
    packed = packed_columns(torch.tensor(codes, dtype=torch.int8), bits)
    step = -(-width * bits // 8)
    assert packed.dtype is torch.uint8
    assert packed.shape == (rows, step)
    for row, stored in zip(codes, packed.tolist(), strict=True):
        for column, code in enumerate(row):
            byte, run = column % step, column // step
            assert (stored[byte] >> (run * bits)) % (2 * half) - half == code


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 11)

    def forward(self, index: Tensor) -> Tensor:
        return self.words(index)


@pytest.mark.parametrize(
    ("precision", "columns", "dtype"),
    [("w2", 3, torch.uint8), ("w4", 6, torch.uint8), ("w8", 11, torch.int8), ("w4b4", 6, None)],
)
def test_look_ups_give_the_bits_of_the_simulation(
    calibrated: Made, precision: str, columns: int, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    index = torch.tensor([[3, 0, 19], [7, 7, 1]])
    graph = calibrated(
        trace(Table(), index), [index], "executorch", candidates=[Precision.parse(precision)]
    )
    plan = with_choices(graph, {"words": precision})
    rewritten = to_decomposed(plan, signed=True)
    pack_embeddings(rewritten)
    finish(rewritten)
    assert torch.equal(rewritten(index), run_batch(plan, index)[0])
    tables = [value for _, value in rewritten.named_buffers() if not value.is_floating_point()]
    assert [tuple(table.shape) for table in tables] == [(20, columns)]
    assert tables[0].dtype is (dtype or torch.uint8)


def test_float_tables_stay_as_they_are() -> None:
    index = torch.tensor([[3, 0]])
    graph = trace(Table(), index)
    before = [node.name for node in graph.graph.nodes]
    pack_embeddings(graph)
    assert [node.name for node in graph.graph.nodes] == before
