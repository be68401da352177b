"""Why an export went as it did: errors in one line, and the lines of the model's own code."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

_OWN_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_LONGEST = 200
# Called by torch (2.13) where a free size turns out to be a number, in the midst of what asked
# for it. Without it reasons are less exact.
_FIXES = "_set_replacement"


def first_line(error: BaseException) -> str:
    """The class and the first line of an error.

    Args:
        error: Of any kind.

    Examples:
        >>> first_line(ValueError("no such size"))
        'ValueError: no such size'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def user_line(error: BaseException) -> str:
    """The innermost line of the model's own code on the way to an error."""
    return _innermost(traceback.extract_tb(error.__traceback__)) or "an unknown line"


def failure(error: BaseException) -> str:
    """An error of an export with the line it stopped at, shortened."""
    text = first_line(error)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 3] + "..."
    return f"{text}, at {user_line(error)}"


@contextmanager
def noted_sizes() -> Iterator[dict[str, str]]:
    """For the time of an export, note where free sizes become numbers.

    Yields:
        Line of the model's code per size, as `L['x'].size()[0]`; it fills as the export runs.
    """
    # Here, since it loads SymPy.
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found: dict[str, str] = {}
    fix: Callable[..., object] | None = getattr(ShapeEnv, _FIXES, None)
    if fix is None:
        yield found
        return

    def noting(shapes: ShapeEnv, symbol: object, value: object, *rest: object) -> object:
        if getattr(value, "is_Integer", False):
            line = _innermost(traceback.extract_stack())
            for source in shapes.var_to_sources.get(symbol, ()):
                found.setdefault(source.name, line)
        return fix(shapes, symbol, value, *rest)

    setattr(ShapeEnv, _FIXES, noting)
    try:
        yield found
    finally:
        setattr(ShapeEnv, _FIXES, fix)


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost frame that is neither torch's nor fxmpq's, as `file:line: code`."""
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_file() and not frame.filename.startswith(_OWN_FOLDERS)
    ]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
