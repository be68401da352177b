"""After refinement the converted model still agrees with the simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxmpq
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import Refinement, copy_graph
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.refinement.methods import METHODS, Method
from fxmpq.refinement.units import Units
from fxmpq.refinement.walk import Walk

Subject = Any


def everything(graph: fx.GraphModule, batches: list, *, units: Units) -> list[Refinement]:
    """Stands for all methods at once: codes next to the nearest, other scales, biases, ranges."""
    generator = torch.Generator().manual_seed(0)
    done = []
    for view in Walk(graph, batches).layers():
        before = view.error()
        found, quantizer = view.number_format, view.quantizer
        if view.is_first:
            factor = 0.9 + 0.2 * torch.rand(quantizer.scale(found).shape, generator=generator)
            quantizer.set_scale(found, quantizer.scale(found) * factor)
            real = view.weight / quantizer.spread_scale(view.weight, found)
            up = torch.rand(real.shape, generator=generator) < real - real.floor()
            codes = (real.floor() + up).clamp(found.qmin, found.qmax)
            quantizer.set_codes(found, codes)
        if view.correction is not None:
            noise = torch.randn(len(view.weight), generator=generator) * 0.05
            view.set_bias(noise if view.float_bias is None else view.float_bias + noise)
        if view.input_quantizer is not None and view.layer.name.endswith(("2", "fc", "dense")):
            active = view.input_quantizer.active
            old = view.input_quantizer.ranges[active.name]
            # As runtimes hold it: in float32.
            scale = float(torch.tensor(old.scale * 1.1))
            view.input_quantizer.ranges[active.name] = ActivationRange(scale, old.zero_point)
        done.append(Refinement("everything", view.layer.name, before, view.error()))
    return done


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> Callable[[Subject], fx.GraphModule]:
    monkeypatch.setitem(METHODS, "everything", Method(everything))

    def refine(subject: Subject) -> fx.GraphModule:
        graph = copy_graph(subject.planned)
        return fxmpq.refine(graph, None, subject.batches, method="everything", progress=False)

    return refine


def leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in outputs if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", ["conv", "bert", "vit", "tied", "two_inputs"])
def test_the_reference_target_agrees_to_the_last_bit(
    subject_of: Callable[[str], Subject], refined: Callable[..., fx.GraphModule], name: str
) -> None:
    subject = subject_of(name)
    graph = refined(subject)
    converted = fxmpq.convert(graph, verify=subject.batches)
    assert converted.sqnr_db == float("inf")
    for batch in subject.batches:
        expected = leaves(run_batch(graph, batch))
        for one, other in zip(converted.run(batch), expected, strict=True):
            assert torch.equal(one, other)
        # The refinement is in it: the graph from before gives something else.
        before = leaves(run_batch(subject.planned, batch))
        assert not torch.equal(before[0], expected[0])


@pytest.mark.parametrize("name", ["conv_onnxruntime", "bert_onnxruntime"])
def test_onnxruntime_agrees_beyond_35_decibels(
    subject_of: Callable[[str], Subject], refined: Callable[..., fx.GraphModule], name: str
) -> None:
    subject = subject_of(name)
    graph = refined(subject)
    converted = fxmpq.convert(graph, verify=subject.batches)
    assert converted.sqnr_db > 35
    for batch in subject.batches:
        one, other = converted.run(batch)[0], leaves(run_batch(subject.planned, batch))[0]
        distance = float((one - other).square().sum() / other.square().sum())
        assert distance > 10 ** (-converted.sqnr_db / 10)


def test_an_exported_file_holds_the_refinement(
    subject_of: Callable[[str], Subject], refined: Callable[..., fx.GraphModule], tmp_path: Path
) -> None:
    subject = subject_of("conv")
    graphs = {"old": subject.planned, "new": refined(subject), "again": refined(subject)}
    contents = {
        name: fxmpq.convert(graph, output=tmp_path / name).files[0].read_bytes()
        for name, graph in graphs.items()
    }
    assert contents["new"] == contents["again"]
    assert contents["new"] != contents["old"]
