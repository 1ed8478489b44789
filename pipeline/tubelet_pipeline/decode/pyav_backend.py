"""Exact frames by PyAV: the index gives the timestamp of a frame, a key frame the entry point; decoding goes forward.

It seeks only if that skips frames (there is a later key frame before the requested frame). If the decoded stream does
not match the index, the clip is decoded again in a slower and safer way: without seeks if a seek gave damaged frames,
by decoding and counting all frames if timestamps do not match.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.video_index import VideoIndex
from tubelet_pipeline.frame_indices import FrameChoice

Choose = Callable[[int], FrameChoice]
Allocate = Callable[[tuple[int, int, int, int]], NDArray[np.uint8]]

DECODER = f"pyav {av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"


class _Disagreement(Exception):
    """The decoded stream does not match its index."""


class _FrameBuffer:
    """Frames of the clip, written as they are decoded into the caller's memory."""

    def __init__(self, choice: FrameChoice, allocate: Allocate) -> None:
        self.indices = choice.indices
        self.allocate = allocate
        self.frames: NDArray[np.uint8] | None = None
        # One for all frames: each reformatter starts threads, by default one per core.
        self.to_rgb = VideoReformatter()
        self.pts: list[int | None] = [None] * len(choice.indices)

    def write(self, index: int, frame: av.VideoFrame) -> None:
        rgb_HWC = np.asarray(self.to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray(), np.uint8)
        upright_HWC = upright(rgb_HWC, frame.side_data.get("DISPLAYMATRIX"))
        if self.frames is None:
            self.frames = self.allocate((len(self.indices), *upright_HWC.shape))
        if upright_HWC.shape != self.frames.shape[1:]:
            was, now = self.frames.shape[1:3], upright_HWC.shape[:2]
            raise DecodeFailure("resolution_change", f"{was[1]}x{was[0]} becomes {now[1]}x{now[0]} at frame {index}")
        places = np.flatnonzero(self.indices == index)
        self.frames[places] = upright_HWC
        for place in places:
            self.pts[place] = frame.pts


def decode(path: str, index: VideoIndex, choose: Choose, allocate: Allocate) -> DecodedClip:
    """Decode the frames `choose(number of frames)` of `path` into the array `allocate([T, H, W, 3])` gives.

    Raises:
        DecodeFailure: `no_frames`, `decode_failed`, `memory`, `resolution_change`, and what `allocate` raises.
    """
    if index.pts is not None:
        choice = choose(index.frames)
        seeking: list[int] = index.keys.tolist()
        for keys in (seeking, []):
            buffer = _FrameBuffer(choice, allocate)
            try:
                corrupt = _by_timestamp(path, index, index.pts, keys, buffer)
                return _clip(index, choice, buffer, corrupt)
            except _Disagreement:
                pass
    frames = sum(1 for _ in _decoded(path, index.frames))
    if not frames:
        raise DecodeFailure("no_frames", f"none of {index.frames} packets gives a frame")
    lost = max(0, index.frames - frames)
    choice = choose(frames)
    buffer = _FrameBuffer(choice, allocate)
    corrupt = _by_counting(path, frames, buffer)
    return _clip(index.without_timestamps(frames), choice, buffer, corrupt + lost)


def _clip(index: VideoIndex, choice: FrameChoice, buffer: _FrameBuffer, corrupt: int) -> DecodedClip:
    assert buffer.frames is not None  # every choice has at least one frame
    seconds = [np.nan if pts is None else pts * index.time_base_s for pts in buffer.pts]
    return index.clip(choice, buffer.frames, np.array(seconds, np.float64), DECODER, corrupt)


def _by_timestamp(path: str, index: VideoIndex, pts: NDArray[np.int64], keys: list[int], buffer: _FrameBuffer) -> int:
    """Fill `buffer` by matching timestamps, seeking to `keys`; number of damaged frames decoded."""
    corrupt = 0
    with av.open(path, metadata_errors="replace") as container:
        stream = _single_threaded(container)
        frames = _forward(container, stream, index.frames)
        first = at = entered = int(pts[0])
        for number in np.unique(buffer.indices).tolist():
            target = int(pts[number])
            before = bisect_right(keys, target)
            key = keys[before - 1] if before else first
            if key > at:
                container.seek(key, stream=stream, backward=True)
                frames = _forward(container, stream, index.frames)
                entered = key
            for frame in frames:
                if frame.pts is None:
                    raise _Disagreement
                damaged = bool(frame.is_corrupt and frame.pts >= entered)
                # FFmpeg marks all frames after a key frame that it cannot prove intact; only a full decode can tell.
                if damaged and entered > first:
                    raise _Disagreement
                corrupt += damaged
                if frame.pts >= target:
                    break
            else:
                raise _Disagreement
            if frame.pts != target:
                raise _Disagreement
            at = target
            buffer.write(number, frame)
    return corrupt


def _by_counting(path: str, frames: int, buffer: _FrameBuffer) -> int:
    """Fill `buffer` by position in a full decode; number of damaged frames decoded."""
    wanted = set(buffer.indices.tolist())
    last = max(wanted)
    corrupt = 0
    for number, frame in enumerate(_decoded(path, frames)):
        corrupt += frame.is_corrupt
        if number in wanted:
            buffer.write(number, frame)
        if number == last:
            break
    return corrupt


def _decoded(path: str, expected: int) -> Iterator[av.VideoFrame]:
    with av.open(path, metadata_errors="replace") as container:
        yield from _forward(container, _single_threaded(container), expected)


def _single_threaded(container: av.container.InputContainer) -> VideoStream:
    stream = container.streams.best("video")
    assert isinstance(stream, VideoStream)  # checked by the probe
    # The pool runs several processes; frame threads would also change which damaged frames are flagged.
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return stream


def _forward(container: av.container.InputContainer, stream: VideoStream, expected: int) -> Iterator[av.VideoFrame]:
    given = 0
    try:
        for frame in container.decode(stream):
            yield frame
            given += 1
    except av.FFmpegError as error:
        code = "memory" if error.errno == errno.ENOMEM else "decode_failed"
        raise DecodeFailure(
            code, f"{type(error).__name__} after {given} frames in sequence (the video has {expected})"
        ) from error


def upright(frame_HWC: NDArray[np.uint8], display_matrix: Any) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] frame after the quarter turns and reflections of its display matrix, as a player shows it.

    Args:
        frame_HWC: uint8 [H, W, 3].
        display_matrix: Buffer of nine int32 (a b u; c d v; x y w), which sends the point (p, q) to
            (a p + c q, b p + d q); None: identity.
    """
    if display_matrix is None:
        return frame_HWC
    matrix = np.frombuffer(display_matrix, np.int32, 9).reshape(3, 3)
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(a) >= abs(b):
        across, down = a, d
    else:
        frame_HWC = frame_HWC.transpose(1, 0, 2)
        across, down = c, b
    turned = frame_HWC[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
    upright_HWC = np.empty(turned.shape, np.uint8)
    for channel in range(3):  # five times faster than copying three bytes at a time
        upright_HWC[..., channel] = turned[..., channel]
    return upright_HWC
