"""What `tubelet edit` found, as it stands in `edit.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from tubelet.config import Config
from tubelet.tables import Table, Tabular
from tubelet_lens.steering.config import ChangeConfig


class Spread(Config):
    """A figure over several controls."""

    mean: float
    low: float
    """Smallest."""
    high: float
    """Largest."""
    draws: int


class Compared(Config):
    """A figure of the edit, beside its controls; null where there is none."""

    edit: float
    matched: Spread | None
    """The same operations on random latents that are about as active in the same part of the clip."""
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
    """What is felt at a later place."""

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


class LaterSae(Config):
    """Latents of a later SAE that the edit changes most."""

    run: str
    hook: str
    latents: tuple[LatentChange, ...]


class EditedLatent(Config):
    """A latent that was changed."""

    latent: int
    active_tokens: int
    """Tokens of the clip on which it is active, before."""
    mean_before: float
    """Mean over the tokens that an edit of it reaches."""
    mean_after: float
    largest_observed: float
    """On the store's clips that were looked at."""


class ClipEffect(Config):
    """One clip."""

    name: str
    clip: int | None
    """Number in the store; null for a video file."""
    seconds: tuple[float, float] | None
    """When its first and last frame are shown."""
    tokens: int
    changed_tokens: int
    """Tokens to which something was added."""
    step: float
    """Mean over these of ||x' - x|| / ||x||; 0 if there is none."""
    latents: tuple[EditedLatent, ...]
    top_before: str | None
    """Most probable class; null without a readout."""
    top_after: str | None
    kl: Compared | None
    """KL(classes before || classes after), in nats."""
    classes: tuple[ClassChange, ...]
    """All classes, those whose logit the edit changes most first."""
    hooks: tuple[HookChange, ...]
    later: tuple[LaterSae, ...]


class EditReport(Tabular, Config):
    """All clips."""

    format: Literal["tubelet-edit"] = "tubelet-edit"
    schema_version: Literal[1] = 1
    run: str
    hook: str
    backbone: str
    changes: tuple[ChangeConfig, ...]
    readout: str | None
    """What the classes were read by; null: nothing (then `classes` are empty)."""
    readout_accuracy: float | None
    """Of a probe, on the videos on which its penalty was chosen."""
    clips: tuple[ClipEffect, ...]
    config: dict[str, JsonValue]
    software: dict[str, JsonValue]

    def table(self) -> Table:
        """A row per clip: how much was changed, and what changed after it beside the controls."""
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
        """Write `edit.json` and `edit.html` into the folder `out`; the page's path."""
        from tubelet_lens.steering.edit_page import render_page

        out.mkdir(parents=True, exist_ok=True)
        (out / "edit.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        page = out / "edit.html"
        page.write_text(render_page(self), encoding="utf-8")
        return page
