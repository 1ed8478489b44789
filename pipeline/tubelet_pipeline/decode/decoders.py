"""Which decoder reads a file, and the two optional ones: decord and torchcodec.

auto        PyAV: it takes less time than decord on every file in `benchmarks/results/decode.txt`, and than torchcodec
            on all but a few; it alone reports damaged frames, and it alone is exact on every file.
pyav        PyAV, independent of later benchmarks.
decord      decord on the files that it numbers correctly (`VideoIndex.hazard is None`); PyAV on the others, and where
            decord fails.
torchcodec  torchcodec, likewise (`VideoIndex.torchcodec_hazard`).

Faults of decord 0.6.0, and what is done about each:
    default threads fail on VP9 with hidden frames    one thread
    readers decode ahead without bound                closed at once, memory limit
    wrong frame numbers on hazardous files            refused by the probe; length and timestamps compared
    repeats frames silently where decoding fails      fault_tol=1
    hangs, crashes                                    it runs in a process that can be killed

Faults of torchcodec, which also needs FFmpeg's shared libraries on the machine:
    fails on, or misnumbers, AVI and MPEG streams             refused by the probe
    the same where an edit list hides packets                 refused by the probe
    different pixels for 10-bit frames                        refused by the probe
    hides damage                                              `corrupt_frames` is None
    holds all frames twice while it returns them              memory limit
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

import numpy as np

from tubelet_pipeline.decode import pyav_backend
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pyav_backend import Allocate, Choose
from tubelet_pipeline.decode.video_index import VideoIndex, probe


def decode(path: str, backend: str, choose: Choose, allocate: Allocate, announce: Callable[[str], None]) -> DecodedClip:
    """Decode the frames `choose(number of frames)` of `path`.

    Args:
        path: Local file.
        backend: As in `DecodeConfig`.
        choose: Frames of the clip, given the number of frames of the video.
        allocate: Returns the uint8 array of shape [T, H, W, 3] to decode into.
        announce: Called with the decoder's name before it starts: after a crash the parent knows the decoder.

    Raises:
        DecodeFailure: any code but `missing`, `fetch_failed`, `timeout`, `crash`.
    """
    index = probe(path)
    if backend == "decord" and index.hazard is None:
        announce("decord")
        try:
            return decode_with_decord(path, index, choose, allocate)
        except DecodeFailure:
            pass
    if backend == "torchcodec" and index.torchcodec_hazard is None:
        announce("torchcodec")
        try:
            return decode_with_torchcodec(path, index, choose, allocate)
        except DecodeFailure:
            pass
    announce("pyav")
    return pyav_backend.decode(path, index, choose, allocate)


def decode_with_decord(path: str, index: VideoIndex, choose: Choose, allocate: Allocate) -> DecodedClip:
    """Decode with decord, checked against the probe's index; arguments as for `decode`.

    Raises:
        DecodeFailure: `inexact`, `decode_failed`, and what `allocate` raises.
    """
    import decord  # optional: no wheel for every platform

    decord.logging.set_level(decord.logging.QUIET)
    if index.hazard is not None or index.pts is None:
        raise DecodeFailure("inexact", f"decord cannot be trusted with this file ({index.hazard})")
    choice = choose(index.frames)
    try:
        reader = decord.VideoReader(path, num_threads=1, fault_tol=1)
        if len(reader) != index.frames:
            raise DecodeFailure("inexact", f"decord counts {len(reader)} frames, the container {index.frames}")
        wanted, places = np.unique(choice.indices, return_inverse=True)
        timestamps_s = (index.pts[choice.indices] * index.time_base_s).astype(np.float64)
        seen_s = reader.get_frame_timestamp(choice.indices.tolist())[:, 0]
        # decord counts time from the first frame, in float32.
        if not np.allclose(seen_s, timestamps_s - index.pts[0] * index.time_base_s, rtol=1e-6, atol=1e-3):
            raise DecodeFailure("inexact", "decord's timestamps differ from the container's")
        decoded = reader.get_batch(wanted.tolist()).asnumpy()
    # decord raises plain RuntimeError and AssertionError as well as its own errors, for the same faults.
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration) as error:
        raise DecodeFailure("decode_failed", " ".join(str(error).split())[-200:]) from error
    _, height, width, _ = decoded.shape
    frames = allocate((len(choice.indices), height, width, 3))
    np.take(decoded, places, axis=0, out=frames)
    return index.clip(choice, frames, timestamps_s, decord_version(), corrupt_frames=None)


def decode_with_torchcodec(path: str, index: VideoIndex, choose: Choose, allocate: Allocate) -> DecodedClip:
    """Decode with torchcodec, checked against the probe's index; arguments as for `decode`.

    Raises:
        DecodeFailure: `inexact`, `decode_failed`, and what `allocate` raises.
    """
    from torchcodec.decoders import VideoDecoder  # optional: needs the machine's FFmpeg

    if index.torchcodec_hazard is not None or index.pts is None:
        raise DecodeFailure("inexact", f"torchcodec cannot be trusted with this file ({index.torchcodec_hazard})")
    choice = choose(index.frames)
    try:
        reader = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        if len(reader) != index.frames:
            raise DecodeFailure("inexact", f"torchcodec counts {len(reader)} frames, the container {index.frames}")
        wanted, places = np.unique(choice.indices, return_inverse=True)
        batch = reader.get_frames_at(wanted.tolist())
    # torchcodec raises plain RuntimeError, ValueError and IndexError.
    except (RuntimeError, ValueError, IndexError) as error:
        raise DecodeFailure("decode_failed", " ".join(str(error).split())[-200:]) from error
    timestamps_s = (index.pts[choice.indices] * index.time_base_s).astype(np.float64)
    if not np.allclose(batch.pts_seconds.numpy()[places], timestamps_s, rtol=1e-9, atol=1e-6):
        raise DecodeFailure("inexact", "torchcodec's timestamps differ from the container's")
    decoded = batch.data.numpy()
    _, height, width, _ = decoded.shape
    frames = allocate((len(choice.indices), height, width, 3))
    np.take(decoded, places, axis=0, out=frames)
    return index.clip(choice, frames, timestamps_s, torchcodec_version(), corrupt_frames=None)


def decord_version() -> str:
    """As a clip table's `decoder` column says it."""
    return f"decord {version('decord')}"


def torchcodec_version() -> str:
    """As a clip table's `decoder` column says it."""
    from torchcodec import ffmpeg_major_version

    return f"torchcodec {version('torchcodec')} (FFmpeg {ffmpeg_major_version})"
