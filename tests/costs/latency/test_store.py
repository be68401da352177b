"""Times on disk."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from fxmpq.costs.latency.store import TimeStore, cache_folder

KEY = {"cpu": "a", "threads": 1, "precisions": ["w8a8"]}


def test_a_time_is_found_again_to_the_last_bit(tmp_path: Path) -> None:
    TimeStore(tmp_path).keep(KEY, 0.1 + 0.2)
    assert TimeStore(tmp_path).find(dict(reversed(KEY.items()))) == 0.1 + 0.2


@pytest.mark.parametrize("name", KEY)
def test_all_of_the_key_decides(tmp_path: Path, name: str) -> None:
    store = TimeStore(tmp_path)
    store.keep(KEY, 1.0)
    assert store.find({**KEY, name: "other"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": -1},
        {"seconds": True},
        {"seconds": "0.5"},
        {"seconds": None},
        {"schema": "fxmpq.plan"},
        {"version": 0},
        {"key": {"cpu": "b"}},
    ],
)
def test_what_is_damaged_counts_as_missing(tmp_path: Path, change: dict[str, object]) -> None:
    store = TimeStore(tmp_path)
    store.keep(KEY, 1.0)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert store.find(KEY) is None
    store.keep(KEY, 2.0)
    assert store.find(KEY) == 2.0


@pytest.mark.parametrize("text", ["", "{", "NaN", '"x"', '{"seconds": NaN}', "\x00"])
def test_so_does_what_is_no_json(tmp_path: Path, text: str) -> None:
    store = TimeStore(tmp_path)
    store.keep(KEY, 1.0)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert store.find(KEY) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = TimeStore(tmp_path / "file" / "folder")
    store.keep(KEY, 1.0)
    assert store.find(KEY) is None


def test_the_folder_is_the_users_to_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXMPQ_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FXMPQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fxmpq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fxmpq"


def test_nor_is_it_where_the_file_cannot_be_one(tmp_path: Path) -> None:
    store = TimeStore(tmp_path)
    store.keep(KEY, 1.0)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    assert store.find(KEY) is None
    store.keep(KEY, 2.0)
    assert list(tmp_path.iterdir()) == [file]


def test_without_a_home_it_lies_beside_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FXMPQ_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() == Path(tempfile.gettempdir()) / "fxmpq"
