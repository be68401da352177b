from __future__ import annotations

import pytest

from fxmpq.errors import FileFormatError
from fxmpq.storage.names import identifier, qualified


@pytest.mark.parametrize("name", ["x", "input_ids", "_tensor_constant0", "__and__"])
def test_identifiers_are_taken(name: str) -> None:
    assert identifier(name, "a node") == name


@pytest.mark.parametrize(
    "name",
    ["", "1x", "a b", "x=__import__('os')", "x\n", "class", "a.b", "é", "x)", None, 3, ["x"]],
)
def test_what_is_no_identifier_is_refused(name: object) -> None:
    with pytest.raises(FileFormatError, match="a node must be named by an identifier; found"):
        identifier(name, "a node")


@pytest.mark.parametrize("name", ["weight", "encoder.layer.0.weight", "d.bn-1.weight", "_w", "a b"])
def test_paths_are_taken(name: str) -> None:
    assert qualified(name, "a tensor") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a..b",
        ".a",
        "a.",
        "a.__class__",
        "__dict__",
        "forward",
        "a.register_buffer.b",
        "training",
        "_modules",
        "graph",
        'a"); import os; ("',
        "a'b",
        "a\\b",
        "a\nb",
        "-a",
        "ä",
        None,
        7,
    ],
)
def test_paths_that_could_leave_their_place_are_refused(name: object) -> None:
    with pytest.raises(FileFormatError, match="a tensor (cannot be named|must have a name)"):
        qualified(name, "a tensor")
