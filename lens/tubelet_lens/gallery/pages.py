"""Renders the pages: the overview, its data, and one page per latent.

Data is in the page or in a script file, because browsers do not fetch files from `file://`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet.formats import number
from tubelet_lens.gallery.effects import Effects
from tubelet_lens.gallery.heat_maps import packed
from tubelet_lens.gallery.latent_statistics import Statistic
from tubelet_lens.gallery.sheets import sheet_columns
from tubelet_lens.gallery.site import page_key, sheet_key
from tubelet_lens.gallery.survey import HISTOGRAM_EDGES, Exemplar, SurveyResult
from tubelet_lens.report.page_templates import page_environment
from tubelet_store.plan import Grid

STATIC = ("gallery.css", "overview.js", "latent.js")
DATA = "overview-data.js"

_LABELS_SHOWN = 8
_EFFECTS_SHOWN = 6
_DIGITS = 4


@dataclass(frozen=True)
class ExemplarClip:
    """A clip as pages describe it.

    Attributes:
        number: In the store.
        frames: Frames that the backbone saw.
        frame_s: Seconds between frames; None if unknown.
        patches: Stored patches of `About.places`; None: all.
        no_picture: Why it has no sheet; None: it has one.
    """

    number: int
    video: str
    label: str | None
    caption: str | None
    frames: int
    frame_s: float | None
    patches: tuple[int, ...] | None
    no_picture: str | None

    @property
    def columns(self) -> int:
        """Frames in a row of its sheet."""
        return sheet_columns(self.frames)

    @property
    def rows(self) -> int:
        """Rows of its sheet."""
        return math.ceil(self.frames / self.columns)


@dataclass(frozen=True)
class About:
    """What all pages share.

    Attributes:
        run, store: Their names.
        hook: Where the activations come from.
        places: Grid of the heat-maps.
        aspect: Width / height of the frames.
        clips, videos, latents: Clips and videos used; width of the code.
        notes: Caveats.
        provenance: Name, value.
    """

    run: str
    store: str
    hook: str
    places: Grid
    aspect: float
    clips: int
    videos: int
    latents: int
    notes: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Latent:
    """One latent with what its page shows."""

    number: int
    exemplars: tuple[Exemplar, ...]
    maps: Mapping[int, NDArray[np.uint8]]
    """uint8 [T, S] by clip."""
    nearest: tuple[tuple[int, float], ...]
    effects: tuple[Effects, ...]


class Pages:
    """Renders the site's pages.

    Args:
        about: What all pages share.
        figures: Figures of each latent.
        survey: How the latents fire.
        labels: Names of its L labels.
        shown: Latents with pages, ascending.
        clips: All clips on pages, by number.
    """

    def __init__(
        self,
        about: About,
        figures: Sequence[Statistic],
        survey: SurveyResult,
        labels: Sequence[str],
        shown: Sequence[int],
        clips: Mapping[int, ExemplarClip],
    ) -> None:
        self._about, self._figures, self._survey, self._labels = about, figures, survey, labels
        self._shown, self._clips = shown, clips
        self._place = {latent: place for place, latent in enumerate(shown)}
        # Values of each figure over the latents shown, ascending, for ranks.
        self._sorted = {
            each.name: np.sort(each.values_F[np.asarray(shown)][~np.isnan(each.values_F[np.asarray(shown)])])
            for each in figures
        }
        environment = page_environment("tubelet_lens.gallery")
        environment.globals |= {"about": about, "page_key": page_key, "sheet_key": sheet_key, "with_page": set(shown)}
        environment.filters["number"] = number
        self._latent_page = environment.get_template("latent.html")
        self._overview_page = environment.get_template("overview.html")

    def latent(self, latent: Latent) -> bytes:
        """The page of one latent."""
        place = self._place[latent.number]
        cards = [self._card(latent, each, rank) for rank, each in enumerate(latent.exemplars)]
        data = {
            "grid": [self._about.places.time, self._about.places.height, self._about.places.width],
            "cards": [card.pop("data") for card in cards],
        }
        own = self._survey
        return self._latent_page.render(
            latent=latent.number,
            previous=self._shown[place - 1] if place else None,
            next=self._shown[place + 1] if place + 1 < len(self._shown) else None,
            place=place + 1,
            shown=len(self._shown),
            fires_in=int(own.clips_F[latent.number]),
            videos_in=int(own.videos_F[latent.number]),
            sampled=int((own.sample_clip_FR[latent.number] >= 0).sum()),
            signed=bool(own.signed_F[latent.number]),
            strongest=[card for card in cards if card["part"] is None],
            weaker=[card for card in cards if card["part"] is not None],
            figures=[self._figure(each, latent.number) for each in self._figures],
            labels=self._label_rows(latent),
            top_label=self._top_label(latent.exemplars),
            histogram=self._histogram(latent.number),
            nearest=[(other, cosine, self._thumbnail(other)) for other, cosine in latent.nearest],
            effects=[
                (each.definition, each.by_target[:_EFFECTS_SHOWN], len(each.by_target)) for each in latent.effects
            ],
            data=data,
        ).encode()

    def overview(self) -> bytes:
        """The first page."""
        missing = sum(clip.no_picture is not None for clip in self._clips.values())
        reasons = sorted({clip.no_picture for clip in self._clips.values() if clip.no_picture is not None})
        return self._overview_page.render(
            shown=self._shown,
            figures=self._figures,
            data=DATA,
            clips=len(self._clips),
            missing=missing,
            reason=reasons[0] if reasons else None,
        ).encode()

    def data(self, exemplars: Mapping[int, tuple[Exemplar, ...]], maps: Mapping[int, int]) -> bytes:
        """The overview's data, as a script.

        Args:
            exemplars: Of each latent shown.
            maps: Of each, the frame of its strongest clip at which it peaks.
        """
        tops = [self._top_label(exemplars[latent]) for latent in self._shown]
        names = sorted({top[0] for top in tops if top is not None})
        index = {name: place for place, name in enumerate(names)}
        strongest = [self._clips[exemplars[latent][0].clip] for latent in self._shown]
        tree = {
            "latents": list(self._shown),
            "columns": [
                {
                    "name": each.name,
                    "title": each.title,
                    "definition": each.definition,
                    "values": [_rounded(each.values_F[latent]) for latent in self._shown],
                }
                for each in self._figures
            ],
            "labels": names,
            "label": [None if top is None else index[top[0]] for top in tops],
            "agree": [None if top is None else f"{top[1]} of {top[2]}" for top in tops],
            "clip": [clip.number if clip.no_picture is None else None for clip in strongest],
            "frames": [clip.frames for clip in strongest],
            "frame": [maps[latent] for latent in self._shown],
            "aspect": self._about.aspect,
        }
        # Plain ASCII without "<": safe in a script, whatever a label contains.
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
        return f"window.tubelet = {text};\n".encode()

    def _card(self, latent: Latent, exemplar: Exemplar, rank: int) -> dict[str, Any]:
        clip = self._clips[exemplar.clip]
        levels_TS = latent.maps[exemplar.clip]
        strongest = abs(latent.exemplars[0].peak)
        frame = peak_frame(levels_TS, clip.frames)
        return {
            "rank": rank + 1,
            "clip": clip,
            "sheet": sheet_key(clip.number) if clip.no_picture is None else None,
            "peak": exemplar.peak,
            "share": abs(exemplar.peak) / strongest,
            "part": exemplar.part,
            "frame": frame,
            "row": frame // clip.columns,
            "column": frame % clip.columns,
            "step": int(levels_TS.max(1).argmax()) + 1,
            "data": {
                "heat": packed(levels_TS),
                "frames": clip.frames,
                "columns": clip.columns,
                "peak": frame,
                "seconds": clip.frame_s,
                "patches": clip.patches,
                "scale": strongest,
            },
        }

    def _thumbnail(self, latent: int) -> ExemplarClip | None:
        clip = int(self._survey.top_clip_FK[latent, 0])
        return self._clips.get(clip)

    def _figure(self, figure: Statistic, latent: int) -> dict[str, Any]:
        value = float(figure.values_F[latent])
        known = self._sorted[figure.name]
        below = None
        if not math.isnan(value) and len(known) > 1:
            below = float(np.searchsorted(known, value) / (len(known) - 1))
        return {
            "title": figure.title,
            "definition": figure.definition,
            "value": None if math.isnan(value) else value,
            "below": below,
            "link": int(value) if figure.name == "nearest_latent" and value in self._place else None,
        }

    def _top_label(self, exemplars: Sequence[Exemplar]) -> tuple[str, int, int] | None:
        """Most frequent label of the strongest clips, how many have it, and how many there are."""
        labels = [self._clips[each.clip].label for each in exemplars if each.part is None]
        known = [label for label in labels if label is not None]
        if not known:
            return None
        best = max(dict.fromkeys(known), key=known.count)
        return best, known.count(best), len(labels)

    def _label_rows(self, latent: Latent) -> list[dict[str, Any]]:
        survey = self._survey
        top = [self._clips[each.clip].label for each in latent.exemplars if each.part is None]
        rows = [
            {
                "name": name,
                "top": top.count(name),
                "fires": int(survey.clips_by_label_FL[latent.number, place]),
                "clips": int(survey.clips_of_label_L[place]),
                "rate": float(survey.clips_by_label_FL[latent.number, place] / survey.clips_of_label_L[place]),
            }
            for place, name in enumerate(self._labels)
            if survey.clips_of_label_L[place]
        ]
        rows.sort(key=lambda row: (-row["top"], -row["rate"]))  # type: ignore[operator]
        return rows[:_LABELS_SHOWN]

    def _histogram(self, latent: int) -> dict[str, Any] | None:
        counts = self._survey.histogram_FB[latent]
        used = np.flatnonzero(counts)
        if not len(used):
            return None
        first, last = int(used[0]), int(used[-1])
        bars = counts[first : last + 1]
        return {
            "bars": (bars / bars.max()).tolist(),
            "low": float(HISTOGRAM_EDGES[first]),
            "high": float(HISTOGRAM_EDGES[last + 1]),
            "most": int(bars.max()),
            "tokens": int(bars.sum()),
        }


def peak_frame(levels_TS: NDArray[np.uint8], frames: int) -> int:
    """First frame of the latent step at which the map is highest."""
    steps = len(levels_TS)
    return int(levels_TS.max(1).argmax()) * frames // steps


def static_files() -> list[tuple[str, bytes]]:
    """Style and scripts of the site."""
    folder = resources.files("tubelet_lens.gallery") / "static"
    return [(name, (folder / name).read_bytes()) for name in STATIC]


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")
