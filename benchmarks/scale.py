"""Does the cost per clip stay the same from 1,000 to 100,000 clips, and the memory of client and scheduler?

    python benchmarks/scale.py [--clips 1000 10000 100000] [--clips-per-shard 25]

The real driver on a scheduler and two workers in processes of their own, with a null backbone: a task decodes nothing
and computes nothing, it writes made-up activations with the real writer. What is left is listing and planning, handing
out, committing and finishing. Costs are processor time, which other work on the machine hardly changes; the wall time
is given too. Every size has fresh processes, so memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from goals import Goal, goal_lines
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.extract_report import ExtractSummary
from tubelet_pipeline.plan_extraction import make_plan
from tubelet_pipeline.shard_task import ShardReport, report_of
from tubelet_pipeline.worker_state import ShardJob
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.store_writer import StoreWriter

_WORKERS = 2
# As docs/clusters.md starts workers.
_SHARDS_AT_A_TIME = 2
# Each worker's first shards hold its imports.
_WARM_SHARDS = 5 * _WORKERS
_FILES_PER_FOLDER = 1000

_attach = cache(StoreWriter.attach)


def null_shard(job_json: str, shard: int) -> ShardReport:
    """A shard task whose clips cost nothing: the real writer, made-up activations."""
    job = ShardJob.model_validate_json(job_json)
    writer = _attach(job.store, job.plan_digest)
    plan = writer.plan
    tokens = {hook.name: np.full(plan.clip_shape(hook), 0.5, np.float16) for hook in plan.hooks}
    outcome = ClipOutcome(status="ok", frame_indices=tuple(range(16)), video_frames=64, width=340, height=256)
    with writer.shard(shard) as shard_writer:
        for _ in plan.shard_range(shard):
            shard_writer.append(outcome, tokens)
        return report_of(shard_writer.commit())


class Meter:
    """Processor seconds and memory of the client (this process), the scheduler and the workers."""

    def __init__(self, scheduler: int, workers: list[int]) -> None:
        self.client, self.scheduler = psutil.Process(), psutil.Process(scheduler)
        self.workers = [psutil.Process(pid) for pid in workers]

    def cpu_s(self) -> np.ndarray:
        """[4] Wall, then processor seconds of client, scheduler, workers."""
        used = [sum(process.cpu_times()[:2]) for process in (self.client, self.scheduler, *self.workers)]
        return np.array([time.perf_counter(), used[0], used[1], sum(used[2:])])

    def memory_mb(self) -> np.ndarray:
        """[2] Resident memory of client and scheduler."""
        return np.array([process.memory_info().rss / 2**20 for process in (self.client, self.scheduler)])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[tuple[Path, Meter]]:
    """A scheduler and workers as processes; the scheduler's file, and what measures them."""
    file = folder / "scheduler.json"
    options = ["--scheduler-file", str(file), "--no-dashboard"]
    kinds = [
        ["scheduler", "--port", "0", *options],
        *[["worker", "--nthreads", str(_SHARDS_AT_A_TIME), "--no-nanny", *options]] * _WORKERS,
    ]
    with (folder / "dask.log").open("wb") as log, contextlib.ExitStack() as stack:
        processes = []
        for kind, *rest in kinds:
            command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *rest]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=folder))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        while not file.exists():
            time.sleep(0.1)
        yield file, Meter(processes[0].pid, [process.pid for process in processes[1:]])


