from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from fxmpq.errors import BatchError
from fxmpq.targets.executorch.sizes import FreeSizes


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + y, y.sum(0)


def test_outputs_that_hold_a_row_a_sample_are_known() -> None:
    x = torch.ones(2, 3)
    program = export(Two(), (x, x), dynamic_shapes=({0: Dim("n")}, {0: Dim("n")}))
    assert FreeSizes.of(program, [{0: 4}, {0: 4}]) == FreeSizes(({0: 4}, {0: 4}), (True, False))
    assert FreeSizes.of(export(Two(), (x, x)), [{}, {}]).batched == (False, False)


SIZES = FreeSizes(({0: 4, 1: 6}, {0: 4}, {}), (True,))


@pytest.mark.parametrize(("samples", "parts"), [(1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_batches_are_cut_and_put_together(samples: int, parts: list[int]) -> None:
    x, once, fixed = torch.arange(samples * 6).reshape(samples, 6), torch.ones(1), 7
    found = list(SIZES.split([x, once, fixed]))
    assert [len(part[0]) for part in found] == parts
    # What is one row for all samples, and what is no tensor, goes with every part.
    assert all(part[1] is once or samples == 1 for part in found)
    assert all(part[2] == fixed for part in found)
    (joined,) = SIZES.join([[part[0]] for part in found])
    assert torch.equal(joined, x)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(BatchError, match=r"up to 6 values along dimension 1.*\(2, 7\)"):
        list(SIZES.split([torch.ones(2, 7), torch.ones(2), 7]))
    whole = FreeSizes(({0: 4},), (False,))
    assert len(list(whole.split([torch.ones(4)]))) == 1
    with pytest.raises(BatchError, match="up to 4 samples at once, and this batch has 5"):
        list(whole.split([torch.ones(5)]))
