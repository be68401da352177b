"""How every picture of a report looks: colours, letters, and how it becomes SVG."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart.
INK, GREY, GRID = "#333333", "#8A8A8A", "#E6E6E6"
SKY, BLUE, VERMILION = "#56B4E9", "#0072B2", "#D55E00"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "fxmpq",
}


def svg_text(figure: Figure) -> str:
    """A figure as SVG text for a page: an `<svg>` element, letters drawn as paths.

    Args:
        figure: Drawn within `rc_context(STYLE)`.
    """
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
