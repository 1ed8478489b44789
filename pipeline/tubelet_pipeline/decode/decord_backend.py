"""Frames by decord 0.6.0, held to the probe's index.

Its faults, and what is done about each:
    default threads fail on VP9 with hidden frames    one thread
    readers decode ahead without bound                closed at once, memory limit
    wrong numbers on hazardous files                  refused by the probe; length, timestamps compared
    repeats frames silently where decoding fails      fault_tol=1
    hangs, crashes                                    the caller runs it in a process that can be killed
"""

from __future__ import annotations

from importlib.metadata import version

import decord
import numpy as np

from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pyav_backend import Allocate, Choose
from tubelet_pipeline.decode.video_index import VideoIndex

decord.logging.set_level(decord.logging.QUIET)

DECODER = f"decord {version('decord')}"


def decode(path: str, index: VideoIndex, choose: Choose, allocate: Allocate) -> DecodedClip:
    """Decode the frames `choose(number of frames)` of `path` into the array `allocate([T, H, W, 3])` gives.

    Raises:
        DecodeFailure: `inexact`, `decode_failed`, and what `allocate` raises.
    """
    if index.hazard is not None or index.pts is None:
        raise DecodeFailure("inexact", f"decord cannot be trusted with this file ({index.hazard})")
    choice = choose(index.frames)
    try:
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1)
        if len(reader) != index.frames:
            raise DecodeFailure("inexact", f"decord counts {len(reader)} frames, the container {index.frames}")
        wanted, slots = np.unique(choice.indices, return_inverse=True)
        timestamps_s = (index.pts[choice.indices] * index.time_base_s).astype(np.float64)
        seen_s = reader.get_frame_timestamp(choice.indices.tolist())[:, 0]
        # decord counts time from the first frame, in float32.
        if not np.allclose(seen_s, timestamps_s - index.pts[0] * index.time_base_s, rtol=1e-6, atol=1e-3):
            raise DecodeFailure("inexact", "decord's timestamps differ from the container's")
        pictures = reader.get_batch(wanted.tolist()).asnumpy()
    # decord raises plain RuntimeError and AssertionError beside its own, for the same faults.
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration) as error:
        raise DecodeFailure("decode_failed", " ".join(str(error).split())[-200:]) from error
    _, height, width, _ = pictures.shape
    frames = allocate((len(choice.indices), height, width, 3))
    np.take(pictures, slots, axis=0, out=frames)
    return index.clip(choice, frames, timestamps_s, DECODER, corrupt_frames=None)
