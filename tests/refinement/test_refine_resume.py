from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import fx

import fxmpq
from fxmpq.errors import FileFormatError, FxmpqError
from fxmpq.graph.state import state_of
from fxmpq.refinement.methods import METHODS, Method
from fxmpq.refinement.units import Units

from .conftest import RAN, Subject, assert_same, contents, flip, refine

pytestmark = pytest.mark.usefixtures("stand_ins")


def test_an_interrupted_run_goes_on(conv: Subject, tmp_path: Path) -> None:
    expected = refine(conv.planned, None, conv.batches, "flip")
    order = list(RAN)
    RAN.clear()
    folder = tmp_path / "run"

    class KilledError(Exception):
        pass

    def killed(graph: fx.GraphModule, batches: list, *, units: Units, **rest: Any) -> Any:
        original = Units.unit

        def unit(self: Units, name: str, *args: Any) -> list[float]:
            if len(RAN) == 2:
                raise KilledError
            return original(self, name, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Units, "unit", unit)
            return flip(graph, batches, units=units)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "flip", Method(killed, rounds=True))
        # The stand-in takes the same options, so that it is the same run.
        patch.setattr(killed, "__signature__", inspect.signature(flip), raising=False)
        with pytest.raises(KilledError):
            refine(conv.planned, None, conv.batches, "flip", resume=folder)
    assert list(RAN) == order[:2]
    RAN.clear()
    resumed = refine(conv.planned, None, conv.batches, "flip", resume=folder)
    assert list(RAN) == order[2:]
    assert_same(contents(resumed), contents(expected))
    assert state_of(resumed).refinements == state_of(expected).refinements


@pytest.mark.parametrize("what", ["option", "plan", "data", "codes", "method"])
def test_another_run_is_not_gone_on_with(
    conv: Subject, choices: dict[str, str], tmp_path: Path, caplog: Any, what: str
) -> None:
    refine(conv.planned, None, conv.batches, "flip", resume=tmp_path)
    RAN.clear()
    with caplog.at_level(logging.WARNING, "fxmpq.journal"):
        refine(conv.planned, None, conv.batches, "flip", resume=tmp_path, seed=0)
    assert (RAN, caplog.text) == ([], "")  # a default is the same run
    request: dict[str, Any] = {"plan": None, "batches": conv.batches, "method": "flip"}
    graph = conv.planned
    if what == "option":
        request["seed"] = 1
    elif what == "plan":
        request["plan"] = {**choices, "fc": "w8a8" if choices["fc"] != "w8a8" else "w3a8"}
    elif what == "data":
        request["batches"] = [batch + 0.5 for batch in conv.batches]
    elif what == "codes":
        graph = refine(conv.planned, None, conv.batches, "widen")
    else:
        request["method"] = "flip and widen"
    with caplog.at_level(logging.WARNING, "fxmpq.journal"):
        refined = refine(graph, request.pop("plan"), **request, resume=tmp_path)
    assert "belongs to another run" in caplog.text
    assert len(RAN) == sum(found.method == "flip" for found in state_of(refined).refinements)


def test_a_value_that_is_refused_leaves_the_folder_as_it_was(conv: Subject, tmp_path: Path) -> None:
    folder = tmp_path / "layers"
    request: dict[str, Any] = {"method": "gptq", "resume": folder, "progress": False}
    with pytest.raises(FxmpqError, match="damping must be"):
        fxmpq.refine(conv.planned, None, conv.batches, damping=-1.0, **request)
    assert not folder.exists()
    fxmpq.refine(conv.planned, None, conv.batches, **request)
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(FxmpqError, match="damping must be"):
        fxmpq.refine(conv.planned, None, conv.batches, damping=-1.0, **request)
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept


def test_a_file_is_no_folder_to_resume_from(conv: Subject, tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("x")
    with pytest.raises(FileFormatError, match="is a file"):
        refine(conv.planned, None, conv.batches, "flip", resume=tmp_path / "journal")
