"""The result of decoding: a clip, or a failure with a code. A bad video is data; it never ends a job."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CODES = {
    "missing": "there is no such file or object",
    "fetch_failed": "the remote object could not be read",
    "open_failed": "unknown container or codec",
    "no_video_stream": "the file has no video stream",
    "no_frames": "the video stream has no frame",
    "decode_failed": "the decoder failed before the last requested frame",
    "inexact": "the requested decoder misnumbers this file's frames",
    "resolution_change": "the frame size changes within the clip",
    "too_large": "the decoded clip is larger than the memory limit",
    "memory": "decoding reached the memory limit",
    "timeout": "decoding exceeded the time limit and was killed",
    "crash": "the decode process died",
    "internal": "an error of Tubelet or a library that has no other code",
}
"""Failure codes: the part of a store's `error` column before the colon."""


class DecodeFailure(Exception):
    """A clip that could not be decoded.

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
    """Frames of one clip, and their origin.

    Attributes:
        frames: uint8 [T, H, W, 3] RGB, contiguous, rotated as a player shows it.
        frame_indices: int64 [T], display order.
        timestamps_s: float64 [T], presentation time of each frame; NaN if the container has none.
        fps: Average frame rate; NaN if the container has none.
        video_frames: Frames of the whole video.
        padded_frames: Repeated frames, because the video is too short for the sampling.
        width, height: Of `frames`, in pixels.
        decoder: Library, version and FFmpeg, as "pyav 18.1.0 (libavcodec 62.28.102)".
        truncated: The video ends earlier than its container says (`VideoIndex.truncated`).
        corrupt_frames: Damaged or lost frames on the way to the requested ones; None: the decoder cannot tell.
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
