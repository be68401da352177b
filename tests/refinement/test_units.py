from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fxmpq.errors import FileFormatError
from fxmpq.graph.state import copy_graph
from fxmpq.quantizers.modules import ActivationQuantizer, BiasCorrection, WeightQuantizer
from fxmpq.quantizers.ranges import ActivationRange
from fxmpq.refinement.units import Units, quantizer_tensors, set_quantizer_tensors
from fxmpq.refinement.views import LayerView
from fxmpq.refinement.walk import Walk

Subject = Any
RUN = {"method": "shake", "seed": 1}


class KilledError(Exception):
    """Stands for a killed process."""


def change(view: LayerView, *, is_killed: bool) -> list[float]:
    """Change everything that a layer has, from what it reads of the layers before."""
    if is_killed:
        raise KilledError
    before, found, quantizer = view.error(), view.number_format, view.quantizer
    mean = float(view.input(0).float().mean())
    codes = quantizer.codes(view.weight, found).float() + (1 if mean > 0 else -1)
    quantizer.set_codes(found, codes.clamp(found.qmin, found.qmax))
    quantizer.set_scale(found, quantizer.scale(found) * 0.99)
    if view.correction is not None:
        view.set_bias(torch.full((len(view.weight),), mean / 3))
    if view.input_quantizer is not None:
        ranges, name = view.input_quantizer.ranges, view.input_quantizer.active.name
        ranges[name] = ActivationRange(ranges[name].scale * 1.01, ranges[name].zero_point)
    return [before, view.error()]


def shake(graph: fx.GraphModule, batches: list, units: Units, stop: int = -1) -> list[list[float]]:
    """Change one layer after the other, each in a unit; the process is killed in one of them."""
    numbers = []
    for position, view in enumerate(Walk(graph, batches).layers()):
        work = partial(change, view, is_killed=position == stop)
        numbers.append(units.unit(f"shake {view.layer.name}", graph, view.modules, work))
    return numbers


def contents(graph: fx.GraphModule) -> dict[str, Any]:
    """Everything that a refinement may change."""
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in graph.named_buffers()}
    for name, module in graph.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[name] = dict(module.ranges)
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype
            assert torch.equal(value, other[name])
        else:
            assert value == other[name]


@pytest.fixture(params=["conv", "bert_onnxruntime"])
def work(request: pytest.FixtureRequest, subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of(request.param)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_an_interrupted_run_ends_with_the_same_bits(
    work: Subject, tmp_path: Path, share: float
) -> None:
    plain = copy_graph(work.planned)
    numbers = shake(plain, work.batches, Units())
    stop = round(share * (len(numbers) - 1))
    with pytest.raises(KilledError):
        shake(copy_graph(work.planned), work.batches, Units(tmp_path / "run", RUN), stop)
    resumed = copy_graph(work.planned)
    again = shake(resumed, work.batches, Units(tmp_path / "run", RUN))
    assert again == numbers
    assert_same(contents(resumed), contents(plain))
    finished = copy_graph(work.planned)
    units = Units(tmp_path / "run", RUN)
    assert shake(finished, work.batches, units, stop=0) == numbers  # nothing is computed
    assert_same(contents(finished), contents(plain))


def test_every_single_position_may_be_the_last(
    subject_of: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subject_of("conv")
    plain = copy_graph(subject.planned)
    numbers = shake(plain, subject.batches, Units())
    for stop in range(len(numbers)):
        graph = copy_graph(subject.planned)
        with pytest.raises(KilledError):
            shake(graph, subject.batches, Units(tmp_path, RUN), stop)
        assert len(list(tmp_path.glob("*.safetensors"))) == stop
    last = copy_graph(subject.planned)
    assert shake(last, subject.batches, Units(tmp_path, RUN)) == numbers
    assert_same(contents(last), contents(plain))


def test_an_interruption_between_file_and_line_does_the_unit_anew(
    subject_of: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subject_of("conv")
    numbers = shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN))
    journal = tmp_path / "units.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))  # the header and two units
    for file in sorted(tmp_path.glob("*.safetensors"))[2:]:
        file.write_bytes(b"cut off")
    graph = copy_graph(subject.planned)
    assert shake(graph, subject.batches, Units(tmp_path, RUN)) == numbers


def test_a_unit_whose_file_is_gone_is_done_anew(
    subject_of: Callable[[str], Subject], tmp_path: Path
) -> None:
    subject = subject_of("conv")
    numbers = shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN))
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    graph = copy_graph(subject.planned)
    assert shake(graph, subject.batches, Units(tmp_path, RUN)) == numbers
    assert len(list(tmp_path.glob("*.safetensors"))) == len(numbers)