def one_size(clips: int, clips_per_shard: int, folder: Path) -> dict[str, float]:
    """Write a store of `clips` clips; costs per clip in milliseconds, memory in MB."""
    for number in range(clips):
        video = folder / "videos" / f"{number // _FILES_PER_FOLDER:04d}" / f"{number:07d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        video.touch()
    model = write_tiny_videomae(folder / "model", image_size=16, patch_size=8, frames=4, hidden=8, layers=2)
    settings: dict[str, Any] = {
        "dataset": {"kind": "folder", "root": str(folder / "videos")},
        "sampling": {"kind": "dense", "frames": 4},
        "backbone": {"id": str(model)},
        "hooks": ["blocks.1"],
        "clips_per_shard": clips_per_shard,
        "store": str(folder / "store.zarr"),
    }
    # What is paid once a process (transformers takes seconds to import) says nothing about clips.
    make_plan(ExtractConfig.model_validate({**settings, "dataset": {**settings["dataset"], "limit": 1}}))
    with cluster(folder) as (file, meter):
        config = ExtractConfig.model_validate({**settings, "cluster": {"scheduler_file": str(file)}})
        marks, memory = [meter.cpu_s()], []

        def mark(_summary: ExtractSummary) -> None:
            marks.append(meter.cpu_s())
            memory.append(meter.memory_mb())

        summary = extract(config, mark, task=null_shard)
        marks.append(meter.cpu_s())
        peak_mb = [_peak_mb(process.pid) for process in (meter.client, meter.scheduler)]
    shards = summary.shards
    begun, warm, done, finished = marks[0], marks[1 + _WARM_SHARDS], marks[1 + shards], marks[-1]
    tenth = max(1, (shards - _WARM_SHARDS) // 10)
    planned, extracted = marks[1] - begun, (done - warm) / (shards - _WARM_SHARDS) / clips_per_shard
    first = marks[1 + _WARM_SHARDS + tenth] - warm
    last = done - marks[1 + shards - tenth]
    return {
        "clips": clips,
        "shards": shards,
        "plan": 1000 * planned[1] / clips,
        "client": 1000 * extracted[1],
        "scheduler": 1000 * extracted[2],
        "workers": 1000 * extracted[3],
        "finish": 1000 * (finished - done)[1] / clips,
        "all": 1000 * (extracted[1:].sum() + (planned + finished - done)[1] / clips),
        "first 10th": 1000 * first[1:].sum() / tenth / clips_per_shard,
        "last 10th": 1000 * last[1:].sum() / tenth / clips_per_shard,
        "wall": 1000 * (finished - begun)[0] / clips,
        "client MB": memory[_WARM_SHARDS][0],
        "at end": memory[-1][0],
        "peak": peak_mb[0],
        "sched. MB": memory[_WARM_SHARDS][1],
        "at end ": memory[-1][1],
        "peak ": peak_mb[1],
    }


def _peak_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--clips-per-shard", type=int, default=25)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    if options.one:
        # By this name, unlike __main__, the workers can import the task.
        scale = importlib.import_module("scale")
        print(json.dumps(scale.one_size(options.one, options.clips_per_shard, options.folder)))
        return
    rows: list[dict[str, float]] = []
    for clips in options.clips:
        folder = Path(tempfile.mkdtemp(prefix="tubelet-scale-", dir=options.folder))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, __file__, "--one", str(clips), "--folder", str(folder)]
        try:
            command += ["--clips-per-shard", str(options.clips_per_shard)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        finally:
            shutil.rmtree(folder)
        row = json.loads(run.stdout.splitlines()[-1])
        if not rows:
            print(f"{options.clips_per_shard} clips a shard; milliseconds of processor time per clip, and of wall")
            print("".join(f"{name:>11}" for name in row), flush=True)
        rows.append(row)
        print("".join(f"{value:11.3f}" if value % 1 else f"{value:11.0f}" for value in row.values()), flush=True)
    costs = [row["all"] for row in rows]
    goals = [Goal("scale/cpu-per-clip-dearest-over-cheapest", max(costs) / min(costs), at_most=1.2)]
    for who, column in (("client", "peak"), ("scheduler", "peak ")):
        # Peak memory of the largest size over that of the smallest.
        goals.append(Goal(f"scale/{who}-memory-growth", rows[-1][column] / rows[0][column], at_most=1.2))
    print("\n".join(goal_lines(goals)))


if __name__ == "__main__":
    main()
