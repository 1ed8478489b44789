"""Videos decoded and preprocessed for the backbone as the store's plan defines.

clip of the store ─▶ its video below the data set's root ┐
a video file ────────────────────────────────────────────┴─▶ the plan's frames ─▶ pixels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.preprocess import CropBox
from tubelet_pipeline.redecode import FrameRedecoder
from tubelet_store.reader import Store

_AHEAD = 4


@dataclass(frozen=True, eq=False)
class Clip:
    """One clip, ready for the backbone.

    Attributes:
        name: Name of the video, for messages.
        clip: Its number in the store; None for a video file.
        pixels: float32 [T, 3, h, w].
        frames: uint8 [T, H, W, 3] Decoded frames.
        frame_indices: int64 [T].
        frame_times_s: float64 [T], NaN where unknown.
        crop: Box of the source frame that the pixels cover.
    """

    name: str
    clip: int | None
    pixels: torch.Tensor
    frames: NDArray[np.uint8]
    frame_indices: NDArray[np.int64]
    frame_times_s: NDArray[np.float64]
    crop: CropBox


class ClipSource:
    """Decodes clips of a store, and other videos, by the store's plan.

    Args:
        store: The store.
        backbone: The backbone that made it.
        root: Folder of the data set; None: the one recorded in the store.
        decode: Video decoding.

    Raises:
        TubeletError: this version does not support the plan's sampling or views.
    """

    def __init__(
        self, store: Store, backbone: Backbone, root: str | None = None, decode: DecodeConfig | None = None
    ) -> None:
        self.store, self.backbone = store, backbone
        self._redecoder = FrameRedecoder(store.plan, backbone)
        known = store.state.provenance.get("dataset_root")
        self._root = root if root is not None else str(known) if known is not None else None
        self._decode = decode or DecodeConfig()

    @property
    def root(self) -> str:
        """Folder of the data set.

        Raises:
            TubeletError: the folder is neither given nor recorded in the store.
        """
        if self._root is None:
            raise TubeletError(f"{self.store.url} does not record where its videos are", "Give their folder as root")
        return self._root

    def clips(self, clips: Sequence[int]) -> Iterator[Clip]:
        """Clips of the store, in order.

        Raises:
            TubeletError: there is no such clip, its video cannot be read, or its frames differ from those stored.
        """
        for number in clips:
            if not 0 <= number < self.store.plan.clips:
                raise TubeletError(
                    f"{self.store.url} has no clip {number}", f"Its clips are 0 to {self.store.plan.clips - 1}"
                )
        rows = self.store.clips().take(pa.array([int(number) for number in clips], pa.int64()))
        wanted = rows["frame_indices"].to_pylist()
        sources = [resolve_uri(self.root, uri) for uri in rows["uri"].to_pylist()]
        decoded = self._decode_all(sources, rows["view"].to_pylist(), rows["video_id"].to_pylist(), list(clips))
        for clip, indices in zip(decoded, wanted, strict=True):
            if indices is not None and clip.frame_indices.tolist() != indices:
                raise TubeletError(
                    f"The frames of {clip.name} differ from those in {self.store.url}",
                    "Give the folder of the same videos as root",
                )
            yield clip

    def videos(self, paths: Sequence[str]) -> Iterator[Clip]:
        """Videos that are not in the store, the first view of each.

        Raises:
            TubeletError: a video cannot be read.
        """
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        yield from self._decode_all(list(paths), [0] * len(paths), names, [None] * len(paths))

    def _decode_all(
        self, sources: list[str], views: list[int], names: list[str], clips: Sequence[int | None]
    ) -> Iterator[Clip]:
        requests = [self._redecoder.request(source, view) for source, view in zip(sources, views, strict=True)]
        with DecodePool(self._decode) as pool:
            results = pool.map_ordered(requests, prefetch=_AHEAD)
            for source, view, name, clip, result in zip(sources, views, names, clips, results, strict=True):
                if isinstance(result, DecodeFailure):
                    raise TubeletError(
                        f"{source} cannot be read: {result}",
                        "Check the path; for a damaged file see the output of `ffprobe`",
                    )
                pixels, crop = self._redecoder.pixels(result, view)
                yield Clip(
                    name=str(name),
                    clip=None if clip is None else int(clip),
                    pixels=pixels,
                    frames=result.frames,
                    frame_indices=result.frame_indices,
                    frame_times_s=result.timestamps_s,
                    crop=crop,
                )
