"""The extraction's driver: plan, begin or continue the store, hand out shards, finish.

A bounded number of shard tasks is in flight, and each leaves a durable record, so the driver itself may die at any
time: the same command again does what is missing. Whether a job is complete is read from the store, not from memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from tubelet_pipeline.shard_task import ShardReport, report
from tubelet_pipeline.worker_state import ShardJob
from tubelet_store.format import array_kinds, shard_bytes
from tubelet_store.spool import Spool
from tubelet_store.store_writer import StoreWriter

_RECONNECTS = 3
_SHOWN = 5
_VIDEOS_SHOWN = 3


def extract(config: ExtractConfig, on_shard: Callable[[ExtractSummary], None] | None = None) -> ExtractSummary:
    """Run the extraction that `config` describes, to its end.

    Args:
        config: What to extract.
        on_shard: Called with the counts so far when the workers are there, and after each committed shard.

    Raises:
        TubeletError: a mistake in the configuration, no room for the store, or shards that fail again and again (the
            others are committed and stay so).
    """
    with contextlib.ExitStack() as stack:
        cluster = config.workers_from
        # Every process of an allocation comes here; only one of them comes out of this as the client.
        client = stack.enter_context(connect(cluster)) if cluster.is_runner else None
        planned = make_plan(config)
        writer = StoreWriter.begin(config.store, planned.plan, planned.clips, planned.provenance)
        writer.discard_scratch()
        writer.drain(Spool(config.upload, writer.url, writer.plan))
        pending = writer.pending()
        summary = ExtractSummary(config.store, "", planned.plan.shards)
        for commit in writer.commits(sorted(set(range(planned.plan.shards)) - set(pending))):
            summary.add(report(commit))
        log = stack.enter_context(RunLog(config.log_path))
        began = time.perf_counter()
        try:
            if pending:
                _check_room(writer, pending)
                _Run(config, cluster, planned, writer, summary, log, on_shard).until_done(client)
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
class _Run:
    """Shards of one job on the cluster, however often the scheduler is lost."""

    config: ExtractConfig
    cluster: ClusterConfig
    planned: Planned
    writer: StoreWriter
    summary: ExtractSummary
    log: RunLog
    on_shard: Callable[[ExtractSummary], None] | None

    def until_done(self, client: Client | None) -> None:
        for lost in range(_RECONNECTS + 1):
            try:
                if client is not None:
                    self._once(client)
                else:
                    with connect(self.cluster) as fresh:
                        self._once(fresh)
                return
            except (SchedulerLost, CancelledError, CommClosedError) as error:
                self.log("lost", reason=str(error))
                if lost == _RECONNECTS or not self.cluster.lasting:
                    raise TubeletError(
                        f"The connection to the Dask scheduler was lost, {self.summary.shards_done} of "
                        f"{self.summary.shards} shards are committed",
                        "Run the same command again: it does what is missing",
                    ) from error

    def _once(self, client: Client) -> None:
        plan, config = self.planned.plan, self.config
        pending = self._pending()
        versions = check_workers(client, self.cluster, f"preflight-{plan.digest[-12:]}")
        self.summary.dashboard = dashboard_of(client)
        self.log(
            "start",
            plan=plan.digest,
            store=config.store,
            shards=plan.shards,
            pending=len(pending),
            clips=plan.clips,
            workers=len(client.scheduler_info(n_workers=-1)["workers"]),
            dashboard=self.summary.dashboard,
            versions=versions,
        )
        if self.on_shard is not None:
            self.on_shard(self.summary)
        shard_scheduler = ShardScheduler(client, shard_job(config, self.planned), self.cluster, self.log, self._done)
        shard_scheduler.run(pending)
        if lost := self._pending():
            raise self._not_extracted(lost, shard_scheduler.failures)

    def _pending(self) -> list[int]:
        return retry_while_unreachable(self.writer.pending, self.config.upload.patience_s)

    def _done(self, report: ShardReport) -> None:
        summary = self.summary
        summary.add(report)
        summary.shards_this_run += 1
        summary.clips_this_run += sum(report.clips.values())
        summary.tokens_this_run += report.clips.get("ok", 0) * self.planned.plan.grid.tokens
        if self.on_shard is not None:
            self.on_shard(summary)

    def _not_extracted(self, lost: list[int], failures: dict[int, list[str]]) -> TubeletError:
        reasons = [f"shard {shard} ({self._videos(shard)}): {failures.get(shard, ['lost'])[-1]}" for shard in lost]
        more = f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        return TubeletError(
            f"{len(lost)} of {self.planned.plan.shards} shards could not be extracted: "
            f"{'; '.join(reasons[:_SHOWN])}{more}",
            "The others are committed. Mend the cause and run the same command again",
        )

    def _videos(self, shard: int) -> str:
        clips = self.planned.plan.shard_range(shard)
        uris = list(dict.fromkeys(self.planned.clips["uri"].slice(clips.start, len(clips)).to_pylist()))
        shown = ", ".join(uris[:_VIDEOS_SHOWN])
        return f"{shown} and {len(uris) - _VIDEOS_SHOWN} more videos" if len(uris) > _VIDEOS_SHOWN else shown


def shard_job(config: ExtractConfig, planned: Planned) -> ShardJob:
    """What the tasks of the extraction are told."""
    backbone = config.backbone
    if Path(backbone.id).is_dir():
        backbone = backbone.model_copy(update={"id": _seen_from_anywhere(backbone.id)})
    return ShardJob(
        store=_seen_from_anywhere(config.store),
        plan_digest=planned.plan.digest,
        dataset_root=_seen_from_anywhere(str(config.dataset.root)),
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
    """Address of the cluster's dashboard; None where Dask runs without (bokeh is not installed there)."""
    services = client.scheduler_info(n_workers=0).get("services", {})
    return str(client.dashboard_link) if services.get("dashboard") else None


def _seen_from_anywhere(url: str) -> str:
    # Workers may run in another directory.
    return url if "://" in url else str(Path(url).expanduser().absolute())


def _check_room(writer: StoreWriter, pending: list[int]) -> None:
    free = writer.free_bytes()
    plan = writer.plan
    needed = sum(
        shard_bytes(plan, kind, hook, shard) for kind in array_kinds(plan) for hook in plan.hooks for shard in pending
    )
    if free is not None and free < needed:
        raise TubeletError(
            f"The store needs {human_bytes(needed)} more, {human_bytes(free)} are free at {writer.url}",
            "Free some space, store fewer hooks, or choose another disk or an s3:// URL",
        )
