"""Videos as they are met in the wild, sound and broken."""

from __future__ import annotations

import subprocess
import sys
import time

import av
import numpy as np
import pytest

from optional_decoders import TORCHCODEC
from tubelet_pipeline.decode.decoded_clip import CODES, DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import UniformSampling

pytestmark = pytest.mark.real_videos

EIGHT = UniformSampling(frames=8)
# What a file is must not depend on how busy the machine is.
PATIENT_S = 300
FAILURES = {
    "audio_only_nasa.mp4": "no_video_stream",
    "decord_corrupted.mp4": "decode_failed",
    "html_as_mp4.mp4": "open_failed",
    "k400_trunc_mp4_head.mp4": "open_failed",
    "k400_zeroed_middle.mp4": "decode_failed",
    "libwebm_fixed_lacing_bad_lace_size.mkv": "no_frames",
    "random_bytes.mp4": "open_failed",
    "zero_length.mp4": "open_failed",
}


def sequential(path, wanted: set[int]) -> list[np.ndarray | None]:
    """Frames of a plain decode, turned by FFmpeg's own reading of the rotation; None for those not wanted."""
    with av.open(str(path)) as container:
        return [
            np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4) if number in wanted else None
            for number, frame in enumerate(container.decode(container.streams.best("video")))
        ]


@pytest.mark.parametrize("backend", ["auto", "decord", TORCHCODEC])
def test_sound_files_decode_to_the_bit_as_a_sequential_reading(real_videos, backend):
    paths = sorted((real_videos / "sound").iterdir())
    if backend != "auto":  # the 14 s of 720p are compared once
        paths = [path for path in paths if path.stat().st_size < 700_000]
    used = set()
    with DecodePool(DecodeConfig(backend=backend, timeout_s=PATIENT_S)) as pool:
        for path, clip in zip(paths, pool.map_ordered([DecodeRequest(str(p), EIGHT) for p in paths], 4), strict=True):
            assert isinstance(clip, DecodedClip), f"{path.name}: {clip}"
            frames = sequential(path, set(clip.frame_indices.tolist()))
            assert clip.video_frames == len(frames), path.name
            for index, frame in zip(clip.frame_indices, clip.frames, strict=True):
                assert frames[index] is not None
                assert np.array_equal(frame, frames[index]), f"{path.name}, frame {index}"
            assert not clip.truncated, path.name
            used.add(clip.decoder.split()[0])
    assert used == ({"pyav"} if backend == "auto" else {"pyav", backend})


@pytest.mark.parametrize("backend", ["auto", "decord", TORCHCODEC])
def test_broken_files_fail_by_name_or_say_what_is_missing(real_videos, backend):
    paths = sorted((real_videos / "broken").iterdir())
    with DecodePool(DecodeConfig(backend=backend, timeout_s=PATIENT_S)) as pool:
        results = dict(
            zip(
                [p.name for p in paths], pool.map_ordered([DecodeRequest(str(p), EIGHT) for p in paths], 4), strict=True
            )
        )
    failures = {name: result.code for name, result in results.items() if isinstance(result, DecodeFailure)}
    assert failures == FAILURES
    assert set(failures.values()) <= set(CODES)
    assert results["hang_decord_editlist_tail_h264.mp4"].video_frames == 150
    assert results["k400_trunc_faststart.mp4"].truncated
    assert results["libwebm_block_ends_beyond_cluster.mkv"].truncated


@pytest.mark.parametrize("backend", ["auto", "decord"])
def test_the_file_that_kills_decord_from_memory_is_contained_from_remote(real_videos, backend):
    deadly = real_videos / "broken" / "libwebm_fixed_lacing_bad_lace_size.mkv"
    sound = real_videos / "sound" / "vrrs_input.mp4"
    with DecodePool(DecodeConfig(backend=backend, processes=1)) as pool:
        failure, after = pool.map_ordered([DecodeRequest(f"local://{path}", EIGHT) for path in (deadly, sound)], 2)
    assert isinstance(failure, DecodeFailure)
    assert isinstance(after, DecodedClip)


def test_a_plain_call_hangs_where_the_pool_returns(real_videos):
    path = real_videos / "broken" / "hang_decord_editlist_tail_h264.mp4"
    naive = f"import decord; v = decord.VideoReader({str(path)!r}, num_threads=1); v.get_batch(list(range(9, 300, 19)))"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", naive], capture_output=True, timeout=4)
    begin = time.monotonic()
    with DecodePool(DecodeConfig(backend="decord", processes=1, timeout_s=PATIENT_S)) as pool:
        clip = next(pool.map_ordered([DecodeRequest(str(path), EIGHT)], 1))
    assert isinstance(clip, DecodedClip)
    assert time.monotonic() - begin < PATIENT_S / 2
