from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from fxmpq.errors import TargetError
from fxmpq.graph.export import quiet_torch
from fxmpq.report.latency import use_threads
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.executorch.loaded import ExecutorchModel, fixed_threads, quiet_runtime
from fxmpq.targets.executorch.lowered import lower_program
from fxmpq.targets.executorch.sizes import FreeSizes


class Volume(nn.Module):
    """A convolution that the portable kernels refuse when they run it."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(x)


def test_a_model_that_cannot_run_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    x = torch.ones(1, 1, 2, 2, 2)
    with quiet_torch():
        program = export(Volume(), (x,))
    loaded = ExecutorchModel(lower_program(program).data, FreeSizes(({},), (False,)))
    # Loading says nothing; what a run fails for is told.
    assert capfd.readouterr() == ("", "")
    with pytest.raises(TargetError, match="cannot run this model.*'reference' does"):
        loaded([x])
    assert capfd.readouterr().err


def test_values_may_lie_in_any_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4)
    with quiet_torch():
        program = export(nn.Conv2d(3, 2, 3), (x,))
    loaded = ExecutorchModel(lower_program(program).data, FreeSizes(({},), (False,)))
    [expected] = loaded([x])
    last, moved = x.to(memory_format=torch.channels_last), x.mT.contiguous().mT
    for other in (last, moved):
        assert not other.is_contiguous()
        assert torch.equal(loaded([other])[0], expected)


def test_threads_are_settled_once() -> None:
    assert EXECUTORCH.conditions is not None
    before = EXECUTORCH.conditions()
    with use_threads(torch.get_num_threads() + 1):
        assert EXECUTORCH.conditions() == before == {"threads": fixed_threads()}
    assert fixed_threads() >= 1


def test_a_file_that_is_none_is_an_error() -> None:
    with pytest.raises(TargetError, match="cannot load the file"):
        ExecutorchModel(b"\0" * 256, FreeSizes((), ()))


def test_standard_error_is_quiet_for_a_while(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_runtime():
        os.write(2, b"hidden")
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
