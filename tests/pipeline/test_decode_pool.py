"""Decode processes: exact through the pipe, in order, and no accident costs more than its clip."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

import barcode
from optional_decoders import TORCHCODEC
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import DenseSampling, UniformSampling

EIGHT = UniformSampling(frames=8)


def request(path: Path | str, sampling=EIGHT, view: int = 0) -> DecodeRequest:
    return DecodeRequest(str(path), sampling, view)


def read(clip) -> list[int]:
    assert isinstance(clip, DecodedClip), str(clip)
    return [barcode.read_index(frame) for frame in clip.frames]


_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    """An idle runtime, which another test of this process left, has decoding processes too."""
    _OTHERS.clear()
    _OTHERS.update(process.pid for process in psutil.Process().children(recursive=True))


def children() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if process.pid not in _OTHERS
        and process.status() != psutil.STATUS_ZOMBIE
        and "tubelet_pipeline.decode.process_main" in " ".join(process.cmdline())
    ]


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


SLOW = UniformSampling(frames=100)


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory) -> Path:
    """With SLOW it takes about a second to decode, so that an accident can happen in the middle."""
    path = tmp_path_factory.mktemp("slow") / "slow.mp4"
    spec = barcode.ClipSpec(".mp4", frames=150, width=1280, height=720, gop=250, options={"preset": "ultrafast"})
    return barcode.make_clip(path, spec)


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord", TORCHCODEC])
def test_results_come_in_order_and_carry_the_requested_frames(barcode_clips, tmp_path, backend):
    names = [name for name in barcode.CLIPS if name != "rotated"]
    (tmp_path / "noise.mp4").write_bytes(bytes(range(256)) * 50)
    paths = [barcode_clips[name] for name in names]
    with DecodePool(DecodeConfig(backend=backend)) as pool:
        results = list(pool.map_ordered(map(request, [*paths, tmp_path / "noise.mp4", tmp_path / "gone.mp4"]), 4))
    for name, clip in zip(names, results, strict=False):
        assert read(clip) == clip.frame_indices.tolist()
        assert clip.video_frames == barcode.CLIPS[name].frames
    assert [failure.code for failure in results[-2:]] == ["open_failed", "missing"]


def test_every_view_of_every_sampling_gets_there(barcode_clips):
    sampling = DenseSampling(frames=4, stride=3, clips=3)
    with DecodePool(DecodeConfig(processes=1)) as pool:
        clips = list(pool.map_ordered([request(barcode_clips["h264"], sampling, view) for view in range(3)], 2))
    assert [read(clip) for clip in clips] == [[0, 3, 6, 9], [14, 17, 20, 23], [28, 31, 34, 37]]


def test_a_remote_object_decodes_like_its_file(barcode_clips):
    for backend in ("pyav", "decord"):
        with DecodePool(DecodeConfig(processes=1, backend=backend)) as pool:
            near, far = pool.map_ordered([request(barcode_clips["vp9"]), request(f"local://{barcode_clips['vp9']}")], 2)
        assert np.array_equal(near.frames, far.frames)
        assert far.decoder.startswith(backend)


def test_requests_are_read_no_further_than_the_prefetch(barcode_clips):
    asked = []

    def requests():
        for number in range(10):
            asked.append(number)
            yield request(barcode_clips["h264"])

    with DecodePool(DecodeConfig(processes=1)) as pool:
        results = pool.map_ordered(requests(), 3)
        for taken in range(1, 11):
            next(results)
            assert len(asked) == min(10, taken + 2)


def test_frames_are_the_reader_s_to_keep(barcode_clips):
    with DecodePool(DecodeConfig(processes=1)) as pool:
        first = next(pool.map_ordered([request(barcode_clips["h264"])], 1))
        before = first.frames.copy()
        next(pool.map_ordered([request(barcode_clips["h264_no_b"])], 1))
    assert np.array_equal(first.frames, before)


@pytest.mark.parametrize(
    ("signal_number", "code"), [(signal.SIGKILL, "crash"), (signal.SIGSEGV, "crash"), (signal.SIGSTOP, "timeout")]
)
def test_a_process_that_dies_or_stalls_costs_one_clip(barcode_clips, slow_clip, signal_number, code):
    with DecodePool(DecodeConfig(processes=1, timeout_s=4)) as pool:
        assert read(next(pool.map_ordered([request(barcode_clips["h264"])], 1)))
        (victim,) = children()

        def strike():
            time.sleep(0.1)
            victim.send_signal(signal_number)

        striker = threading.Thread(target=strike)
        striker.start()
        failed, after = pool.map_ordered([request(slow_clip, SLOW), request(barcode_clips["h264"])], 1)
        striker.join()
        assert isinstance(failed, DecodeFailure)
        assert failed.code == code
        assert "pyav" in str(failed) or code == "timeout"
        assert read(after) == after.frame_indices.tolist()


def test_pyav_has_the_last_word_where_decord_takes_its_process_along(slow_clip):
    with DecodePool(DecodeConfig(processes=1, backend="decord")) as pool:
        wait_until(children)
        (victim,) = children()

        def strike():
            # decord is at work as soon as its library is mapped.
            wait_until(lambda: any("decord" in area.path for area in victim.memory_maps()))
            victim.kill()

        striker = threading.Thread(target=strike)
        striker.start()
        clip = next(pool.map_ordered([request(slow_clip, SLOW)], 1))
        striker.join()
    assert clip.decoder.startswith("pyav")
    assert read(clip) == clip.frame_indices.tolist()


def test_memory_is_bounded_and_costs_one_clip(barcode_clips, tmp_path):
    path = tmp_path / "huge.mp4"
    spec = barcode.ClipSpec(".mp4", frames=4, width=4096, height=2304, options={"preset": "ultrafast", "refs": "4"})
    barcode.make_clip(path, spec)
    with DecodePool(DecodeConfig(processes=1, memory_mb=160)) as pool:
        blown, too_large, after = pool.map_ordered(
            [
                request(path, UniformSampling(frames=2)),
                request(path, UniformSampling(frames=64)),
                request(barcode_clips["h264"]),
            ],
            1,
        )
    assert isinstance(blown, DecodeFailure)
    assert blown.code == "memory"
    assert isinstance(too_large, DecodeFailure)
    assert too_large.code in ("memory", "too_large")
    assert read(after) == after.frame_indices.tolist()


def test_clips_larger_than_the_limit_are_refused(barcode_clips):
    with DecodePool(DecodeConfig(processes=1, memory_mb=256)) as pool:
        failure, after = pool.map_ordered(
            [request(barcode_clips["h264"], UniformSampling(frames=8000)), request(barcode_clips["h264"])], 1
        )
    assert failure.code == "too_large"
    assert "decode.memory_mb" in failure.message
    assert read(after)


def test_memory_does_not_grow_from_clip_to_clip(slow_clip):
    with DecodePool(DecodeConfig(processes=1)) as pool:
        assert len(list(pool.map_ordered([request(slow_clip)] * 3, 1))) == 3
        (child,) = children()
        before = child.memory_info().rss
        for _ in pool.map_ordered([request(slow_clip)] * 15, 1):
            pass
        assert child.memory_info().rss - before < 20 << 20
        assert child.num_threads() < 8, "a scaler's threads end with its clip"


def test_nothing_is_left_of_a_closed_pool(barcode_clips):
    def use():
        with DecodePool(DecodeConfig()) as pool:
            results = pool.map_ordered([request(barcode_clips["h264"])] * 6, 4)
            next(results)  # the others are still under way

    use()
    gc.collect()
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(5):
        use()
    gc.collect()
    assert children() == []
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_closed_pool_says_so(barcode_clips):
    pool = DecodePool(DecodeConfig(processes=1))
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(pool.map_ordered([request(barcode_clips["h264"])], 1))


def test_closing_does_not_wait_for_a_stalled_process(slow_clip):
    pool = DecodePool(DecodeConfig(processes=1))
    wait_until(children)
    results = pool.map_ordered([request(slow_clip, SLOW)] * 4, 4)
    said = []

    def read_all():
        try:
            said.extend(results)
        except RuntimeError as error:
            said.append(str(error))

    reader = threading.Thread(target=read_all)
    reader.start()
    time.sleep(0.3)
    for child in children():
        child.suspend()
    begin = time.monotonic()
    pool.close()
    reader.join()
    assert time.monotonic() - begin < 5
    assert said[-1] == "This decode pool is closed"
    assert children() == []


def test_no_child_outlives_a_killed_parent(slow_clip, tmp_path):
    script = f"""
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import UniformSampling
pool = DecodePool(DecodeConfig())
requests = [DecodeRequest({str(slow_clip)!r}, UniformSampling(frames=100))] * 50
results = pool.map_ordered(requests, 4)
next(results)
print("started", flush=True)
for _ in results:
    pass
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    orphans = psutil.Process(parent.pid).children(recursive=True)
    assert len(orphans) == 2
    for orphan in orphans[:1]:
        orphan.suspend()  # even one that cannot notice
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(o.is_running() and o.status() != psutil.STATUS_ZOMBIE for o in orphans))


