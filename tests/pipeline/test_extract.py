"""Extraction as a user runs it: killed, resumed, given wrong settings."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zarr

from processes import run_tubelet, start_tubelet
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import BackboneConfig, load_backbone
from tubelet_pipeline.extract_report import failed_videos
from tubelet_store.reader import open_store

# Seconds pass on an idle machine; workers import for minutes where others compute.
PATIENT_S = 240


def content(store: Path) -> dict[str, bytes]:
    """Every byte of a finished store that its identity covers, manifest included."""
    files = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    return {
        key: path.read_bytes() for key, path in files.items() if key != "zarr.json" and not key.startswith("commits/")
    }


def commits(store: Path) -> int:
    return len(list((store / "commits").glob("*.json")))


def wait_for_commits(store: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until `process` has committed so many shards; one that ends before fails, with what it said."""
    deadline = time.monotonic() + PATIENT_S
    while True:
        ended = process.poll() is not None
        if commits(store) >= count:
            return
        assert not ended, process.communicate()[1]
        assert time.monotonic() < deadline, f"only {commits(store)} commits"
        time.sleep(0.01)


def workers_of(pid: int) -> Iterator[psutil.Process]:
    """Dask worker processes below `pid`: those that hold decode children."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if any("tubelet_pipeline.decode" in " ".join(child.cmdline()) for child in process.children()):
                yield process
        except psutil.Error:
            continue


@pytest.mark.timeout(4 * PATIENT_S)
def test_killed_jobs_and_workers_leave_the_store_an_undisturbed_run_writes(
    job: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.zarr"

    # The whole job, with its workers, as a node that loses power.
    process = start_tubelet("extract", str(job))
    wait_for_commits(store, 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    for survivor in [p for p in psutil.process_iter(["cmdline"]) if str(job) in " ".join(p.info["cmdline"] or [])]:
        survivor.kill()
    process.communicate()
    first = commits(store)
    assert 1 <= first < 9
    with pytest.raises(TubeletError, match="unfinished"):
        open_store(str(store))

    # Both workers, one after the other, while the job continues; then the driver alone, workers left behind.
    process = start_tubelet("extract", str(job))
    killed: set[int] = set()
    deadline = time.monotonic() + PATIENT_S
    while len(killed) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"only {len(killed)} workers were there to kill"
        for worker in workers_of(process.pid):
            if worker.pid not in killed:
                worker.kill()
                killed.add(worker.pid)
                break
        time.sleep(0.05)
    wait_for_commits(store, first + 1, process)
    process.kill()
    process.communicate()

    assert main(["extract", str(job)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("stored      25 of 26 clips"), "results on stdout"
    assert "extracting: 9 of 9 shards" in shown.err, "progress on stderr"
    assert content(store) == content(undisturbed)
    assert open_store(str(store)).identity == open_store(str(undisturbed)).identity
    assert not (store / ".tmp").exists()

    assert main(["extract", str(job)]) == 0
    assert "nothing was missing" in capsys.readouterr().out


def test_stored_values_are_the_backbones_on_the_stored_frames(undisturbed: Path, videos: Path, backbone: Path) -> None:
    import av

    store = open_store(str(undisturbed))
    model = load_backbone(BackboneConfig(id=str(backbone)), frames=8)
    row = store.clips().to_pylist()[7]
    with av.open(str(videos / row["uri"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert row["video_frames"] == len(frames)
    chosen = np.ascontiguousarray(np.stack([frames[i] for i in row["frame_indices"]]))
    pixels, crop = model.preprocess(chosen)
    assert tuple(row["crop"]) == (crop.top, crop.left, crop.height, crop.width)
    with torch.no_grad():
        expected = model.activations(pixels[None], ["blocks.0", "blocks.1"])
    group = zarr.open_group(str(undisturbed), mode="r")
    for hook, captured in expected.items():
        stored = np.asarray(group[f"activations/{hook}"][7])
        # float16 keeps 11 bits; the batch the clip was computed in may differ from this one.
        np.testing.assert_allclose(stored, captured.tokens[0].numpy(), rtol=2e-3, atol=2e-3)


def test_a_broken_video_is_a_row_of_nan_with_its_reason(undisturbed: Path, videos: Path) -> None:
    store = open_store(str(undisturbed))
    failed = [row for row in store.clips().to_pylist() if row["status"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["error"].split(":")[0] in ("open_failed", "decode_failed", "no_frames")
    assert str(videos) not in failed[0]["error"]
    shard, place = divmod(failed[0]["clip"], store.plan.clips_per_shard)
    assert np.isnan(store.shard_map("blocks.1", shard)[place]).all()
    assert store.moments("blocks.1").count == 25 * store.plan.grid.tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hooks", "[blocks.7]"], ["no hook 'blocks.7'", "blocks.0 to blocks.1"]),
        (["--backbone.idd", "x"], ["'backbone.idd'", "Did you mean 'id'?"]),
        (["--sampling.strid", "2"], ["'sampling.strid'", "Did you mean 'stride'?"]),
        (["--sampling.frames", "5"], ["takes 8 frames", "sampling.frames: 8"]),
        (["--dataset.root", "/nowhere"], ["/nowhere", "dataset.root"]),
        (["--dataset.split", "trian"], ["trian", "train"]),
        (["--backbone.id", "/nowhere"], ["/nowhere"]),
        (["--dtype", "float12"], ["dtype", "bfloat16"]),
        (["--cluster.scheduler", "tcp://127.0.0.1:9"], ["No Dask scheduler answers at tcp://127.0.0.1:9"]),
        (["--backbone.device", "gpu"], ["'gpu' is no device"]),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(
    job: Path,
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tubelet_pipeline.cluster._CONNECT_TIMEOUT_S", 1)
    assert main(["extract", str(job), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tubelet: error:")]
    for word in words:
        assert word in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_a_local_cluster_starts(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["extract", str(job), "--backbone.device", "cuda:0"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "store.zarr").exists()
    # Workers elsewhere may have one.
    monkeypatch.setattr("tubelet_pipeline.cluster._CONNECT_TIMEOUT_S", 1)
    assert main(["extract", str(job), "--backbone.device", "cuda:0", "--scheduler", "tcp://127.0.0.1:9"]) == 2
    assert "No Dask scheduler" in capsys.readouterr().err


def test_views_of_a_broken_video_are_one_line() -> None:
    clips = [{"uri": "a.mp4", "error": "open_failed: x"}] * 3 + [{"uri": "b.mp4", "error": "timeout: y"}]
    assert failed_videos(clips) == ["a.mp4: open_failed: x (3 clips)", "b.mp4: timeout: y"]


def test_another_plan_for_the_same_store_is_refused_with_the_difference(
    job: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(undisturbed)
    assert main(["extract", str(job), "--store", str(undisturbed), "--sampling.stride", "1"]) == 2
    assert "sampling.stride: 2 -> 1" in capsys.readouterr().err
    assert content(undisturbed) == before


def test_an_empty_folder_is_named(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["extract", str(job), "--dataset", f"{{kind: folder, root: {tmp_path / 'empty'}}}"]) == 2
    assert f"No video files under {tmp_path / 'empty'}" in capsys.readouterr().err


UNREADABLE = {
    "audio_only_nasa.mp4": "no_video_stream",
    "decord_corrupted.mp4": "decode_failed",
    "html_as_mp4.mp4": "open_failed",
    "k400_trunc_mp4_head.mp4": "open_failed",
    "k400_zeroed_middle.mp4": "decode_failed",
    "libwebm_fixed_lacing_bad_lace_size.mkv": "no_frames",
    "random_bytes.mp4": "open_failed",
    "zero_length.mp4": "open_failed",
}


@pytest.mark.real_videos
def test_a_folder_of_real_videos_is_stored_and_the_broken_ones_are_listed(
    job: Path, real_videos: Path, tmp_path: Path
) -> None:
    # Sampled to the very end: what is broken in a file is met.
    status, out, err = run_tubelet(
        "extract",
        str(job),
        "--dataset",
        f"{{kind: folder, root: {real_videos}}}",
        "--sampling",
        "{kind: uniform, frames: 8}",
        "--clips-per-shard",
        "8",
    )
    assert status == 0, err
    rows = open_store(str(tmp_path / "store.zarr")).clips().to_pylist()
    failed = {Path(row["uri"]).name: row["error"].split(":")[0] for row in rows if row["status"] == "failed"}
    # Cut short after its index: how much of it decodes depends on where sampling looks.
    failed.pop("k400_trunc_faststart.mp4", None)
    assert failed == UNREADABLE
    assert {row["uri"].split("/")[0] for row in rows if row["status"] == "ok"} == {"sound", "broken"}
    assert sum(row["status"] == "ok" and row["uri"].startswith("sound/") for row in rows) == 28
    for name, code in UNREADABLE.items():
        assert f"broken/{name}: {code}" in out


def test_a_disk_without_room_is_refused_before_anything_runs(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tubelet_store.storage.local.LocalRoot.free_bytes", lambda self: 1000)
    assert main(["extract", str(job)]) == 2
    assert "are free at" in capsys.readouterr().err
    assert commits(tmp_path / "store.zarr") == 0
