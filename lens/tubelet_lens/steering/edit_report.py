"""The result of `tubelet edit`: edit.json, and edit.html, a page without scripts, fonts or addresses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from markupsafe import Markup
from pydantic import JsonValue

from tubelet.config import Config
from tubelet.formats import MINUS, UNDEFINED, number
from tubelet.tables import Table, Tabular
from tubelet_lens.report.page_templates import page_environment
from tubelet_lens.steering.config import ChangeConfig
from tubelet_lens.steering.operations import Amplify, Region, SetTo, Suppress

_WIDTH, _HEIGHT = 240, 22


class Spread(Config):
    """A figure over several controls: its mean, smallest and largest value."""

    mean: float
    low: float
    high: float
    draws: int


class Compared(Config):
    """A figure of the edit and that of its controls; null: no control could be drawn."""

    edit: float
    matched: Spread | None
    """The same operations on random latents of similar activity in the same part of the clip."""
    random: Spread | None
    """Steps of the same length along random directions."""


class ClassChange(Config):
    """One class of the readout."""

    name: str
    probability_before: float
    probability_after: float
    logit_before: float
    logit_change: Compared
    """Logit after minus logit before."""


class HookChange(Config):
    """How much the tokens at one hook change."""

    hook: str
    change: Compared
    """||x' - x|| / ||x|| over all tokens of the clip."""


class LatentChange(Config):
    """A latent of an SAE at a later hook."""

    latent: int
    before: float
    """Mean activation over the clip's tokens."""
    after: float
    change: Compared
    """Mean activation after minus before."""


class DownstreamLatents(Config):
    """Latents of an SAE at a later hook: those that the edit changes most."""

    run: str
    hook: str
    latents: tuple[LatentChange, ...]


class EditedLatent(Config):
    """An edited latent."""

    latent: int
    active_tokens: int
    """Tokens of the clip on which it is active before the edit."""
    mean_before: float
    """Mean activation over the edited tokens."""
    mean_after: float
    largest_observed: float
    """Largest activation on the sampled clips of the store."""


class ClipEffect(Config):
    """What the edit changes in one clip."""

    name: str
    clip: int | None
    """Number in the store; null for a video file."""
    seconds: tuple[float, float] | None
    """When its first and last frame are shown; null: unknown."""
    tokens: int
    changed_tokens: int
    """Tokens that the edit changes."""
    step: float
    """Mean of ||x' - x|| / ||x|| over the changed tokens; 0 if there is none."""
    latents: tuple[EditedLatent, ...]
    top_before: str | None
    """Most probable class; null without a readout."""
    top_after: str | None
    kl: Compared | None
    """KL(classes before || classes after), in nats."""
    classes: tuple[ClassChange, ...]
    """All classes, by decreasing change of their logit."""
    hooks: tuple[HookChange, ...]
    downstream: tuple[DownstreamLatents, ...]


class EditReport(Tabular, Config):
    """The effects of edits of latents in some clips, with controls."""

    format: Literal["tubelet-edit"] = "tubelet-edit"
    schema_version: Literal[1] = 1
    run: str
    hook: str
    backbone: str
    changes: tuple[ChangeConfig, ...]
    readout: str | None
    """Where class probabilities come from; null: there are none, and `classes` are empty."""
    readout_accuracy: float | None
    """Of a probe: on its validation videos."""
    clips: tuple[ClipEffect, ...]
    config: dict[str, JsonValue]
    software: dict[str, JsonValue]

    def table(self) -> Table:
        """A row per clip: how much was changed, and what changed after it, with the controls."""
        rows: list[tuple[object, ...]] = []
        for clip in self.clips:
            kl = clip.kl
            matched = kl.matched.mean if kl is not None and kl.matched is not None else None
            random = kl.random.mean if kl is not None and kl.random is not None else None
            effect = (kl.edit if kl is not None else None, matched, random)
            rows.append(
                (clip.name, clip.changed_tokens, clip.tokens, clip.step, clip.top_before, clip.top_after, *effect)
            )
        return Table.of_rows(
            ("clip", "changed_tokens", "tokens", "step", "top_before", "top_after", "kl", "kl_matched", "kl_random"),
            rows,
            title=f"Edit of {self.run} at {self.hook} of {self.backbone}",
            definitions={
                "step": "Mean over the changed tokens of ||x' - x|| / ||x||",
                "kl": "KL(classes before || classes after), in nats",
                "kl_matched": "The same operations on random latents that are about as active, mean",
                "kl_random": "Steps of the same length along random directions, mean",
            },
        )

    def write(self, out: Path) -> Path:
        """Write `edit.json` and `edit.html` to the folder `out`; returns the page's path."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "edit.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        page = out / "edit.html"
        page.write_text(_page(self), encoding="utf-8")
        return page


def _page(report: EditReport) -> str:
    environment = page_environment("tubelet_lens.report")
    environment.filters |= {
        "number": number,
        "mean": _mean,
        "range": _range,
        "operation": _operation,
        "region": _region,
        "bar": _bar,
    }
    return environment.get_template("edit.html").render(report=report, widest=_widest)


def _mean(compared: Compared, kind: str) -> str:
    control = compared.matched if kind == "matched" else compared.random
    return UNDEFINED if control is None else number(control.mean)


def _range(compared: Compared, kind: str) -> str:
    control = compared.matched if kind == "matched" else compared.random
    return "" if control is None else f"{number(control.low)} … {number(control.high)}"


def _operation(change: Suppress | Amplify | SetTo) -> str:
    match change:
        case Suppress(strength=0.0):
            return "switched off"
        case Suppress(strength=strength):
            return f"suppressed to {MINUS}{strength:g} times its largest observed activation"
        case Amplify(factor=factor):
            return f"multiplied by {factor:g}".replace("-", MINUS)
        case SetTo(value=value):
            return f"set to {value:g}".replace("-", MINUS)


def _region(where: Region) -> str:
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


def _widest(clip: ClipEffect) -> float:
    """End of the scale of a clip's bars: the largest logit change of the edit or a control."""
    values = [abs(value) for each in clip.classes for value in _ends(each.logit_change)]
    return max(values, default=0.0) or 1.0


def _ends(compared: Compared) -> list[float]:
    controls = [each for each in (compared.matched, compared.random) if each is not None]
    return [compared.edit, *(end for each in controls for end in (each.low, each.high))]


def _bar(compared: Compared, scale: float) -> Markup:
    """The edit as a bar from 0, with the range of the matched controls above it and of the random ones below."""

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
