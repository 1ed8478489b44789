"""The extraction's driver: make the plan, begin or continue the store, run its shards on the cluster, finish the store.

The number of shard tasks in flight is bounded, and each leaves a durable record, so the driver itself may be killed at
any time: the same command run again extracts what is missing. Whether a job is complete is read from the store, not
from memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from distributed import CancelledError, Client
from distributed.comm import CommClosedError

from tubelet.errors import TubeletError
from tubelet.formats import human_bytes
from tubelet.retry import retry_while_unreachable
from tubelet_pipeline.cluster import ClusterConfig, connect
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.extract_report import ExtractSummary, RunLog
from tubelet_pipeline.plan_extraction import Planned, make_plan
from tubelet_pipeline.preflight import check_workers
from tubelet_pipeline.scheduler import SchedulerLost, ShardScheduler
from tubelet_pipeline.shard_task import ShardReport, report_of, run_shard
from tubelet_pipeline.worker_state import ShardJob
from tubelet_store.format import array_kinds, shard_bytes
from tubelet_store.spool import Spool
from tubelet_store.store_writer import StoreWriter

_RECONNECTS = 3
_SHARDS_NAMED = 5
_VIDEOS_NAMED = 3


def extract(
    config: ExtractConfig,
    on_shard: Callable[[ExtractSummary], None] | None = None,
    task: Callable[[str, int], ShardReport] = run_shard,
) -> ExtractSummary:
    """Run the extraction that `config` describes until its store is complete.

    Args:
        config: What to extract.
        on_shard: Called with the counts so far when the workers are ready, and after each committed shard.
        task: What runs on the workers.

    Raises:
        TubeletError: the configuration is invalid, there is no space for the store, or shards fail repeatedly (the
            others are committed and stay committed).
    """
    with contextlib.ExitStack() as stack:
        cluster = config.workers_from
        if cluster.is_local:
            _check_local_device(config.backbone.device)
        # Every process of an allocation comes here; only one of them continues as the client.
        runner = stack.enter_context(connect(cluster)) if cluster.is_runner else None
        planned = make_plan(config)
        writer = StoreWriter.begin(config.store, planned.plan, planned.clips, planned.provenance)
        writer.discard_scratch()
        writer.drain(Spool(config.upload, writer.url, writer.plan))
        pending = writer.pending()
        summary = ExtractSummary(config.store, "", planned.plan.shards)
        for commit in writer.commits(sorted(set(range(planned.plan.shards)) - set(pending))):
            summary.add(report_of(commit))
        log = stack.enter_context(RunLog(config.log_path))
        job = _Job(config, cluster, planned, writer, summary, log, on_shard, task)
        began = time.perf_counter()
        try:
            if pending:
                _check_room(writer, pending)
            lost_connections = 0
            while pending:
                try:
                    with contextlib.nullcontext(runner) if runner is not None else connect(cluster) as client:
                        scheduler = job.start(client, len(pending))
                        scheduler.run(pending)
                    if pending := job.pending():
                        raise job.not_extracted(pending, scheduler.failures)
                except (SchedulerLost, CancelledError, CommClosedError) as error:
                    job.connection_lost(error, lost_connections)
                    lost_connections += 1
                    pending = job.pending()
            summary.identity = str(retry_while_unreachable(writer.finish, config.upload.patience_s).identity)
        except BaseException as error:
            log("end", status=f"{type(error).__name__}: {error}", shards_this_run=summary.shards_this_run)
            raise
        summary.seconds = time.perf_counter() - began
        log(
            "end",
            status="complete",
            shards_this_run=summary.shards_this_run,
            seconds=round(summary.seconds, 3),
            identity=summary.identity,
        )
        return summary


@dataclass
class _Job:
    """One extraction in progress; it continues after a lost connection to the scheduler."""

    config: ExtractConfig
    cluster: ClusterConfig
    planned: Planned
    writer: StoreWriter
    summary: ExtractSummary
    log: RunLog
    on_shard: Callable[[ExtractSummary], None] | None
    task: Callable[[str, int], ShardReport]

    def start(self, client: Client, pending: int) -> ShardScheduler:
        """Check the workers, log the start, and return the scheduler of the job's shards."""
        plan = self.planned.plan
        versions = check_workers(client, self.cluster, f"preflight-{plan.digest[-12:]}")
        self.summary.dashboard = dashboard_of(client)
        self.log(
            "start",
            plan=plan.digest,
            store=self.config.store,
            shards=plan.shards,
            pending=pending,
            clips=plan.clips,
            workers=len(client.scheduler_info(n_workers=-1)["workers"]),
            dashboard=self.summary.dashboard,
            versions=versions,
        )
        if self.on_shard is not None:
            self.on_shard(self.summary)
        job = shard_job(self.config, self.planned)
        return ShardScheduler(client, job, self.cluster, self.log, self._committed, self.task)

    def pending(self) -> list[int]:
        """Shards without a record."""
        return retry_while_unreachable(self.writer.pending, self.config.upload.patience_s)

    def connection_lost(self, error: Exception, earlier: int) -> None:
        """Log it; give up after `_RECONNECTS` times, or where the scheduler ended with the connection."""
        self.log("lost", reason=str(error))
        if earlier == _RECONNECTS or not self.cluster.lasting:
            raise TubeletError(
                f"The connection to the Dask scheduler was lost, {self.summary.shards_done} of "
                f"{self.summary.shards} shards are committed",
                "Run the same command again: it extracts what is missing",
            ) from error

    def not_extracted(self, shards: list[int], failures: dict[int, list[str]]) -> TubeletError:
        """The error that names the first of `shards`, their videos and their last failures."""
        reasons = [f"shard {shard} ({self._videos(shard)}): {failures.get(shard, ['lost'])[-1]}" for shard in shards]
        more = f"; and {len(shards) - _SHARDS_NAMED} more" if len(shards) > _SHARDS_NAMED else ""
        return TubeletError(
            f"{len(shards)} of {self.planned.plan.shards} shards could not be extracted: "
            f"{'; '.join(reasons[:_SHARDS_NAMED])}{more}",
            "The others are committed. Fix the cause and run the same command again",
        )

    def _committed(self, report: ShardReport) -> None:
        summary = self.summary
        summary.add(report)
        summary.shards_this_run += 1
        summary.clips_this_run += sum(report.clips.values())
        summary.tokens_this_run += report.clips.get("ok", 0) * self.planned.plan.grid.tokens
        if self.on_shard is not None:
            self.on_shard(summary)

    def _videos(self, shard: int) -> str:
        clips = self.planned.plan.shard_range(shard)
        uris = list(dict.fromkeys(self.planned.clips["uri"].slice(clips.start, len(clips)).to_pylist()))
        named = ", ".join(uris[:_VIDEOS_NAMED])
        return f"{named} and {len(uris) - _VIDEOS_NAMED} more videos" if len(uris) > _VIDEOS_NAMED else named


