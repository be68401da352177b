from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxmpq.graph.reasons import failure, first_line, noted_sizes, user_line


def complain(message: str) -> None:
    raise ValueError(message)


def caught(message: str) -> ValueError:
    with pytest.raises(ValueError, match="wrong") as found:
        complain(message)
    return found.value


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 8)


def export(model: nn.Module) -> None:
    torch.export.export(model, (torch.ones(2, 8),), dynamic_shapes=({0: Dim.AUTO},), strict=False)


@pytest.mark.parametrize(
    ("message", "expected"),
    [("one\ntwo", "one"), ("\n  indented\n", "indented"), ("", "no message")],
)
def test_the_first_line_that_says_something(message: str, expected: str) -> None:
    assert first_line(ValueError(message)) == f"ValueError: {expected}"


def test_a_failure_is_one_short_line_with_its_place() -> None:
    text = failure(caught("wrong " * 100 + "\nmore"))
    assert text.startswith("ValueError: wrong wrong")
    assert "..., at " in text
    assert text.endswith("raise ValueError(message)")
    assert "test_reasons.py:" in text
    assert "\n" not in text


def test_an_error_that_was_not_raised_has_no_line() -> None:
    assert user_line(ValueError("never raised")) == "an unknown line"


def test_lines_of_torch_are_passed_over() -> None:
    with pytest.raises(RuntimeError) as found:
        nn.Linear(3, 2)(torch.ones(4))
    assert "nn.Linear(3, 2)(torch.ones(4))" in user_line(found.value)


def test_the_line_that_fixes_a_size_is_noted() -> None:
    fix = ShapeEnv._set_replacement
    with noted_sizes() as noted:
        export(Fixed())
    ((name, line),) = noted.items()
    assert name == "L['x'].size()[0]"
    assert line.endswith("return x + torch.ones(2, 8)")
    assert ShapeEnv._set_replacement is fix


def test_free_sizes_are_not_noted() -> None:
    with noted_sizes() as noted:
        export(nn.Linear(8, 2))
    assert noted == {}


def test_torch_is_as_it_was_after_an_error() -> None:
    fix = ShapeEnv._set_replacement
    with pytest.raises(ZeroDivisionError), noted_sizes():
        raise ZeroDivisionError
    assert ShapeEnv._set_replacement is fix


def test_a_torch_without_it_exports_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxmpq.graph.reasons._FIXES", "no_such_method")
    with noted_sizes() as noted:
        export(Fixed())
    assert noted == {}
