"""Handing shards out: what counts against a shard, and what does not."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

import cloudpickle
import dask
from distributed import Client, LocalCluster

from tubelet_pipeline.cluster import ClusterConfig
from tubelet_pipeline.extract_report import RunLog
from tubelet_pipeline.scheduler import ShardScheduler
from tubelet_pipeline.shard_task import ShardReport
from tubelet_pipeline.worker_state import ShardJob

# Workers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

JOB = ShardJob.model_validate(
    {
        "store": "s.zarr",
        "plan_digest": "sha256:plan",
        "dataset_root": "/nowhere",
        "sampling": {"kind": "dense", "frames": 8},
        "backbone": {"id": "none"},
        "hooks": ["blocks.0"],
        "decode": {},
        "batch_size": 1,
        "threads": 1,
        "upload": {},
    }
)


def unlucky(folder: Path, _job: str, shard: int) -> ShardReport:
    """Dies once, raises twice, is done."""
    tries = len(list(folder.iterdir()))
    (folder / str(tries)).touch()
    if tries == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if tries < 3:
        raise RuntimeError(f"try {tries}")
    return ShardReport(shard, {"ok": 1}, 1, {})


def test_a_death_that_may_have_been_another_shards_is_not_one_of_its_tries(tmp_path: Path) -> None:
    done: list[int] = []
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        shard_scheduler = ShardScheduler(
            client,
            JOB,
            ClusterConfig(),
            RunLog(None),
            lambda report: done.append(report.shard),
            task=functools.partial(unlucky, tmp_path),
        )
        shard_scheduler.run([7])
    assert done == [7]
    assert [reason.split(":")[0] for reason in shard_scheduler.failures[7]][1:] == ["RuntimeError", "RuntimeError"]


def instant(_job: str, shard: int) -> ShardReport:
    return ShardReport(shard, {"ok": 1}, 1, {})


def test_few_shards_are_in_flight_however_many_there_are() -> None:
    held: list[int] = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        shard_scheduler = ShardScheduler(
            client, JOB, ClusterConfig(), RunLog(None), lambda _: held.append(len(client.futures)), task=instant
        )
        shard_scheduler.run(range(200))
    assert len(held) == 200
    assert 2 <= max(held) <= 8
