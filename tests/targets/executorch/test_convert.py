from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.costs.weights import weight_bytes
from fxmpq.errors import BatchError, TargetError
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require
from fxmpq.graph.trace import trace
from fxmpq.targets.convert import convert
from fxmpq.targets.divergence import layer_agreements
from fxmpq.targets.executorch import EXECUTORCH
from fxmpq.targets.executorch.packages import Runtime
from fxmpq.targets.target import Converted, agreement_db

Made = Callable[..., fx.GraphModule]
Samples = list[tuple[Tensor, Tensor]]


def test_the_file_stands_alone(made_net: Converted, samples: Samples) -> None:
    (file,) = made_net.files
    assert [found.name for found in file.parent.iterdir()] == ["model.pte"]
    method = Runtime.get().load_program(file).load_method("forward")
    assert method is not None
    for one, other in zip(method.execute(samples[0]), made_net.run(samples[0]), strict=True):
        assert torch.equal(one, other)


def test_each_layer_runs_the_kernel_that_was_asked_for(made_net: Converted) -> None:
    rows = {row.layer: (row.asked, row.kernel, row.reason) for row in made_net.layers}
    assert rows["first"] == ("w8a8", "Convolution (NHWC, QC8) IGEMM", "")
    assert rows["second"][1:] == rows["first"][1:]
    assert rows["depthwise"] == ("w8a8", "Convolution (NHWC, QC8) DWConv", "")
    assert rows["even"] == ("w4a8", "Fully Connected (NC, QS8, QC4W) GEMM", "")
    assert rows["table"] == ("w4", "portable aten.embedding on stored codes", "")
    assert rows["kept"][:2] == ("fp32", "Fully Connected (NC, F32) GEMM")
    asked, kernel, reason = rows["odd"]
    assert (asked, kernel) == ("w4a8", "Fully Connected (NC, QS8, QC8W) GEMM")
    assert reason.startswith("stored in 8 bits")


def test_it_agrees_with_the_simulation(
    made_net: Converted, net_plan: fx.GraphModule, samples: Samples
) -> None:
    assert made_net.sqnr_db > 35
    agreements = layer_agreements(net_plan, made_net, samples[1])
    names = [entry.layer for entry in agreements]
    assert dict.fromkeys(names) == dict.fromkeys(
        ["first", "second", "depthwise", "even", "table", "odd", ""]
    )
    assert all(entry.sqnr_db > 45 for entry in agreements)


def test_more_samples_than_the_file_takes_run_in_parts(
    made_net: Converted, net_plan: fx.GraphModule
) -> None:
    batch = (torch.randn(19, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(19))
    expected, found = list(run_batch(net_plan, batch)), made_net.run(batch)
    assert [value.shape for value in found] == [value.shape for value in expected]
    assert agreement_db(expected, found) > 40
    for start in (0, 8, 16):
        part = tuple(value[start : start + 8] for value in batch)
        for whole, one in zip(found, made_net.run(part), strict=True):
            assert torch.equal(whole[start : start + 8], one)


def test_files_hold_codes_in_their_width_and_nothing_else(
    calibrated: Made, uniform: Made, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 384)
    graph = calibrated(trace(nn.Sequential(nn.Linear(384, 768)), x), [x], "executorch")
    made = convert(uniform(graph), output=tmp_path, verify=[x])
    (group,) = require(graph, stage="calibrated").groups
    expected = weight_bytes(group, group.candidates[0])
    assert str(group.candidates[0]) == "w4a8dt"
    # Biases are 4 bytes a channel; the rest is the program itself.
    assert 0 < made.files[0].stat().st_size - expected - 4 * 768 < 8_000


class Sentence(nn.Module):
    """Looks words up and mixes them, with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(30, 8), nn.Embedding(12, 8)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(torch.softmax(self.mix(x), -1) + x)


def test_samples_and_sequences_of_free_sizes_run(calibrated: Made, uniform: Made) -> None:
    torch.manual_seed(0)
    batches = [torch.randint(0, 30, (4, length)) for length in (8, 6)]
    plan = uniform(calibrated(trace(Sentence(), batches[0]), batches, "executorch"), 1)
    made = convert(plan, verify=batches)
    assert {row.kernel for row in made.layers if row.asked.endswith("a8")} == {
        "Fully Connected (NC, QS8, QC8W) GEMM"
    }
    for shape in ((1, 12), (9, 3)):
        ids = torch.randint(0, 30, shape)
        assert agreement_db(list(run_batch(plan, ids)), made.run(ids)) > 35
    with pytest.raises(BatchError, match="up to 512 values along dimension 1"):
        made.run(torch.zeros(1, 513, dtype=torch.int64))


def test_linear_layers_may_find_ranges_of_rows_without_being_asked() -> None:
    rules = EXECUTORCH.rules
    found = {
        kind: [str(entry) for entry in rules.candidates_for(kind, rules.default_candidates)]
        for kind in rules.operators
    }
    assert found == {
        "conv": ["w8a8"],
        "linear": ["w4a8dt", "w8a8", "w8a8dt"],
        "embedding": ["w4", "w8"],
    }


class Unusual(nn.Module):
    """Computes what ExecuTorch has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(self.layer(x))


def test_an_operator_without_a_kernel_is_named(calibrated: Made, uniform: Made) -> None:
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    plan = uniform(calibrated(trace(Unusual().eval(), x), [x], "executorch"))
    with pytest.raises(TargetError, match="det.*'reference' does"):
        convert(plan)
