"""Tiny clips whose frames carry their own index as a barcode: ground truth that depends on no decoder.

The top quarter of each frame shows the index as 12 black or white bars, lowest bit left; below, a square moves over a
colored ground. `CLIPS` names one clip for each thing that makes decoders miscount. Sequential decoding gives the
indices 0, 1, ..., `spec.frames` - 1 for every one of them; frames that an edit list hides carry indices from `HIDDEN`
on.

Nothing here is random and nothing is read from disk: `make_clip(tmp_path / filename(name), CLIPS[name])` is all it
takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

BITS = 12
HIDDEN = 4000
"""Frames that an edit list hides carry indices from here on."""


@dataclass(frozen=True)
class ClipSpec:
    """How a clip is encoded and packed."""

    suffix: str
    """File name suffix, from which FFmpeg takes the container."""
    codec: str = "libx264"
    """FFmpeg's name of the encoder."""
    frames: int = 40
    """Frames that a decoder must return."""
    fps: int = 25
    width: int = 128
    height: int = 96
    gop: int = 12
    """Most frames from one key frame to the next."""
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict, hash=False)
    """Of the encoder."""
    container_options: dict[str, str] = field(default_factory=dict, hash=False)
    """Of the container."""
    durations: tuple[int, ...] = ()
    """Variable frame rate: each frame's duration in ticks of 1/fps, repeated as often as needed."""
    start_tick: int = 0
    """Time of the first frame, in ticks of 1/fps."""
    hidden: int = 0
    """Leading frames that are in the file, from its key frame on, and that its edit list hides."""
    hidden_tail: int = 0
    """Trailing frames that the edit list hides; a reader that counts packets sees some of them."""
    rotation: int = 0
    """Display rotation in degrees, counter-clockwise, stored in the container; frames decode unrotated."""

    def timestamps_s(self) -> list[float]:
        """Time of each visible frame from the first one, in seconds."""
        visible = self.ticks()[self.hidden : self.hidden + self.frames]
        return [(tick - visible[0]) / self.fps for tick in visible]

    def ticks(self) -> list[int]:
        """Time of every frame in the file, hidden ones too, from the first one, in ticks of 1/fps."""
        ticks = [0]
        for i in range(self.hidden + self.frames + self.hidden_tail - 1):
            ticks.append(ticks[-1] + (self.durations[i % len(self.durations)] if self.durations else 1))
        return ticks


