"""An edit as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tubelet.formats import MINUS, UNDEFINED, number
from tubelet_lens.steering.edit_report import ClipEffect, Compared, EditReport
from tubelet_lens.steering.operation import Amplify, SetTo, Suppress
from tubelet_lens.steering.region import Region

_WIDTH, _HEIGHT = 240, 22


def render_page(report: EditReport) -> str:
    """The page, as HTML."""
    environment = Environment(
        loader=PackageLoader("tubelet_lens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "mean": mean,
        "range": spread,
        "operation": operation,
        "region": region,
        "bar": bar,
    }
    return environment.get_template("edit.html").render(report=report, widest=widest)


def mean(compared: Compared, kind: str) -> str:
    """Mean of a control."""
    found = compared.matched if kind == "matched" else compared.random
    return UNDEFINED if found is None else number(found.mean)


def spread(compared: Compared, kind: str) -> str:
    """Smallest and largest of a control's draws."""
    found = compared.matched if kind == "matched" else compared.random
    return "" if found is None else f"{number(found.low)} … {number(found.high)}"


def operation(change: Suppress | Amplify | SetTo) -> str:
    """In words."""
    match change:
        case Suppress(strength=0.0):
            return "switched off"
        case Suppress(strength=strength):
            return f"suppressed to {MINUS}{strength:g} times its largest observed activation"
        case Amplify(factor=factor):
            return f"multiplied by {factor:g}".replace("-", MINUS)
        case SetTo(value=value):
            return f"set to {value:g}".replace("-", MINUS)


def region(where: Region) -> str:
    """In words."""
    spans = [
        f"{name} {span[0]:g} to {span[1]:g}"
        for name, span in (
            ("latent steps", where.steps),
            ("seconds", where.seconds),
            ("rows", where.rows),
            ("columns", where.columns),
        )
        if span is not None
    ]
    spans += [f"mask {where.mask.name}"] if where.mask is not None else []
    return ", ".join(spans) or "the whole clip"


def widest(clip: ClipEffect) -> float:
    """Largest logit change among edit and controls of a clip: the end of its bars' scale."""
    values = [abs(value) for each in clip.classes for value in _ends(each.logit_change)]
    return max(values, default=0.0) or 1.0


def _ends(compared: Compared) -> list[float]:
    controls = [each for each in (compared.matched, compared.random) if each is not None]
    return [compared.edit, *(end for each in controls for end in (each.low, each.high))]


def bar(compared: Compared, scale: float) -> Markup:
    """Edit as a bar from 0, controls as bands of their range above (matched) and below (random) it."""

    def x(value: float) -> float:
        return round(_WIDTH / 2 * (1 + value / scale), 2)

    parts = [f'<line x1="{x(0)}" y1="1" x2="{x(0)}" y2="{_HEIGHT - 1}" class="axis"/>']
    for control, y, name in ((compared.matched, 2, "matched"), (compared.random, 16, "random")):
        if control is not None:
            width = max(x(control.high) - x(control.low), 1)
            parts.append(f'<rect x="{x(control.low)}" y="{y}" width="{width:.2f}" height="4" class="{name}"/>')
    low, high = sorted((x(0), x(compared.edit)))
    parts.append(f'<rect x="{low}" y="8" width="{max(high - low, 1):.2f}" height="6" class="edit"/>')
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>')
