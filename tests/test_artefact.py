from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.artefact import build, check_fields, dump_json, load_json, write_atomically
from fxmpq.errors import FileFormatError, FxmpqError

SCHEMA = "fxmpq.thing"

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.text("abcdefgh", min_size=1, max_size=6)


@given(st.dictionaries(names, plain, max_size=4))
def test_plain_data_round_trips(fields: dict[str, Any]) -> None:
    assert load_json(SCHEMA, 3, dump_json(SCHEMA, 3, fields)) == fields


def test_a_file_holds_the_returned_text(tmp_path: Path) -> None:
    path = tmp_path / "thing.json"
    text = dump_json(SCHEMA, 1, {"a": [1, 2.5, "ä"]}, path)
    assert path.read_text(encoding="utf-8") == text
    assert load_json(SCHEMA, 1, path) == load_json(SCHEMA, 1, str(path)) == {"a": [1, 2.5, "ä"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["thing.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, value: object
) -> None:
    path = tmp_path / "thing.json"
    path.write_text("old")
    with pytest.raises(FileFormatError, match=f"cannot write {SCHEMA} as JSON"):
        dump_json(SCHEMA, 1, {"a": value}, path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    with pytest.raises(FileFormatError, match=number):
        load_json(SCHEMA, 1, f'{{"schema": "{SCHEMA}", "version": 1, "a": [{number}]}}')


def test_another_schema_is_named() -> None:
    with pytest.raises(
        FileFormatError, match=r"expected the schema 'fxmpq\.thing'; found 'fxmpq\.plan'"
    ):
        load_json(SCHEMA, 1, dump_json("fxmpq.plan", 1, {}))
    with pytest.raises(FileFormatError, match="found None"):
        load_json(SCHEMA, 1, "{}")


def test_another_version_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"expected version 2 of fxmpq\.thing; found 1"):
        load_json(SCHEMA, 2, dump_json(SCHEMA, 1, {}))


@pytest.mark.parametrize("text", ['{"schema": ', "{]", '{"a": ' * 100_000])
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"expected fxmpq\.thing as JSON"):
        load_json(SCHEMA, 1, text)


def test_a_list_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    with pytest.raises(FileFormatError, match="as a JSON object; found list"):
        load_json(SCHEMA, 1, path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(FileFormatError) as caught:
            load_json(SCHEMA, 1, path)
        assert f"cannot read {SCHEMA} from {str(path)!r}" in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(FileFormatError, match=r"cannot read fxmpq\.thing"):
        load_json(SCHEMA, 1, path)


@given(st.sets(names, max_size=3), st.sets(names, max_size=3), st.sets(names, max_size=4))
def test_check_fields_names_what_is_missing_and_unknown(
    required: set[str], optional: set[str], found: set[str]
) -> None:
    missing, unknown = sorted(required - found), sorted(found - required - optional)
    fields = dict.fromkeys(found, 0)
    if not missing and not unknown:
        check_fields(SCHEMA, fields, required, optional)
        return
    with pytest.raises(FileFormatError) as caught:
        check_fields(SCHEMA, fields, required, optional)
    assert f"missing fields {missing}, unknown fields {unknown}" in str(caught.value)
    assert str(sorted(required | optional)) in str(caught.value)


def test_build_turns_a_refusal_into_a_file_error() -> None:
    def make(size: int) -> int:
        if size < 0:
            raise FxmpqError(f"size {size} is negative")
        return size + 1

    assert build(SCHEMA, make, {"size": 1}) == 2
    with pytest.raises(FileFormatError, match=r"fxmpq\.thing: size -1 is negative"):
        build(SCHEMA, make, {"size": -1})
    with pytest.raises(FileFormatError, match=r"fxmpq\.thing: .*colour"):
        build(SCHEMA, make, {"colour": 1})


def test_a_failed_move_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    dump_json(SCHEMA, 1, {"a": 1}, path)
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        dump_json(SCHEMA, 1, {"a": 2}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half a pair: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_is_readable_by_people() -> None:
    text = dump_json(SCHEMA, 1, {"choices": {"a": "w4a8"}})
    assert text.splitlines()[:3] == ["{", f' "schema": "{SCHEMA}",', ' "version": 1,']
    assert json.loads(text)["choices"] == {"a": "w4a8"}