CLIPS: dict[str, ClipSpec] = {
    "h264": ClipSpec(".mp4", options={"x264-params": "open-gop=0"}),
    "h264_open_gop": ClipSpec(".mp4", options={"bf": "3", "x264-params": "open-gop=1:b-adapt=0"}),
    "h264_no_b": ClipSpec(".mp4", options={"bf": "0"}),
    "hevc": ClipSpec(".mp4", "libx265", options={"x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "vp9": ClipSpec(".webm", "libvpx-vp9", fps=12, options={"cpu-used": "6", "deadline": "realtime"}),
    "vp9_alt_ref": ClipSpec(
        ".webm",
        "libvpx-vp9",
        fps=12,
        frames=48,
        gop=48,
        # With one pass, libvpx makes alternate reference frames at variable bit rate in real-time mode only.
        options={"auto-alt-ref": "1", "lag-in-frames": "25", "deadline": "realtime", "cpu-used": "5", "b": "150k"},
    ),
    "vp8": ClipSpec(".webm", "libvpx", options={"deadline": "realtime", "cpu-used": "6"}),
    "av1": ClipSpec(".mp4", "libsvtav1", options={"preset": "10", "svtav1-params": "lp=1"}),
    "mpeg2": ClipSpec(".mpg", "mpeg2video", options={"bf": "2", "b": "400k"}),
    "mpeg2_ts": ClipSpec(".ts", "mpeg2video", options={"bf": "2", "b": "400k"}),
    "mpeg4_avi": ClipSpec(".avi", "mpeg4"),
    "mpeg4_b_avi": ClipSpec(".avi", "mpeg4", options={"bf": "2"}),
    "mjpeg_avi": ClipSpec(".avi", "mjpeg", frames=10, pix_fmt="yuvj420p"),
    "mkv": ClipSpec(".mkv"),
    "vfr": ClipSpec(".mp4", durations=(1, 5, 1, 2)),
    "vfr_webm": ClipSpec(
        ".webm", "libvpx-vp9", durations=(1, 5, 1, 2), options={"cpu-used": "6", "deadline": "realtime"}
    ),
    "one_frame": ClipSpec(".mp4", frames=1),
    "five_frames": ClipSpec(".mp4", frames=5),
    "odd_size": ClipSpec(".mp4", width=131, height=97, pix_fmt="yuv444p"),
    "ten_bit": ClipSpec(".mp4", pix_fmt="yuv420p10le"),
    "rotated": ClipSpec(".mp4", rotation=90),
    "late_start": ClipSpec(".mp4", start_tick=75),
    "late_start_mkv": ClipSpec(".mkv", start_tick=75),
    "long_gop": ClipSpec(".mp4", frames=300, gop=250, width=96, height=64, options={"sc_threshold": "0", "crf": "30"}),
    "fragmented": ClipSpec(".mp4", container_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "edit_list": ClipSpec(".mp4", hidden=7, options={"bf": "2", "sc_threshold": "0"}),
    "edit_list_first_gop": ClipSpec(".mp4", hidden=17, options={"bf": "2", "sc_threshold": "0"}),
    "edit_list_tail": ClipSpec(".mp4", frames=75, hidden_tail=75, options={"bf": "2"}),
}
"""Every clip, by name."""


def filename(name: str) -> str:
    """File name of clip `name` of `CLIPS`."""
    return f"{name}{CLIPS[name].suffix}"


def draw_frame(index: int, width: int = 128, height: int = 96) -> NDArray[np.uint8]:
    """Frame with barcode `index`, uint8 RGB [height, width, 3]."""
    picture = np.empty((height, width, 3), np.uint8)
    # The ground changes every 8 frames, so that decoders which repeat frames are seen by eye, too.
    picture[:] = np.random.default_rng(index // 8).integers(40, 216, 3)
    size = height // 6
    left = 3 * index % (width - size)
    picture[height // 2 : height // 2 + size, left : left + size] = (255, 64, 64)
    for bit, (begin, end) in enumerate(_bars(width)):
        picture[: height // 4, begin:end] = 255 if index >> bit & 1 else 0
    return picture


def read_index(frame: NDArray[np.uint8]) -> int:
    """Index that `frame` (uint8 [height, width, 3]) carries.

    Raises:
        ValueError: a bar is neither black nor white, so the frame is damaged, blended, rotated or no barcode frame.
    """
    height, width = frame.shape[:2]
    index = 0
    for bit, (begin, end) in enumerate(_bars(width)):
        level = float(frame[2 : height // 4 - 2, begin + 2 : end - 2].mean())
        if 80 < level < 175:
            raise ValueError(f"bar {bit} has gray level {level:.0f}, neither black nor white")
        index |= int(level >= 175) << bit
    return index


def make_clip(path: Path, spec: ClipSpec) -> Path:
    """Encode `spec` as `path`; returns `path`."""
    options = {"fflags": "+bitexact", **spec.container_options}
    if spec.hidden:
        # The mov writer turns negative times into an edit list only if it is not told to shift them away.
        options |= {"avoid_negative_ts": "disabled", "use_editlist": "1"}
    ticks = spec.ticks()
    with av.open(str(path), "w", options=options) as container:
        stream = cast("VideoStream", container.add_stream(spec.codec, rate=spec.fps, options=dict(spec.options)))
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, spec.pix_fmt
        stream.codec_context.gop_size = spec.gop
        stream.codec_context.thread_count = 1
        if spec.durations:
            stream.codec_context.time_base = Fraction(1, spec.fps)
        if spec.rotation:
            stream.set_display_rotation(spec.rotation)
        for i, tick in enumerate(ticks):
            index = i - spec.hidden if 0 <= i - spec.hidden < spec.frames else HIDDEN + i % 90
            frame = av.VideoFrame.from_ndarray(draw_frame(index, spec.width, spec.height), format="rgb24")
            frame.pts, frame.time_base = spec.start_tick + tick - ticks[spec.hidden], Fraction(1, spec.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if spec.hidden_tail:
        _shorten_edit(path, spec.frames / spec.fps)
    return path


def _shorten_edit(path: Path, duration_s: float) -> None:
    """Let the edit list of an mp4 file end after `duration_s`: FFmpeg's writer has no option for that."""
    raw = bytearray(path.read_bytes())
    edit = raw.index(b"elst")
    # ISO 14496-12, 8.6.6: version and flags, entry count, then the first entry's duration in the movie's time scale,
    # which FFmpeg sets to 1000 per second.
    version, entries = raw[edit + 4], int.from_bytes(raw[edit + 8 : edit + 12])
    if (version, entries) != (0, 1):
        raise ValueError(f"{path}: edit list of version {version} with {entries} entries, expected 0 and 1")
    raw[edit + 12 : edit + 16] = round(duration_s * 1000).to_bytes(4)
    path.write_bytes(raw)


def decode_indices(path: Path) -> list[int]:
    """Indices of all frames, by sequential decoding with PyAV."""
    with av.open(str(path)) as container:
        return [
            read_index(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)) for frame in container.decode(video=0)
        ]


def _bars(width: int) -> list[tuple[int, int]]:
    bar = width // BITS
    return [(bit * bar, (bit + 1) * bar) for bit in range(BITS)]
