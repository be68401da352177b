"""What holds for every method of refinement, whatever it does."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fxmpq
from fxmpq.graph.run import run_batch
from fxmpq.graph.state import require, state_of
from fxmpq.quantizers.modules import ActivationQuantizer
from fxmpq.refinement.methods import METHODS, Method
from fxmpq.refinement.units import Units
from fxmpq.steps import prepare

from .conftest import assert_same

Subject = Any

# Every method with options that make it quick.
QUICK: dict[str, dict[str, object]] = {
    "equalization": {},
    "gptq": {},
    "bias_correction": {},
    "norm_reestimation": {},
    "adaround": {"steps": 8},
    "adaquant": {"steps": 4},
    "brecq": {"steps": 4},
    "bias_tuning": {"epochs": 1},
}
SUBJECTS = ("conv", "bert")


@pytest.fixture(params=QUICK)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    found = getattr(importlib.import_module(f"fxmpq.refinement.{name}"), name)
    monkeypatch.setitem(METHODS, name, METHODS.get(name, Method(found)))
    return name


def refine(subject: Subject, method: str, **rest: Any) -> fx.GraphModule:
    options = {"progress": False, **QUICK[method], **rest}
    return fxmpq.refine(subject.planned, None, subject.batches, method=method, **options)


def contents(graph: fx.GraphModule) -> dict[str, Any]:
    """Everything that a refinement may change, copied."""
    found: dict[str, Any] = {name: t.clone() for name, t in graph.state_dict().items()}
    for name, module in graph.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[name] = copy.deepcopy(module.ranges)
    return found


def test_every_method_is_in_this_contract_but_those_that_train() -> None:
    assert {name for name, entry in METHODS.items() if not entry.trains} <= set(QUICK)


@pytest.mark.parametrize("name", SUBJECTS)
def test_it_changes_nothing_it_was_given_and_agrees_after_conversion(
    subject_of: Callable[[str], Subject], method: str, name: str
) -> None:
    subject = subject_of(name)
    before, batches = contents(subject.planned), copy.deepcopy(subject.batches)
    outputs = [run_batch(subject.planned, batch)[0] for batch in subject.batches]
    state = torch.get_rng_state()
    refined = refine(subject, method)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(contents(subject.planned), before)
    for batch, old, output in zip(subject.batches, batches, outputs, strict=True):
        leaves = zip(
            *(b.values() if isinstance(b, dict) else [b] for b in (batch, old)), strict=True
        )
        assert all(torch.equal(a, b) for a, b in leaves)
        assert torch.equal(run_batch(subject.planned, batch)[0], output)
    assert all(p.grad is None for p in subject.planned.parameters())
    # What it returns is a graph like any other.
    assert not any(p.is_inference() for p in refined.parameters())
    assert not any(buffer.requires_grad for buffer in refined.buffers())
    found = state_of(refined)
    assert found.choices == state_of(subject.planned).choices
    assert {entry.method for entry in found.refinements} <= {method}
    assert all(entry.before >= 0 and entry.after >= 0 for entry in found.refinements)
    assert fxmpq.convert(refined, verify=subject.batches).sqnr_db == float("inf")


@pytest.mark.parametrize("name", SUBJECTS)
def test_equal_runs_give_equal_bits_within_inference_mode_too(
    subject_of: Callable[[str], Subject], method: str, name: str
) -> None:
    subject = subject_of(name)
    one = refine(subject, method)
    torch.manual_seed(99)
    with torch.inference_mode():
        other = refine(subject, method)
    assert_same(contents(one), contents(other))
    assert state_of(one).refinements == state_of(other).refinements


def test_it_takes_batches_of_inference_mode_and_gives_none_a_gradient(
    subject_of: Callable[[str], Subject], method: str
) -> None:
    subject = subject_of("conv")
    expected = refine(subject, method)
    with torch.inference_mode():
        inferred = [batch.clone() for batch in subject.batches]
    watched = [batch.clone().requires_grad_() for batch in subject.batches]
    options = {"progress": False, "method": method, **QUICK[method]}
    for batches in (inferred, watched):
        assert_same(
            contents(fxmpq.refine(subject.planned, None, batches, **options)), contents(expected)
        )
    assert all(batch.grad is None for batch in watched)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_interrupted_run_ends_with_the_same_bits(
    subject_of: Callable[[str], Subject], method: str, share: float, tmp_path: Path
) -> None:
    subject = subject_of("conv")
    names: list[str] = []
    original = Units.unit

    def unit(self: Units, name: str, *args: Any) -> list[float]:
        names.append(name)
        if len(names) == stop:
            raise KeyboardInterrupt
        return original(self, name, *args)

    stop = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Units, "unit", unit)
        whole = refine(subject, method)
        stop = max(1, round(share * len(names)))
        is_cut = bool(names)
        names.clear()
        if is_cut:
            with pytest.raises(KeyboardInterrupt):
                refine(subject, method, resume=tmp_path)
    resumed = refine(subject, method, resume=tmp_path)
    again = refine(subject, method, resume=tmp_path)
    for found in (resumed, again):
        assert_same(contents(found), contents(whole))
        assert state_of(found).refinements == state_of(whole).refinements


@pytest.fixture(scope="module")
def floats(conv_graph: fx.GraphModule, images: list[Tensor]) -> fx.GraphModule:
    names = ["we4m3ae4m3", "w4b4a8", "w4a8"]
    return fxmpq.calibrate(
        prepare(conv_graph, "reference", candidates=names), images, progress=False
    )


@pytest.mark.parametrize("precision", ["we4m3ae4m3", "w4b4a8"])
def test_it_goes_with_float_formats_and_blocks(
    floats: fx.GraphModule, images: list[Tensor], method: str, precision: str
) -> None:
    groups = require(floats, stage="calibrated").groups
    choices = {group.name: precision for group in groups}
    choices["fc"] = "w4a8"
    options = {"progress": False, **QUICK[method]}
    refined = fxmpq.refine(floats, choices, images, method=method, **options)
    assert torch.isfinite(refined(images[0])).all()
    assert fxmpq.convert(refined).sqnr_db == float("inf")


def test_nothing_is_done_where_all_is_float(
    conv_graph: fx.GraphModule, images: list[Tensor], method: str
) -> None:
    graph = prepare(conv_graph, "reference", candidates=["fp32", "w8a8"])
    graph = fxmpq.calibrate(graph, images, progress=False)
    choices = {group.name: "fp32" for group in state_of(graph).groups}
    options = {"progress": False, **QUICK[method]}
    refined = fxmpq.refine(graph, choices, images, method=method, **options)
    assert torch.allclose(refined(images[0]), graph(images[0]), rtol=1e-4, atol=1e-5)
    assert not [found for found in state_of(refined).refinements if found.layer]


@pytest.mark.parametrize("name", ["gptq", "adaround"])
def test_rounding_methods_stitch(
    floats: fx.GraphModule, images: list[Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = getattr(importlib.import_module(f"fxmpq.refinement.{name}"), name)
    monkeypatch.setitem(METHODS, name, Method(found, rounds=True))
    options = {"progress": False, **QUICK[name]}
    stitched = fxmpq.refine(floats, None, images, method=name, **options)
    entries = state_of(stitched).refinements
    assert {entry.weight_format for entry in entries} == {"int4", "int4b4"}
    assert all(entry.after <= entry.before for entry in entries)
    groups = require(floats, stage="calibrated").groups
    for precision in ("w4a8", "w4b4a8"):
        choices = {group.name: precision for group in groups}
        planned = fxmpq.apply(stitched, choices)
        alone = fxmpq.refine(floats, choices, images, method=name, **options)
        # All layers at one format is what each copy was rounded for.
        assert torch.equal(planned(images[0]), alone(images[0]))
        assert not torch.equal(planned(images[0]), fxmpq.apply(floats, choices)(images[0]))
        assert fxmpq.convert(planned).sqnr_db == float("inf")