def shard_job(config: ExtractConfig, planned: Planned) -> ShardJob:
    """The specification of every shard task; paths are absolute, because workers may run in another directory."""
    backbone = config.backbone
    if Path(backbone.id).is_dir():
        backbone = backbone.model_copy(update={"id": _absolute(backbone.id)})
    return ShardJob(
        store=_absolute(config.store),
        plan_digest=planned.plan.digest,
        dataset_root=_absolute(str(config.dataset.root)),
        sampling=config.sampling,
        views=config.views,
        tokens=config.tokens,
        backbone=backbone,
        hooks=tuple(hook.name for hook in planned.plan.hooks),
        decode=config.decode,
        batch_size=config.batch_size,
        threads=config.cluster.threads,
        upload=config.upload,
    )


def dashboard_of(client: Client) -> str | None:
    """Address of the cluster's dashboard; None where its pages would be dead.

    Without bokeh Dask still serves the address. The scheduler is taken to have the same packages as this process.
    """
    services = client.scheduler_info(n_workers=0).get("services", {})
    if not services.get("dashboard") or importlib.util.find_spec("bokeh") is None:
        return None
    return str(client.dashboard_link)


def _check_local_device(name: str) -> None:
    """Refuse a device that this machine does not have, before a cluster is started and without initializing CUDA."""
    if name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TubeletError(
            f"backbone.device '{name}' is no device of torch", "Set backbone.device: auto, cpu or cuda"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TubeletError(
            f"backbone.device is '{name}', and torch finds {torch.cuda.device_count() or 'no'} GPU(s) on this machine",
            "Set backbone.device: auto or cpu, or give the scheduler of a cluster whose workers have GPUs",
        )


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).expanduser().absolute())


def _check_room(writer: StoreWriter, pending: list[int]) -> None:
    free = writer.free_bytes()
    plan = writer.plan
    needed = sum(
        shard_bytes(plan, kind, hook, shard) for kind in array_kinds(plan) for hook in plan.hooks for shard in pending
    )
    if free is not None and free < needed:
        raise TubeletError(
            f"The store needs another {human_bytes(needed)}, but only {human_bytes(free)} are free at {writer.url}",
            "Free some space, store fewer hooks, or choose another disk or an s3:// URL",
        )
