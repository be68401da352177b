from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.refinement.bias_correction import bias_correction
from fxmpq.refinement.channel_statistics import channel_statistics
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk

Subject = Any


def correct(
    graph: fx.GraphModule, batches: list, units: Units | None = None
) -> tuple[fx.GraphModule, list[Refinement]]:
    corrected = copy_graph(graph)
    with torch.no_grad():
        return corrected, bias_correction(corrected, batches, units=units or Units())


def test_every_channel_has_its_float_mean_afterwards(subject: Subject) -> None:
    corrected, done = correct(subject.planned, subject.batches)
    found = iter(done)
    for view in Walk(corrected, subject.batches).layers():
        if view.correction is None:
            continue
        statistics = channel_statistics(view)
        size = (statistics.mean.square() + statistics.variance).sum().sqrt()
        assert float(statistics.error_mean.abs().max()) <= 1e-5 * float(size)
        entry = next(found)
        assert (entry.method, entry.layer) == ("bias_correction", view.layer.name)
        assert entry.after == pytest.approx(view.error(), rel=1e-3, abs=1e-9)
        assert entry.after <= entry.before
    assert next(found, None) is None


def test_only_shifts_change(subject: Subject) -> None:
    corrected, done = correct(subject.planned, subject.batches)
    assert done
    before, after = subject.planned.state_dict(), corrected.state_dict()
    changed = {name for name in after if name not in before or after[name] is not before[name]}
    same = {n for n in changed if n in before and torch.equal(after[n], before[n])}
    assert all(".shift_" in name for name in changed - same)
    assert changed - same


def test_the_shift_of_one_layer_is_the_mean_error(plan_of: Callable) -> None:
    torch.manual_seed(0)
    batches = [torch.rand(n, 6) for n in (7, 4)]
    subject = plan_of(nn.Sequential(nn.Linear(6, 3, bias=False)), batches, ("w2a4",))
    corrected, [entry] = correct(subject.planned, batches)

    def mean_error(graph: fx.GraphModule) -> Tensor:
        with torch.no_grad():
            errors = [graph(batch) - subject.calibrated(batch) for batch in batches]
        return torch.cat(errors).mean(dim=0)

    [before] = [m for n, m in subject.planned.state_dict().items() if ".shift_" in n]
    [after] = [m for n, m in corrected.state_dict().items() if ".shift_" in n]
    assert float(mean_error(subject.planned).abs().max()) > 1e-4
    assert torch.allclose(after, before - mean_error(subject.planned), atol=1e-6)
    assert entry.after < entry.before


def test_an_interrupted_run_goes_on_with_the_same_bits(
    subject_of: Callable, tmp_path: Path
) -> None:
    subject = subject_of("conv")
    whole, done = correct(subject.planned, subject.batches, Units(tmp_path, {}))
    again, same = correct(subject.planned, subject.batches, Units(tmp_path, {}))
    assert same == done
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
