"""Views of a video: its windows in time, and the crops of each window.

    video ─▶ sampling.clips windows ─▶ of each: one crop | three crops | an unshifted view and shifted ones

Rows of the clip table are ordered by video, window, crop or shift; `view` numbers the rows of a video.

Shifted views measure how local a feature is: the same pixels at other positions of the grid. In space the frame is
resized s patches larger than the grid, and the shifted crop lies s patches further down and right (Ro, Choi & Kim 2026,
arXiv 2604.05724: (p + s) n pixels, offset by s n); in time the shifted window begins s tubelets later in a window that
is s tubelets longer. Pixels that two views share are bit-identical.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tubelet.config import Config
from tubelet_pipeline.decode.pool import DecodeRequest
from tubelet_pipeline.preprocess import CENTER, Place
from tubelet_pipeline.sampling import DenseSampling, UniformSampling, describe


class CenterView(Config):
    """The crop of the checkpoint's preprocessing."""

    kind: Literal["center"] = "center"


class ThreeCrops(Config):
    """Three crops along the longer side: start, center, end. For a square frame all three are equal."""

    kind: Literal["three_crops"] = "three_crops"


class ShiftedViews(Config):
    """An unshifted view, and one for each shift that is not 0."""

    kind: Literal["shifted"] = "shifted"
    patches: int = Field(default=1, ge=0)
    """Patches by which one view is shifted down and right."""
    tubelets: int = Field(default=0, ge=0)
    """Tubelets (steps of latent time) by which one view begins later."""

    @model_validator(mode="after")
    def _something_is_shifted(self) -> ShiftedViews:
        if not self.patches and not self.tubelets:
            raise ValueError("patches and tubelets are both 0, so nothing is shifted")
        return self

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """(patches, tubelets) of each view."""
        alone = ((self.patches, 0), (0, self.tubelets))
        return ((0, 0), *(shift for shift in alone if any(shift)))


Views = Annotated[CenterView | ThreeCrops | ShiftedViews, Field(discriminator="kind")]


@dataclass(frozen=True)
class View:
    """One row of a video: columns of the clip table."""

    temporal_view: int
    spatial_view: int | None
    shift_patches: int | None = None
    shift_tubelets: int | None = None


def views_per_window(views: CenterView | ThreeCrops | ShiftedViews) -> int:
    """Clips per window in time."""
    if isinstance(views, ShiftedViews):
        return len(views.shifts)
    return 3 if isinstance(views, ThreeCrops) else 1


def locate(views: CenterView | ThreeCrops | ShiftedViews, number: int) -> View:
    """View `number` of a video, counted over all its windows."""
    window, within = divmod(number, views_per_window(views))
    if isinstance(views, ShiftedViews):
        return View(window, None, *views.shifts[within])
    return View(window, within)


def place(views: CenterView | ThreeCrops | ShiftedViews, view: View, patch_size: tuple[int, int]) -> Place:
    """Position of the crop of `view`; `patch_size` is height and width in pixels."""
    if isinstance(views, ThreeCrops):
        return Place(along=(view.spatial_view or 0) / 2)
    if isinstance(views, ShiftedViews) and views.patches:
        height, width = patch_size
        shift = view.shift_patches or 0
        return Place(
            room=(views.patches * height, views.patches * width),
            offset=(shift * height, shift * width),
        )
    return CENTER


def clip_request(
    uri: str,
    sampling: DenseSampling | UniformSampling,
    views: CenterView | ThreeCrops | ShiftedViews,
    view: View,
    tubelet_frames: int,
) -> DecodeRequest:
    """What to decode for `view` of the video at `uri`; equal for crops of the same frames."""
    if not isinstance(views, ShiftedViews):
        return DecodeRequest(uri, sampling, view.temporal_view)
    first = (view.shift_tubelets or 0) * tubelet_frames
    return DecodeRequest(uri, sampling, view.temporal_view, first, views.tubelets * tubelet_frames)


_FORMULAS = {
    "three_crops": {
        "formula": "three-crops-v1",
        "offset": "view * (side - crop) // 2 along the longer side of the resized picture, (side - crop) // 2 across",
    },
    "shifted": {
        "formula": "shifted-v1",
        "crops": "the picture drawn (crop + room) / crop times larger, room = patches * patch size; "
        "offset (side - crop - room) // 2 + shift * patch size",
        "windows": "frames + tubelets * tubelet_frames frames by the sampling's formula, "
        "from frame shift * tubelet_frames on",
    },
}


def describe_clips(
    sampling: DenseSampling | UniformSampling, views: CenterView | ThreeCrops | ShiftedViews, tubelet_frames: int
) -> dict[str, Any]:
    """What a store records: the sampling, and the views with their formulas unless there is only the center view."""
    if isinstance(views, CenterView):
        return describe(sampling)
    described = {**views.model_dump(mode="json"), **_FORMULAS[views.kind]}
    if isinstance(views, ShiftedViews):
        described["tubelet_frames"] = tubelet_frames
    return {**describe(sampling), "views": described}
