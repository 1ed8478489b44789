"""Which decoder reads a file.

auto        PyAV: it takes less time than decord on every file that `benchmarks/results/decode.txt` compares them on,
            and than torchcodec on all but a few; it alone tells damaged frames, and it alone is exact on every file.
pyav        PyAV, whatever a later benchmark says.
decord      decord on the files it numbers rightly (`VideoIndex.hazard is None`), PyAV on the others and where it gives
            up.
torchcodec  torchcodec, likewise (`VideoIndex.torchcodec_hazard`).
"""

from __future__ import annotations

from collections.abc import Callable

from tubelet_pipeline.decode import pyav_backend
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pyav_backend import Allocate, Choose
from tubelet_pipeline.decode.video_index import probe


def decode(path: str, backend: str, choose: Choose, allocate: Allocate, announce: Callable[[str], None]) -> DecodedClip:
    """Decode the frames `choose(number of frames)` of `path`.

    Args:
        path: Local file.
        backend: As in `DecodeConfig`.
        choose: Frames of the clip, given the frames of the video.
        allocate: Gives the uint8 array of a shape [T, H, W, 3] to decode into.
        announce: Told the decoder's name before it starts, so that whoever finds this process dead knows which it was.

    Raises:
        DecodeFailure: any code but `missing`, `fetch_failed`, `timeout`, `crash`.
    """
    index = probe(path)
    if backend == "decord" and index.hazard is None:
        from tubelet_pipeline.decode import decord_backend  # optional: no wheel for every platform

        announce("decord")
        try:
            return decord_backend.decode(path, index, choose, allocate)
        except DecodeFailure:
            pass
    if backend == "torchcodec" and index.torchcodec_hazard is None:
        from tubelet_pipeline.decode import torchcodec_backend  # optional: needs the machine's FFmpeg

        announce("torchcodec")
        try:
            return torchcodec_backend.decode(path, index, choose, allocate)
        except DecodeFailure:
            pass
    announce("pyav")
    return pyav_backend.decode(path, index, choose, allocate)