def test_another_runs_folder_is_set_aside_with_a_warning(
    subject_of: Callable[[str], Subject], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = subject_of("conv")
    with pytest.raises(KilledError):
        shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN), 3)
    kept = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    units = Units(tmp_path, {**RUN, "seed": 2})
    with (
        caplog.at_level(logging.WARNING, "fxmpq.journal"),
        pytest.raises(KilledError),
    ):
        shake(copy_graph(subject.planned), subject.batches, units, 1)
    assert "belongs to another run (seed differ)" in caplog.text
    # The journal that was set aside still has its own files.
    (tmp_path / "units.journal.old").replace(tmp_path / "units.journal")
    shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, {**RUN, "seed": 2}))
    assert all(file.read_bytes() == content for file, content in kept.items())


@pytest.mark.parametrize("content", [b"", b"junk", "an array of another module"])
def test_damaged_files_are_clear_errors(
    subject_of: Callable[[str], Subject], tmp_path: Path, content: bytes | str
) -> None:
    subject = subject_of("conv")
    shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN))
    file = sorted(tmp_path.glob("*.safetensors"))[2]
    if isinstance(content, str):
        from safetensors.torch import save_file

        save_file({"quantizers.nothing/scale_int3": torch.ones(1)}, file)
    else:
        file.write_bytes(content)
    message = f"{file.name} does not hold what an interrupted run.*Delete it"
    with pytest.raises(FileFormatError, match=message):
        shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN))
    file.unlink()
    shake(copy_graph(subject.planned), subject.batches, Units(tmp_path, RUN))


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.journal"
    file.write_text("{}")
    with pytest.raises(FileFormatError, match="are kept in a folder, but .* is a file"):
        Units(file, RUN)
    (tmp_path / "units.journal").write_text("hello")
    with pytest.raises(FileFormatError, match="is no journal"):
        Units(tmp_path, RUN)


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert Units().unit("a", fx.GraphModule({}, fx.Graph()), (), lambda: [1, 2.5]) == [1.0, 2.5]
    assert list(tmp_path.iterdir()) == []


def test_what_a_unit_took_away_is_taken_away_again(
    subject_of: Callable[[str], Subject], tmp_path: Path
) -> None:
    graph = copy_graph(subject_of("conv").planned)
    view = next(Walk(graph, subject_of("conv").batches).layers())
    correction, found = view.correction, view.number_format

    def take_away() -> list[float]:
        correction.set_shift(found, None)
        return []

    for _ in range(2):
        correction.set_shift(found, torch.ones(len(view.weight)))
        Units(tmp_path, RUN).unit("take away", graph, view.modules, take_away)
        assert correction.shift(found) is None


def test_a_unit_may_change_nothing(tmp_path: Path) -> None:
    graph = fx.GraphModule({}, fx.Graph())
    for _ in range(2):
        assert Units(tmp_path, RUN).unit("a", graph, (), lambda: [0.25]) == [0.25]
    lines = (tmp_path / "units.journal").read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == [["0 a", [0.25]]]


def test_units_of_one_name_are_told_apart_by_their_order(tmp_path: Path) -> None:
    graph = fx.GraphModule({}, fx.Graph())
    for _ in range(2):
        units = Units(tmp_path, RUN)
        assert units.unit("a", graph, (), lambda: [1.0]) == [1.0]
        assert units.unit("a", graph, (), lambda: [2.0]) == [2.0]


def test_track_goes_through_what_it_is_given() -> None:
    assert not Units().shown
    assert Units(shown=True).shown
    assert list(Units().track(iter("abc"), "letters", total=3)) == ["a", "b", "c"]


def test_tensors_of_a_module_make_an_equal_one(work: Subject) -> None:
    graph = copy_graph(work.planned)
    shake(graph, work.batches, Units())
    fresh = copy_graph(work.planned)
    seen = set()
    for name, module in graph.named_modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer, BiasCorrection)):
            seen.add(type(module))
            found = quantizer_tensors(module)
            set_quantizer_tensors(fresh.get_submodule(name), found, torch.device("cpu"))
    assert len(seen) == 3
    assert_same(contents(fresh), contents(graph))


def test_what_the_tensors_lack_is_taken_away(subject_of: Callable[[str], Subject]) -> None:
    graph = copy_graph(subject_of("conv").planned)
    view = next(Walk(graph, subject_of("conv").batches).layers())
    without = quantizer_tensors(view.quantizer)
    view.quantizer.set_codes(view.number_format, torch.zeros_like(view.weight))
    assert view.quantizer.stored_codes(view.number_format) is not None
    set_quantizer_tensors(view.quantizer, without, torch.device("cpu"))
    assert view.quantizer.stored_codes(view.number_format) is None
