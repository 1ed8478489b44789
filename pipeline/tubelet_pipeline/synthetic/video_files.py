"""The files of one demo video: the encoded video and its ground-truth masks.

VP9 in WebM like SSv2, H.264 in MP4 like Kinetics. The bytes are a function of the frames and of the FFmpeg inside PyAV:
one encoder thread, no dates, no random ids. Masks are `masks/ID.npz`, one compressed array "masks", without pickle.
A file gets its final name only when it is complete.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError

if TYPE_CHECKING:
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class Encoding:
    """A codec and its options."""

    suffix: str
    """Of the file name; FFmpeg takes the container from it."""
    codec: str
    """FFmpeg's name of the encoder."""
    gop: int
    """Most frames from one key frame to the next."""
    options: dict[str, str] = field(hash=False)


VP9_WEBM = Encoding(
    ".webm", "libvpx-vp9", gop=128, options={"deadline": "realtime", "cpu-used": "7", "crf": "24", "b": "0"}
)
"""VP9 as SSv2 has it. Measured at 48 frames of 128 x 128: 25 ms, 15 kB, mean absolute error 2.4 gray levels, of which
the camera noise that the codec drops is 1.6."""

H264_MP4 = Encoding(".mp4", "libx264", gop=24, options={"preset": "veryfast", "crf": "20"})
"""H.264 as Kinetics clips are commonly transcoded: closed groups of pictures with B-frames."""


def encode(path: Path, frames_THWC: NDArray[np.uint8], fps: int, encoding: Encoding) -> None:
    """Write `frames_THWC` (uint8 RGB, even height and width) as `path`, replacing what is there."""
    # The lens reads masks where the pipeline's extra is not installed.
    import av

    height, width = frames_THWC.shape[1:3]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{encoding.suffix}")
    try:
        with av.open(str(unfinished), "w", options={"fflags": "+bitexact"}) as container:
            stream = cast("VideoStream", container.add_stream(encoding.codec, rate=fps, options=encoding.options))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.gop_size = encoding.gop
            stream.codec_context.thread_count = 1
            stream.codec_context.flags |= av.codec.context.Flags.bitexact
            for frame_HWC in frames_THWC:
                frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


FOLDER = "masks"


def mask_path(root: Path, video_id: str) -> Path:
    """Path of the masks of `video_id` in the data set at `root`."""
    return root / FOLDER / f"{video_id}.npz"


def write_masks(root: Path, video_id: str, masks_THW: NDArray[np.uint8]) -> None:
    """Write the masks of one video; the file gets its name only when it is complete."""
    path = mask_path(root, video_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez_compressed(unfinished, masks=masks_THW)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_masks(root: Path | str, video_id: str) -> NDArray[np.uint8]:
    """Masks of one video of the data set at `root`.

    Args:
        root: Folder given to `tubelet videos`.
        video_id: SSv2's "id", or Kinetics' name of the clip without suffix (`YOUTUBEID_000010_000020`).

    Returns:
        uint8 [frames, height, width]: 0 background; 1, 2 the objects of the template's placeholders, in order; then an
        object at rest, if the scene has one. A pixel belongs to the object that contributes at least half of its color.

    Raises:
        TubeletError: the file does not exist, or is no file by `write_masks`.
    """
    path = mask_path(Path(root), video_id)
    if not path.is_file():
        raise TubeletError(f"No masks at {path}", "Check the video's id; only `tubelet videos` writes masks")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive["masks"], np.uint8)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TubeletError(f"{path} is damaged: {error}", "Delete it and run `tubelet videos` again") from error
