"""Canvas and export of the pictures: matplotlib where it is installed, inline SVG out of it.

Text and axes take the color of the page around them, so one picture serves a light and a dark page.
"""

import io
import re
from typing import Any

# The palette of Okabe and Ito, without the black and yellow that vanish on one of the two backgrounds.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a6fd1")
INK = "#010203"
"""Stands for the color of the page's text until the picture is placed in it."""


def available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A transparent figure of inches and its axes: one, or an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns, **options)
    for each in figure.axes:
        each.patch.set_alpha(0)
        each.ticklabel_format(useOffset=False)  # nobody adds 4.998e-1 in the head
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as an SVG element in the colors and the font of the page."""
    import matplotlib

    for text in figure.findobj(matplotlib.text.Text):
        if text.get_color() in ("black", "k"):
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(which="both", colors=INK)
        axes.yaxis.label.set_color(INK)
        for side in axes.spines.values():
            side.set_edgecolor(INK)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "vitshrink", "font.family": "sans-serif"}
    stream = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    drawn = stream.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    # the page says which font it uses; matplotlib would name those of the machine that drew the picture
    return re.sub(r"font(?:-family)?: *[^;\"]*?(\d+(?:\.\d+)?px)?[^;\"]*(?=[;\"])", _font_size, drawn)


def _font_size(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else ""
