"""Measuring and remembering."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx

from fxmpq.costs.latency import measure
from fxmpq.costs.latency.cut import cut
from fxmpq.costs.latency.measure import Measurer, Wanted
from fxmpq.costs.latency.runtime import Run, Runtime
from fxmpq.costs.latency.store import TimeStore
from fxmpq.costs.measurable import calibrated_on_example
from fxmpq.targets.onnxruntime import ONNXRUNTIME

from .conftest import CALL, CODES_LAYER, CONVERSION, FLOAT_LAYER, Machine


def _measurer(machine: Machine, folder: Path) -> Measurer:
    return Measurer(ONNXRUNTIME.rules, machine.runtime, TimeStore(folder), machine.clock)


def _wanted(graph: fx.GraphModule) -> Wanted:
    wanted = Wanted()
    for end in ("", "_1", "_2"):
        piece = cut(graph, (f"conv2d{end}", f"relu{end}"), f"relu{end}")
        wanted.add(piece, [("w8a8",), ("fp32",)])
    return wanted


def test_equal_pieces_are_asked_for_once(prepared: fx.GraphModule) -> None:
    wanted = _wanted(prepared)
    assert [list(choices) for choices in wanted.choices.values()] == [[("w8a8",), ("fp32",)]] * 2
    assert len(wanted.pieces) == 2


def test_pieces_take_what_the_machine_does(
    prepared: fx.GraphModule, machine: Machine, tmp_path: Path
) -> None:
    found = _measurer(machine, tmp_path).pieces(_wanted(prepared))
    expected = {("w8a8",): CALL + CODES_LAYER + 2 * CONVERSION, ("fp32",): CALL + FLOAT_LAYER}
    assert len(found) == 4
    assert all(seconds == expected[choice] for (_, choice), seconds in found.items())


def test_an_interruption_keeps_what_was_measured(
    prepared: fx.GraphModule, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_AT_ONCE", 1)

    def load(graph: fx.GraphModule) -> Run:
        if len(machine.loaded) == 3:
            raise KeyboardInterrupt
        return machine.load(graph)

    interrupted = Runtime("onnxruntime", load, ("torch",))
    store = TimeStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Measurer(ONNXRUNTIME.rules, interrupted, store, machine.clock).pieces(_wanted(prepared))
    again = Machine()
    assert len(_measurer(again, tmp_path).pieces(_wanted(prepared))) == 4
    assert len(again.loaded) == 2


def test_a_whole_model_is_measured_at_each_choice_once(
    prepared: fx.GraphModule, machine: Machine, tmp_path: Path
) -> None:
    measurer = _measurer(machine, tmp_path)
    real, codes = ("fp32",) * 3, ("w8a8",) * 3
    found = measurer.whole(prepared, [real])
    assert found == {real: CALL + 3 * FLOAT_LAYER}
    # Ranges do not change how fast a model runs.
    found = measurer.whole(calibrated_on_example(prepared), [real, codes])
    assert found[codes] == CALL + 3 * CODES_LAYER + 2 * CONVERSION
    assert machine.loaded == [real, codes]


def test_a_call_takes_time_by_itself(machine: Machine, tmp_path: Path) -> None:
    assert _measurer(machine, tmp_path).call() == CALL


@pytest.mark.parametrize("threads", [1, 2])
def test_other_conditions_are_measured_anew(
    machine: Machine, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    _measurer(machine, tmp_path).call()
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    _measurer(machine, tmp_path).call()
    assert len(machine.loaded) == threads