def test_short_lived_threads_may_share_a_pool(barcode_clips):
    with DecodePool(DecodeConfig(processes=1)) as pool:
        for _ in range(3):  # children must not die with the thread that asked
            clips = []
            asker = threading.Thread(
                target=lambda clips=clips: clips.extend(pool.map_ordered([request(barcode_clips["h264"])] * 2, 2))
            )
            asker.start()
            asker.join()
            assert [read(clip) for clip in clips] == [clip.frame_indices.tolist() for clip in clips]


def _decode_in_daemon(path: str, answers) -> None:
    with DecodePool(DecodeConfig(processes=1)) as pool:
        answers.put(read(next(pool.map_ordered([request(path)], 1))))


def test_a_daemonic_process_can_decode(barcode_clips):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_decode_in_daemon, args=(str(barcode_clips["h264"]), answers), daemon=True)
    process.start()
    assert answers.get(timeout=60) == [2, 7, 12, 17, 22, 27, 32, 37]
    process.join()


def test_libraries_are_kept_off_the_terminal(barcode_clips, tmp_path, capfd):
    broken = tmp_path / "broken.mp4"
    whole = barcode_clips["h264"].read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for backend in ("pyav", "decord"):
        with DecodePool(DecodeConfig(processes=1, backend=backend)) as pool:
            list(pool.map_ordered([request(broken)], 1))
    assert capfd.readouterr() == ("", "")


def test_a_child_imports_no_more_than_it_decodes_with():
    script = "import sys, tubelet_pipeline.decode.process_main; print(sorted({n.split('.')[0] for n in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "pydantic", "pyarrow", "zarr", "dask", "fsspec", "tubelet_store", "decord"):
        assert f"'{heavy}'" not in modules


def test_limits_are_checked():
    with pytest.raises(ValidationError):
        DecodeConfig(timeout_s=0)
    with pytest.raises(ValidationError):
        DecodeConfig(backend="opencv")
    with pytest.raises(ValueError, match="prefetch"), DecodePool(DecodeConfig(processes=1)) as pool:
        next(pool.map_ordered([], 0))
