from __future__ import annotations

import pytest
import torch

from fxmpq.formats import Precision
from fxmpq.quantizers.dynamic import fake_quantize_dynamic
from fxmpq.targets import qdq_operators


@pytest.mark.parametrize(
    "name", ["fake_quantize", "fake_quantize_rows", "widened_codes", "stored_numbers"]
)
def test_operators_are_as_they_say(name: str) -> None:
    codes = torch.tensor([[1, -2, 0], [3, -4, 2]], dtype=torch.int8)
    arguments = {
        "fake_quantize": (torch.randn(2, 3), 0.1, 3, 8, 0),
        "fake_quantize_rows": (torch.randn(2, 3), 8, 0),
        "widened_codes": (codes, 4, 0),
        "stored_numbers": (codes, 4, 0),
    }
    torch.library.opcheck(getattr(qdq_operators, name), arguments[name])


def test_rows_are_rounded_on_their_own() -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)) + 1
    found = qdq_operators.fake_quantize_rows(x, 8, 0)
    assert torch.equal(found, fake_quantize_dynamic(x, Precision.parse("a8dt").activation))
    rows = [qdq_operators.fake_quantize_rows(row, 8, 0) for row in x.reshape(-1, 6)]
    assert torch.equal(found, torch.stack(rows).reshape(x.shape))
    assert qdq_operators.fake_quantize_rows(torch.empty(0, 3), 8, 0).shape == (0, 3)
