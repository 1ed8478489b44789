"""Frames by torchcodec, held to the probe's index. Optional: it needs FFmpeg's shared libraries of the machine.

Its faults, and what is done about each:
    fails on, or misnumbers, AVI and MPEG streams         refused by the probe
    the same where an edit list hides packets             refused by the probe
    other pixels of 10-bit pictures                       refused by the probe
    hides damage                                          `corrupt_frames` is None
    holds all pictures twice while it hands them over     memory limit
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from torchcodec import ffmpeg_major_version
from torchcodec.decoders import VideoDecoder

from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pyav_backend import Allocate, Choose
from tubelet_pipeline.decode.video_index import VideoIndex

DECODER = f"torchcodec {version('torchcodec')} (FFmpeg {ffmpeg_major_version})"


def decode(path: str, index: VideoIndex, choose: Choose, allocate: Allocate) -> DecodedClip:
    """Decode the frames `choose(number of frames)` of `path` into the array `allocate([T, H, W, 3])` gives.

    Raises:
        DecodeFailure: `inexact`, `decode_failed`, and what `allocate` raises.
    """
    if index.torchcodec_hazard is not None or index.pts is None:
        raise DecodeFailure("inexact", f"torchcodec cannot be trusted with this file ({index.torchcodec_hazard})")
    choice = choose(index.frames)
    try:
        reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        if len(reader) != index.frames:
            raise DecodeFailure("inexact", f"torchcodec counts {len(reader)} frames, the container {index.frames}")
        wanted, slots = np.unique(choice.indices, return_inverse=True)
        batch = reader.get_frames_at(wanted.tolist())
    # torchcodec raises plain RuntimeError, ValueError and IndexError.
    except (RuntimeError, ValueError, IndexError) as error:
        raise DecodeFailure("decode_failed", " ".join(str(error).split())[-200:]) from error
    timestamps_s = (index.pts[choice.indices] * index.time_base_s).astype(np.float64)
    if not np.allclose(batch.pts_seconds.numpy()[slots], timestamps_s, rtol=1e-9, atol=1e-6):
        raise DecodeFailure("inexact", "torchcodec's timestamps differ from the container's")
    pictures = batch.data.numpy()
    _, height, width, _ = pictures.shape
    frames = allocate((len(choice.indices), height, width, 3))
    np.take(pictures, slots, axis=0, out=frames)
    return index.clip(choice, frames, timestamps_s, DECODER, corrupt_frames=None)
