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


class Drawing(BaseModel, extra="forbid"):
    shape: Annotated[Circle | Square, Field(discriminator="source")]
    colours: dict[str, int] = Field(default_factory=dict)


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
