"""What decoding gives: a clip, or a typed failure. A bad video is data, never the end of a job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CODES = {
    "missing": "there is no such file or object",
    "fetch_failed": "the remote object could not be read",
    "open_failed": "no container or codec FFmpeg knows",
    "no_video_stream": "the file holds no video",
    "no_frames": "the video stream holds no frame",
    "decode_failed": "the decoder gave up before the last wanted frame",
    "inexact": "the forced decoder does not number this file's frames rightly",
    "resolution_change": "the picture size changes within the clip",
    "too_large": "the decoded clip is larger than the memory limit",
    "memory": "decoding ran into the memory limit",
    "timeout": "decoding ran past the deadline and was killed",
    "crash": "the decode process died",
    "internal": "an error of ours, or of a library, that no other code names",
}
"""Failure codes, as they stand in a store's `error` column before the colon."""


class DecodeFailure(Exception):
    """One clip that cannot be had.

    Args:
        code: A key of `CODES`.
        message: What happened, in one line.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class DecodedClip:
    """Frames of one clip, and where they come from.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB, contiguous, turned upright as a player shows it.
        frame_indices: int64 [T], display order.
        timestamps_s: float64 [T], presentation time of each frame; NaN where the container gives none.
        fps: Average frame rate; NaN where the container gives none.
        video_frames: Frames of the whole video.
        padded_frames: Repeated frames, because the video is too short for its sampling.
        width, height: Of `frames`, in pixels.
        decoder: Library, version and FFmpeg, as "pyav 18.1.0 (libavcodec 62.28.102)".
        truncated: The video ends earlier than its container says (`probe.VideoIndex.truncated`).
        corrupt_frames: Damaged or lost frames met on the way to the wanted ones; None: this decoder cannot tell.
    """

    frames: NDArray[np.uint8]
    frame_indices: NDArray[np.int64]
    timestamps_s: NDArray[np.float64]
    fps: float
    video_frames: int
    padded_frames: int
    width: int
    height: int
    decoder: str
    truncated: bool
    corrupt_frames: int | None
