"""Curves as inline SVG with the page's colors, for light and dark mode.

matplotlib draws with placeholder colors; each is then replaced by a CSS variable. Text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import re

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tubelet_lens.results.section import Curve, Line

_INK, _GRID = "#010101", "#020202"
# One placeholder color per role; controls and nulls share the color of neither the SAE nor the raw activations.
_ROLES = {"sae": "#030303", "raw": "#040404", "control": "#050505"}
_VARIABLES = {
    _INK: "var(--ink-soft)",
    _GRID: "var(--line)",
    _ROLES["sae"]: "var(--sae)",
    _ROLES["raw"]: "var(--raw)",
    _ROLES["control"]: "var(--control)",
}


def _color(line: Line) -> str:
    return _ROLES.get(line.subject.removesuffix("_shuffled"), _ROLES["control"])


# Small on purpose: scaled to a phone's width, 10 pt text stays readable.
_SIZE_INCHES = (5.0, 3.1)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tubelet",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.frameon": False,
}


def svg(curve: Curve) -> str:
    """`curve` as one `<svg>` element without any address in it."""
    with rc_context(_STYLE):
        canvas = Canvas(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        if curve.kind == "bars":
            _bars(axes, curve)
        else:
            for line in curve.lines:
                _line(axes, curve, line)
        axes.set_xlabel(curve.x_label)
        axes.set_ylabel(curve.y_label)
        if curve.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        if curve.log_y:
            axes.set_yscale("log")
        if curve.zero_line:
            axes.axhline(0, color=_INK, linewidth=0.8)
        if curve.integer_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(curve.lines) > 1:
            canvas.legend(loc="outside upper left", ncols=2, fontsize=9.5, handlelength=1.8)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(buffer.getvalue(), curve)


def _bars(axes: Axes, curve: Curve) -> None:
    edges = np.asarray(curve.x)
    for line in curve.lines:
        heights = [0.0 if value is None else value for value in line.y]
        axes.bar(edges[:-1], heights, width=0.92 * np.diff(edges), align="edge", color=_color(line))


def _line(axes: Axes, curve: Curve, line: Line) -> None:
    points = [(x, y) for x, y in zip(curve.x, line.y, strict=True) if y is not None]
    if not points:
        return
    x, y = zip(*points, strict=True)
    null = line.subject not in ("sae", "raw")
    axes.plot(
        x,
        y,
        label=line.label,
        color=_color(line),
        linestyle=(0, (4, 3)) if null else "-",
        linewidth=1.4 if null else 2.0,
        marker="o" if len(points) <= 16 else "",
        markersize=3.0 if null else 4.5,
    )
    if line.low is not None and line.high is not None:
        low, high = _numbers(line.low), _numbers(line.high)
        axes.fill_between(curve.x, low, high, color=_color(line), alpha=0.18, linewidth=0)


def _numbers(values: tuple[float | None, ...]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _for_page(text: str, curve: Curve) -> str:
    """Keep the `<svg>` element; drop what names an address; make ids the curve's own; bring in the page's colors."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    # Ids must be unique on the page, which holds several drawings.
    prefix = curve.name.replace(".", "-")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text)
    text = re.sub(
        r'<svg ([^>]*?)height="[^"]*"', r'<svg \1role="img" aria-label="' + html.escape(curve.title) + '"', text
    )
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
