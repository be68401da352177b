"""The passes and `prepare` are linear in the graph's size, by counting and not by the clock."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch import Tensor, fx, nn

import fxmpq
from fxmpq.graph.export import export_program
from fxmpq.graph.passes import CANONICAL_PASSES
from fxmpq.graph.prepare import insert_quantizers
from fxmpq.graph.state import copy_graph
from fxmpq.graph.trace import trace
from fxmpq.targets.onnxruntime import ONNXRUNTIME

OWN = str(Path(fxmpq.__file__).parent)
BLOCKS = (3, 6, 12)
# A few calls more or fewer are torch's caches, which fill as they are used.
OWN_SLACK, SLACK = 8, 60


class Block(nn.Module):
    """What the passes change, and what groups are formed of; no block is like no other."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)
        self.matrix, self.stack = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(2, 4, 4))
        self.mixer = nn.Parameter(torch.ones(4, 4))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.conv(x.mT))).mT + x
        y = self.shared(self.normed(nn.functional.dropout(y, 0.1, self.training)))
        y = y + (self.query(y) @ self.key(y).mT) @ y @ self.matrix
        y = torch.einsum("bti,ij->btj", y, self.mixer)
        return torch.matmul(y[:, None], self.stack).sum(1)


class Net(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        shared = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*(Block(shared) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Steps:
    """Counts what runs: calls of every function, and lines within fxmpq."""

    def __init__(self) -> None:
        self.counts: Counter[CodeType] = Counter()

    def of(self, work: Callable[..., object]) -> Callable[..., object]:
        """The same work, counted."""

        def counted(*args: object, **kwargs: object) -> object:
            before = sys.gettrace()
            sys.settrace(self._call)
            try:
                return work(*args, **kwargs)
            finally:
                sys.settrace(before)

        return counted

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable | None:
        self.counts[frame.f_code] += 1
        return self._line if frame.f_code.co_filename.startswith(OWN) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable:
        self.counts[frame.f_code] += event == "line"
        return self._line


def grows_faster(counts: list[Counter[CodeType]]) -> Iterator[str]:
    """Functions that run more than twice as often more when the net is twice as large.

    With `a + b n` runs the second increment is twice the first; with `c n^2` four times.
    """
    for code in counts[-1]:
        small, medium, large = (found[code] for found in counts)
        slack = OWN_SLACK if code.co_filename.startswith(OWN) else SLACK
        if large - medium > 2.05 * (medium - small) + slack:
            yield f"{code.co_filename}:{code.co_name}: {small}, {medium}, {large}"


class Exported:
    """A program whose module was made while nothing was counted."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.made = program.module(check_guards=False)

    def module(self, *, check_guards: bool) -> fx.GraphModule:
        return self.made


def uncounted_export(*arguments: object) -> tuple[Exported, object]:
    """torch.export's own time is not ours."""
    counting = sys.gettrace()
    sys.settrace(None)
    program, *rest = export_program(*arguments)
    made = Exported(program)
    sys.settrace(counting)
    return (made, *rest)


STEPS: dict[str, Callable[[fx.GraphModule], object]] = {
    "prepare": lambda graph: insert_quantizers(graph, ONNXRUNTIME.rules),
    "copy": copy_graph,
}


@pytest.fixture(scope="module")
def counts() -> dict[str, list[Counter[CodeType]]]:
    """Per step what ran, for nets of three sizes."""
    found: dict[str, list[Counter[CodeType]]] = {name: [] for name in ("trace", *STEPS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxmpq.graph.trace.export_program", uncounted_export)
        # What is done once in a process is done here.
        insert_quantizers(trace(Net(1), torch.randn(2, 3, 4)), ONNXRUNTIME.rules)
        for blocks in BLOCKS:
            steps = Steps()
            graph = steps.of(trace)(Net(blocks), torch.randn(2, 3, 4))
            found["trace"].append(steps.counts)
            for name, step in STEPS.items():
                steps = Steps()
                steps.of(step)(graph)
                found[name].append(steps.counts)
    return found


@pytest.mark.parametrize("step", ["trace", *STEPS])
def test_nothing_runs_more_often_than_the_graph_grows(
    step: str, counts: dict[str, list[Counter[CodeType]]]
) -> None:
    found = counts[step]
    assert found[2].total() > 1.5 * found[1].total() > 2 * found[0].total()
    assert list(grows_faster(found)) == []


@pytest.mark.parametrize("step", ["trace", *STEPS])
def test_code_is_compiled_a_fixed_number_of_times(
    step: str, counts: dict[str, list[Counter[CodeType]]]
) -> None:
    compiled = [found[fx.GraphModule.recompile.__code__] for found in counts[step]]
    assert len(set(compiled)) == 1
    assert compiled[0] <= len(CANONICAL_PASSES) + 2


def test_what_is_quadratic_is_found() -> None:
    def quadratic(size: int) -> int:
        return sum(1 for one in range(2 * size) for other in range(2 * size))

    def linear(size: int) -> int:
        return sum(1 for one in range(3 * size))

    found = []
    for size in BLOCKS:
        steps = Steps()
        steps.of(quadratic)(size)
        steps.of(linear)(size)
        found.append(steps.counts)
    (line,) = grows_faster(found)
    assert "quadratic" in line or "genexpr" in line
