"""Does the cost per clip stay the same from 1,000 to 100,000 clips, and the memory of client and scheduler?

    python benchmarks/scale.py [--clips 1000 10000 100000] [--clips-per-shard 25]

Null decode and a null backbone (registered only here): what is left is planning, handing out, committing, finishing.
Every size runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from distributed import Client, LocalCluster

from tubelet_pipeline.cluster import ClusterConfig
from tubelet_pipeline.hand_out import HandOut
from tubelet_pipeline.run_log import RunLog
from tubelet_pipeline.shard_task import ShardJob, ShardReport, report
from tubelet_store import ClipOutcome, Plan, StoreWriter


@cache
def _attached(store: str, plan_digest: str) -> StoreWriter:
    return StoreWriter.attach(store, plan_digest)


def null_shard(job_json: str, shard: int) -> ShardReport:
    """A shard task whose clips cost nothing: the real writer, made-up activations."""
    job = ShardJob.model_validate_json(job_json)
    writer = _attached(job.store, job.plan_digest)
    hook = writer.plan.hooks[0]
    tokens = {hook.name: np.full(writer.plan.clip_shape(hook), 0.5, np.float16)}
    outcome = ClipOutcome(status="ok", frame_indices=tuple(range(16)), video_frames=64, width=340, height=256)
    with writer.shard(shard) as shard_writer:
        for _ in writer.plan.shard_range(shard):
            shard_writer.append(outcome, tokens)
        return report(shard_writer.commit())


def null_job(store: str, plan: Plan) -> ShardJob:
    """What the tasks are told."""
    return ShardJob.model_validate(
        {
            "store": store,
            "plan_digest": plan.digest,
            "dataset_root": "/nowhere",
            "sampling": {"kind": "dense", "frames": 16},
            "backbone": {"id": "null"},
            "hooks": ["blocks.1"],
            "decode": {},
            "batch_size": 1,
            "threads": 1,
            "upload": {},
        }
    )


def one_size(clips: int, clips_per_shard: int, folder: Path) -> dict[str, Any]:
    """Write a store of `clips` clips; seconds and peak memory."""
    stores = importlib.import_module("stores")

    store = str(folder / "store.zarr")
    plan: Plan = stores.make_plan(clips=clips, clips_per_shard=clips_per_shard, grid=(2, 2, 2), hooks={"blocks.1": 8})
    table: pa.Table = stores.planned_table(clips)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        marks = {"begun": time.perf_counter()}
        writer = StoreWriter.begin(store, plan, table, {})
        pending = writer.pending()
        marks["planned"] = time.perf_counter()
        done: list[float] = []
        hand_out = HandOut(
            client,
            null_job(store, plan),
            ClusterConfig(),
            RunLog(None),
            lambda _: done.append(time.perf_counter()),
            task=null_shard,
        )
        hand_out.run(pending)
        marks["extracted"] = time.perf_counter()
    writer.finish()
    marks["finished"] = time.perf_counter()
    tenth = max(1, len(done) // 10)
    return {
        "clips": clips,
        "shards": plan.shards,
        "plan_ms": 1000 * (marks["planned"] - marks["begun"]) / clips,
        "extract_ms": 1000 * (marks["extracted"] - marks["planned"]) / clips,
        "first_tenth_ms": 1000 * (done[tenth] - done[0]) / (tenth * clips_per_shard),
        "last_tenth_ms": 1000 * (done[-1] - done[-1 - tenth]) / (tenth * clips_per_shard),
        "finish_ms": 1000 * (marks["finished"] - marks["extracted"]) / clips,
        "all_ms": 1000 * (marks["finished"] - marks["begun"]) / clips,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--clips-per-shard", type=int, default=25)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    if options.one:
        scale = importlib.import_module("scale")

        # By this name, unlike __main__, the workers can import the task.
        print(json.dumps(scale.one_size(options.one, options.clips_per_shard, options.folder)))
        return
    columns = ["clips", "shards", "plan_ms", "extract_ms", "first_tenth_ms", "last_tenth_ms", "finish_ms", "all_ms"]
    columns.append("peak_mb")
    print("milliseconds per clip; client and scheduler in one process")
    print("".join(f"{name:>15}" for name in columns), flush=True)
    for clips in options.clips:
        folder = Path(tempfile.mkdtemp(prefix="tubelet-scale-", dir=options.folder))
        roots = [Path(__file__).parent, Path(__file__).parents[1] / "tests"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}
        command = [sys.executable, __file__, "--one", str(clips), "--folder", str(folder)]
        try:
            command += ["--clips-per-shard", str(options.clips_per_shard)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        finally:
            shutil.rmtree(folder)
        row = json.loads(run.stdout.splitlines()[-1])
        cells = [f"{value:15.3f}" if isinstance(value := row[name], float) else f"{value:15d}" for name in columns]
        print("".join(cells), flush=True)


if __name__ == "__main__":
    main()
