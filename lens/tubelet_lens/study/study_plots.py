"""Plots of a study as PNG files: a panel per source, a color per variant, a band for the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Curve, Line
from tubelet_lens.study.cells import Cell

_STYLE = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}
_PANEL_INCHES = (4.4, 3.4)
_DPI = 140
_RAW = "#6b7280"


def pareto(done: Sequence[Cell], evaluations: Mapping[str, Evaluation], path: Path) -> bool:
    """FVU against lag-1 autocorrelation; False if no cell has both."""
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    raw: dict[str, float] = {}
    for cell in done:
        values = {figure.name: figure.value for figure in evaluations[cell.name].figures()}
        fvu, rho = values.get("reconstruction.fvu"), values.get("coherence.lag1.sae")
        if fvu is None or rho is None:
            continue
        points.setdefault(cell.source, {}).setdefault(cell.variant, []).append((fvu, rho))
        if (of_raw := values.get("coherence.lag1.raw")) is not None:
            raw[cell.source] = of_raw
    if not points:
        return False
    colors = _colors(done)
    with rc_context(_STYLE):
        canvas, panels = _panels(list(points))
        for axes, (source, variants) in zip(panels, points.items(), strict=True):
            for variant, pairs in variants.items():
                x, y = (statistics.fmean(values) for values in zip(*pairs, strict=True))
                spread = [statistics.stdev(values) if len(pairs) > 1 else 0.0 for values in zip(*pairs, strict=True)]
                axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt="o", color=colors[variant], label=variant)
            if source in raw:
                axes.axhline(raw[source], color=_RAW, linestyle=(0, (4, 3)), label="raw activations")
            axes.set_title(source)
            axes.set_xlabel("FVU (left is better)")
        panels[0].set_ylabel("pooled lag-1 autocorrelation")
        _save(canvas, panels, path)
    return True


def curves(done: Sequence[Cell], evaluations: Mapping[str, Evaluation], name: str, path: Path) -> bool:
    """The curve `name` of each variant, mean over seeds, with baselines once per source; False if no cell has it."""
    by_source: dict[str, dict[str, list[Curve]]] = {}
    for cell in done:
        for section in evaluations[cell.name].sections:
            for curve in section.curves:
                if curve.name == name:
                    by_source.setdefault(cell.source, {}).setdefault(cell.variant, []).append(curve)
    if not by_source:
        return False
    colors = _colors(done)
    with rc_context(_STYLE):
        canvas, panels = _panels(list(by_source))
        for axes, (source, variants) in zip(panels, by_source.items(), strict=True):
            for number, (variant, seeds) in enumerate(variants.items()):
                for line in seeds[0].lines:
                    if line.subject == "sae":
                        _draw(axes, seeds, line, colors[variant], variant)
                    elif line.subject == "random":
                        _draw(axes, seeds, line, colors[variant], None)
                    elif number == 0 and line.subject == "raw":
                        _draw(axes, seeds, line, _RAW, line.label)
            first = next(iter(variants.values()))[0]
            axes.set_title(source)
            axes.set_xlabel(first.x_label)
            if first.log_x:
                axes.set_xscale("log")
            if first.log_y:
                axes.set_yscale("log")
            if first.zero_line:
                axes.axhline(0, color=_RAW, linewidth=0.8)
            if first.integer_x:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel(first.y_label)
        _save(canvas, panels, path)
    return True


def _draw(axes: Axes, seeds: Sequence[Curve], line: Line, color: str, label: str | None) -> None:
    """Mean over seeds of one line, at the positions that every seed has: they depend on the number of live latents."""
    bars = seeds[0].kind == "bars"
    at = [
        dict(zip(_positions(curve), other.y, strict=True))
        for curve in seeds
        for other in curve.lines
        if other.label == line.label
    ]
    x, mean, low, high = [], [], [], []
    for position in _positions(seeds[0]):
        values = [value for of_seed in at if (value := of_seed.get(position)) is not None]
        if len(values) == len(at):
            x.append(position)
            mean.append(statistics.fmean(values))
            low.append(min(values))
            high.append(max(values))
    axes.plot(
        x,
        mean,
        label=label,
        color=color,
        linestyle={"sae": "-", "raw": (0, (4, 3))}.get(line.subject, ":"),
        drawstyle="steps-mid" if bars else "default",
    )
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, step="mid" if bars else None)


def _positions(curve: Curve) -> Sequence[float]:
    """Position of each value of a curve; for bars the middle between their edges."""
    if curve.kind == "bars":
        return [sum(pair) / 2 for pair in zip(curve.x, curve.x[1:], strict=False)]
    return curve.x


def _colors(done: Sequence[Cell]) -> dict[str, str]:
    variants = list(dict.fromkeys(cell.variant for cell in done))
    palette = colormaps["tab10" if len(variants) <= 10 else "turbo"]
    step = 1 if len(variants) <= 10 else 256 // len(variants)
    return {variant: str(_hex(palette(number * step))) for number, variant in enumerate(variants)}


def _hex(rgba: tuple[float, float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgba[:3])


def _panels(sources: Sequence[str]) -> tuple[Canvas, list[Axes]]:
    width, height = _PANEL_INCHES
    canvas = Canvas(figsize=(width * len(sources), height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, list(canvas.subplots(1, len(sources), squeeze=False)[0])


def _save(canvas: Canvas, panels: Sequence[Axes], path: Path) -> None:
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        canvas.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=_DPI, metadata={"Software": None})
