"""Sheets: the frames that the backbone saw, as one image per clip, row by row.

    clip table ─▶ decode pool ─▶ frames, exactly those of the clip table ─▶ the crop the backbone saw ─▶ sheet (WebP)

All pages share the sheets: each clip is stored once, and a page shows the frame that belongs to its heat-map. A WebP
sheet of the demo's clips is half the size of a JPEG sheet and 1.4 times that of an H.264 video (benchmarks/gallery.py);
for real videos at 112 pixels the factors are 0.7 and 3.7. A video file is smaller, but browsers do not seek it to the
exact frame of the heat-map.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.redecode import sampling_of, views_of
from tubelet_pipeline.views import clip_request, locate
from tubelet_store.reader import Store

_METHOD = 4
_AHEAD = 8


@dataclass(frozen=True)
class SheetConfig:
    """Size and quality of sheets.

    Attributes:
        frame_px: Longer side of a frame.
        quality: WebP's, 1 to 100.
        aspect: Width / height of the crop.
    """

    frame_px: int
    quality: int
    aspect: float


def sheet_columns(frames: int) -> int:
    """Frames in a row of a sheet of `frames`."""
    return math.ceil(math.sqrt(frames))


def draw_sheet(frames: NDArray[np.uint8], crop: tuple[float, float, float, float] | None, config: SheetConfig) -> bytes:
    """A sheet of WebP.

    Args:
        frames: uint8 [T, H, W, 3].
        crop: Top, left, height, width in pixels of the frame; None: the whole frame.
        config: Size and quality.
    """
    count, full_height, full_width, _ = frames.shape
    top, left, height, width = crop or (0.0, 0.0, float(full_height), float(full_width))
    # The crop in whole pixels may reach past the frame by the rounding of a float32.
    box = (left, top, min(left + width, full_width), min(top + height, full_height))
    longer = min(config.frame_px, math.ceil(max(height, width)))
    size = (longer, round(longer / config.aspect)) if config.aspect >= 1 else (round(longer * config.aspect), longer)
    columns = sheet_columns(count)
    sheet = Image.new("RGB", (columns * size[0], math.ceil(count / columns) * size[1]))
    for place, frame in enumerate(frames):
        image = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC, box=box)
        sheet.paste(image, (place % columns * size[0], place // columns * size[1]))
    data = io.BytesIO()
    sheet.save(data, "WEBP", quality=config.quality, method=_METHOD)
    return data.getvalue()


class ClipFrames:
    """Reads the frames of a store's clips from its videos.

    Args:
        store: The store.
        root: Folder of its data set.

    Raises:
        TubeletError: the store's plan has no known sampling.
    """

    def __init__(self, store: Store, root: str) -> None:
        self._store, self._root = store, root
        self._sampling, self._views = sampling_of(store.plan), views_of(store.plan)
        views: Any = store.plan.sampling.get("views", {})
        self._tubelet_frames = int(views.get("tubelet_frames", 1))

    def sheets(
        self, clips: Sequence[int], decode: DecodeConfig, config: SheetConfig
    ) -> Iterator[tuple[int, bytes | str]]:
        """(clip, sheet) in order; the reason in place of a sheet that cannot be made.

        Raises:
            TubeletError: nothing can be decoded on this machine.
        """
        table = self._store.clips()
        at = {clip: row for row, clip in enumerate(table["clip"].to_pylist())}
        rows = table.take([at[clip] for clip in clips])
        requests = [
            self._request(uri, view) for uri, view in zip(*(rows[n].to_pylist() for n in ("uri", "view")), strict=True)
        ]
        wanted, crops = rows["frame_indices"].to_pylist(), rows["crop"].to_pylist()
        with DecodePool(decode) as pool:
            results = pool.map_ordered(requests, prefetch=_AHEAD)
            for clip, indices, crop, result in zip(clips, wanted, crops, results, strict=True):
                yield clip, self._sheet(result, indices, crop, config)

    def _request(self, uri: str, view: int) -> DecodeRequest:
        at = locate(self._views, view)
        return clip_request(resolve_uri(self._root, uri), self._sampling, self._views, at, self._tubelet_frames)

    def _sheet(
        self, result: DecodedClip | DecodeFailure, indices: list[int] | None, crop: Any, config: SheetConfig
    ) -> bytes | str:
        if isinstance(result, DecodeFailure):
            # A published page names no path of this machine.
            return str(result).replace(resolve_uri(self._root, ""), "")
        if indices is not None and result.frame_indices.tolist() != indices:
            return "changed: the video has other frames than when the store was made"
        return draw_sheet(result.frames, tuple(crop) if crop is not None else None, config)
