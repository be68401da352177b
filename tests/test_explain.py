from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from fxmpq.errors import FxmpqError
from fxmpq.explain import explain


def refuse_odd(value: int) -> int:
    if value % 2:
        raise FxmpqError(f"{value} is odd")
    return value


class Circle(BaseModel, extra="forbid"):
    source: Literal["circle"]
    radius: int


class Square(BaseModel, extra="forbid"):
    source: Literal["square"]
    width: Annotated[int, AfterValidator(refuse_odd)]


class Frame(BaseModel, extra="forbid"):
    thickness: int | Literal["hair"] = 1


class Drawing(BaseModel, extra="forbid"):
    shape: Annotated[Circle | Square, Field(discriminator="source")]
    colours: dict[Annotated[str, Field(max_length=5)], int] = Field(default_factory=dict)
    frames: dict[str, Frame] | None = None
    rows: tuple[Frame, ...] = ()


ROUND = {"shape": {"source": "circle", "radius": 1}}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            {"shape": {"source": "circle", "radius": 1, "radios": 2}},
            "  shape.radios: there is no such key; closest: 'radius'",
        ),
        (
            {"shape": {"source": "square", "width": 3}},
            "  shape.width: 3 is odd",
        ),
        (
            {"shape": {"source": "star"}},
            "  shape.source: no source 'star'; there are 'circle', 'square'",
        ),
        (
            {"shape": {"radius": 1}},
            "  shape.source: missing; say where it comes from, as 'embedded'",
        ),
        ({"shape": {"source": "circle"}}, "  shape.radius: missing"),
        ({}, "  shape: missing"),
        (
            {**ROUND, "frames": {"a": {"thicknes": 2}}},
            "  frames.a.thicknes: there is no such key; closest: 'thickness'",
        ),
        (
            {**ROUND, "rows": [{"thicknes": 2}]},
            "  rows.0.thicknes: there is no such key; closest: 'thickness'",
        ),
        (
            {**ROUND, "colours": {"purple": 1}},
            "  colours.purple: string should have at most 5 characters; found 'purple'",
        ),
        (
            {"shape": {"source": "circle", "radius": 1}, "colours": {"red": "much"}},
            (
                "  colours.red: input should be a valid integer, unable to parse string as an "
                "integer; found 'much'"
            ),
        ),
    ],
)
def test_a_problem_is_one_line_in_the_readers_words(content: object, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate(content)
    assert explain(caught.value, Drawing) == line


def test_kinds_of_values_are_not_part_of_a_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({**ROUND, "frames": {"a": {"thickness": "thin"}}})
    lines = explain(caught.value, Drawing).splitlines()
    assert {line.partition(":")[0] for line in lines} == {"  frames.a.thickness"}
