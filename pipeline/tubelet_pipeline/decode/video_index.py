"""One demux pass over a video: number of frames, their timestamps, and whether other decoders number them correctly.

Nothing is decoded. The pass takes 2-8 % of the time of decoding a ten-second clip.

decord 0.6.0 numbers key frames in decode order but sorts timestamps, counts packets that are never shown, and seeks by
these numbers. So it is exact where both orders agree and every packet is one shown frame: mp4 or Matroska, every
timestamp present and unique, no packet hidden by an edit list, no frame that follows a key frame in the file and
precedes it in time (open GOP). Codecs and pixel formats: those with the same pixels as FFmpeg 8.

torchcodec 0.13 is exact on the same files, on open GOP and on more codecs. It fails on AVI with B-frames, on MPEG
program and transport streams, and where an edit list hides packets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.frame_indices import FrameChoice

av.logging.set_level(av.logging.PANIC)

_CONTAINERS = {"mov", "matroska"}
_DECORD_CODECS = {"h264", "vp8", "vp9", "mpeg4"}
_TORCHCODEC_CODECS = {*_DECORD_CODECS, "hevc", "av1", "libdav1d"}
_PIXELS = {"yuv420p", "yuvj420p", "yuv444p"}  # decoders differ on 10 bits


@dataclass(frozen=True)
class VideoIndex:
    """A video's best stream, in display order.

    Attributes:
        frames: Number of frames of a full decode.
        pts: int64 [frames] ascending, in units of `time_base_s`; None if timestamps do not identify frames.
        keys: int64, ascending: timestamps of key frames.
        time_base_s: Seconds per unit of `pts`.
        fps: Average frame rate; NaN if unknown.
        duration_s: Duration of the stream, else of the container; NaN if neither states one.
        announced_frames: Number of frames in an AVI's header (FFmpeg computes its duration from the data); else 0.
        container, codec: FFmpeg's short names.
        hazard: Why decord may be inexact on this file; None: it is exact.
        torchcodec_hazard: The same for torchcodec.
    """

    frames: int
    pts: NDArray[np.int64] | None
    keys: NDArray[np.int64]
    time_base_s: float
    fps: float
    duration_s: float
    announced_frames: int
    container: str
    codec: str
    hazard: str | None
    torchcodec_hazard: str | None

    @property
    def truncated(self) -> bool:
        """Whether the last frame ends more than max(0.5 s, two frames) before `duration_s` or the last announced frame.

        Half a second, because containers without a duration per stream include audio, which may be slightly longer.
        """
        frame_s = 1 / self.fps if self.fps > 0 else 0.0
        if (self.announced_frames - self.frames) * frame_s > max(0.5, 2 * frame_s):
            return True
        if self.pts is None or not self.frames or np.isnan(self.duration_s):
            return False
        # Matroska's duration starts at time zero, others at the first frame.
        begin = 0 if self.container == "matroska" else self.pts[0]
        shown_s = float(self.pts[-1] - begin) * self.time_base_s + frame_s
        return self.duration_s - shown_s > max(0.5, 2 * frame_s)

    def clip(
        self,
        choice: FrameChoice,
        frames: NDArray[np.uint8],
        timestamps_s: NDArray[np.float64],
        decoder: str,
        corrupt_frames: int | None,
    ) -> DecodedClip:
        """A clip of this video with the frames of `choice`; other arguments as the attributes of `DecodedClip`."""
        _, height, width, _ = frames.shape
        return DecodedClip(
            frames=frames,
            frame_indices=choice.indices,
            timestamps_s=timestamps_s,
            fps=self.fps,
            video_frames=self.frames,
            padded_frames=choice.padded,
            width=width,
            height=height,
            decoder=decoder,
            truncated=self.truncated,
            corrupt_frames=corrupt_frames,
        )

    def without_timestamps(self, frames: int) -> VideoIndex:
        """The index after decoding gave `frames` frames with timestamps that do not match."""
        hazards = (self.hazard or "timestamps", self.torchcodec_hazard or "timestamps")
        return replace(self, frames=frames, pts=None, hazard=hazards[0], torchcodec_hazard=hazards[1])


def probe(path: str) -> VideoIndex:
    """Index of the best video stream in `path`.

    Raises:
        DecodeFailure: `open_failed`, `no_video_stream`, `no_frames`.
    """
    try:
        # Damaged metadata is no reason to refuse a video.
        with av.open(path, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise DecodeFailure("no_video_stream", f"{path} has no video stream")
            # None, against PyAV's type hints, if FFmpeg has no decoder.
            if getattr(stream, "codec_context", None) is None:
                raise DecodeFailure("open_failed", "FFmpeg does not support the video's codec")
            return _index(container, stream)
    except av.FFmpegError as error:
        raise DecodeFailure("open_failed", f"{type(error).__name__}: {error.strerror}") from error


def _index(container: av.container.InputContainer, stream: VideoStream) -> VideoIndex:
    codec = stream.codec_context.codec.canonical_name
    pts: list[int | None] = []
    keys: list[int] = []
    hidden = leading = damaged = False
    starts_with_key = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if starts_with_key is None:
            starts_with_key = packet.is_keyframe
        damaged |= packet.is_corrupt
        if packet.pts is not None:
            if packet.is_keyframe:
                leading |= bool(keys) and packet.pts < keys[-1]
                keys.append(packet.pts)
            else:
                leading |= bool(keys) and packet.pts < keys[-1]
        if packet.is_discard or (codec == "vp8" and not _vp8_is_shown(packet)):
            hidden = True
            continue
        pts.append(packet.pts)
    if not pts:
        raise DecodeFailure("no_frames", "the video stream has no frame")
    known = [p for p in pts if p is not None]
    trusted = len(known) == len(pts) and len(set(known)) == len(known)
    name = container.format.name.split(",")[0]
    pixels = stream.codec_context.pix_fmt

    def first_hazard(codecs: set[str], *, open_gop: bool) -> str | None:
        hazards = {
            name if name == "avi" else f"container {name}": name not in _CONTAINERS,
            codec: codec not in codecs,
            f"pixels {pixels}": pixels not in _PIXELS,
            "several video streams": len(container.streams.video) > 1,
            "timestamps": not trusted,
            "hidden packets": hidden,
            "open-gop": leading and not open_gop,
            "no leading key frame": not starts_with_key,
            "damaged packets": damaged,
            "packet count": stream.frames not in (0, len(pts)),
        }
        return next((hazard for hazard, present in hazards.items() if present), None)

    time_base_s = float(stream.time_base) if stream.time_base else 1.0
    rate = stream.average_rate or stream.guessed_rate
    duration_s = float("nan")
    if stream.duration is not None:
        duration_s = stream.duration * time_base_s
    elif container.duration is not None:
        duration_s = container.duration / av.time_base
    return VideoIndex(
        frames=len(pts),
        pts=np.sort(np.array(known, np.int64)) if trusted else None,
        keys=np.unique(np.array(keys, np.int64)),
        time_base_s=time_base_s,
        fps=float(rate) if rate else float("nan"),
        duration_s=duration_s,
        announced_frames=stream.frames if name == "avi" else 0,
        container=name,
        codec=codec,
        hazard=first_hazard(_DECORD_CODECS, open_gop=False),
        torchcodec_hazard=first_hazard(_TORCHCODEC_CODECS, open_gop=True),
    )


def _vp8_is_shown(packet: av.Packet) -> bool:
    """The show_frame bit (RFC 6386, 9.1): VP8 stores hidden reference frames as separate packets."""
    return bool(memoryview(packet)[0] & 0x10)
