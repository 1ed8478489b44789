"""Several jobs in one worker process: none disturbs another, and memory holds no more than it must."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from tubelet.errors import TubeletError
from tubelet_pipeline.cluster import ClusterConfig
from tubelet_pipeline.driver import shard_job
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.extract_report import RunLog
from tubelet_pipeline.plan_extraction import make_plan
from tubelet_pipeline.scheduler import ShardScheduler
from tubelet_pipeline.shard_task import ShardReport
from tubelet_pipeline.worker_state import Runtime, Runtimes, ShardJob
from tubelet_store.reader import open_store
from tubelet_store.store_writer import StoreWriter


@pytest.fixture
def jobs(job_settings: dict[str, Any], tmp_path: Path) -> list[ShardJob]:
    """Three jobs of three plans: their stores are begun."""
    begun = []
    for stride in (1, 2, 3):
        sampling = {**job_settings["sampling"], "stride": stride}
        store = str(tmp_path / f"{stride}.zarr")
        config = ExtractConfig.model_validate({**job_settings, "sampling": sampling, "store": store})
        planned = make_plan(config)
        StoreWriter.begin(store, planned.plan, planned.clips, planned.provenance)
        begun.append(shard_job(config, planned))
    return begun


def decodes(runtime: Runtime) -> bool:
    """Whether its decode processes are there."""
    try:
        return len(list(runtime.decoded([0], 1))) == 1
    except RuntimeError:
        return False


def test_jobs_of_two_clients_on_one_worker_end_without_a_second_try(jobs: list[ShardJob], tmp_path: Path) -> None:
    def extract(job: ShardJob) -> dict[int, list[str]]:
        writer = StoreWriter.attach(job.store, job.plan_digest)
        done: list[ShardReport] = []
        with Client(cluster.scheduler_address) as client, RunLog(tmp_path / f"{Path(job.store).stem}.jsonl") as log:
            shard_scheduler = ShardScheduler(client, job, ClusterConfig(), log, done.append)
            shard_scheduler.run(writer.pending())
        assert len(done) == 9
        return shard_scheduler.failures

    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "protocol": "tcp://"}
    with LocalCluster(dashboard_address=None, **options) as cluster, ThreadPoolExecutor(3) as clients:
        assert list(clients.map(extract, jobs)) == [{}, {}, {}]
    for job in jobs:
        StoreWriter.attach(job.store, job.plan_digest).finish()
        assert sum(row["status"] == "ok" for row in open_store(job.store).clips().to_pylist()) == 25
        events = [json.loads(line) for line in (tmp_path / f"{Path(job.store).stem}.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events] == ["shard"] * 9


def test_what_is_used_stays_open_and_of_the_rest_only_the_newest(jobs: list[ShardJob]) -> None:
    runtimes = Runtimes()
    one, two, three = (job.model_dump_json() for job in jobs)
    with runtimes.using(one) as first, runtimes.using(two) as second:
        with runtimes.using(one) as again:
            assert again is first
        assert decodes(first)
        assert decodes(second)
    # The second was left first.
    assert decodes(first)
    assert not decodes(second)
    with runtimes.using(one) as again:
        assert again is first
    with runtimes.using(three) as third:
        assert not decodes(first), "it made room before the third was loaded"
        with runtimes.using(two) as second:
            assert decodes(third)
        assert decodes(second), "idle, and the newest"
        with runtimes.using(one) as first:
            assert not decodes(second)
    assert decodes(third)
    assert not decodes(first)
    third.decoder.close()


def test_a_runtime_that_cannot_be_made_is_tried_again(jobs: list[ShardJob], tmp_path: Path) -> None:
    runtimes = Runtimes()
    store, aside = Path(jobs[0].store), tmp_path / "aside.zarr"
    store.rename(aside)
    for _ in range(2):
        with pytest.raises(TubeletError), runtimes.using(jobs[0].model_dump_json()):
            pass
    aside.rename(store)
    with runtimes.using(jobs[0].model_dump_json()) as made:
        assert decodes(made)
    made.decoder.close()
