"""The extraction's driver: plan, begin or continue the store, hand out shards, finish.

A bounded number of shard tasks is in flight, and each leaves a durable record, so the driver itself may die at any
time: the same command again does what is missing. Whether a job is complete is read from the store, not from memory.
"""

from __future__ import annotations

import errno
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from distributed import Client, Future, KilledWorker, as_completed

from tubelet_pipeline.cluster import connect
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.planning import Planned, make_plan
from tubelet_pipeline.shard_task import ShardJob, ShardReport, report, run_shard
from tubelet_store import StoreWriter, TubeletError
from tubelet_store.layout import array_kinds, shard_bytes
from tubelet_store.summary import human_bytes

_IN_FLIGHT_PER_WORKER = 4
_ATTEMPTS = 3


@dataclass
class ExtractSummary:
    """What an extraction did, this run and earlier ones of the same store."""

    store: str
    identity: str
    shards: int
    shards_done: int = 0
    shards_this_run: int = 0
    clips: Counter[str] = field(default_factory=Counter)
    """Clips by `ok` or failure code, over the whole store."""
    clips_this_run: int = 0
    tokens_this_run: int = 0
    size_bytes: int = 0
    seconds: float = 0.0

    def add(self, shard: ShardReport) -> None:
        """Count a committed shard."""
        self.shards_done += 1
        self.clips.update(shard.clips)
        self.size_bytes += shard.size_bytes


def extract(config: ExtractConfig, on_shard: Callable[[ExtractSummary], None] | None = None) -> ExtractSummary:
    """Run the extraction that `config` describes, to its end.

    Args:
        config: What to extract.
        on_shard: Called with the counts so far after each committed shard.

    Raises:
        TubeletError: a mistake in the configuration, no room for the store, or shards that fail again and again (the
            others are committed and stay so).
    """
    planned = make_plan(config)
    writer = StoreWriter.begin(config.store, planned.plan, planned.clips, planned.provenance)
    writer.discard_scratch()
    pending = writer.pending()
    summary = ExtractSummary(config.store, "", planned.plan.shards)
    for shard in sorted(set(range(planned.plan.shards)) - set(pending)):
        commit = writer.committed(shard)
        if commit is not None:
            summary.add(report(commit))
    began = time.perf_counter()
    if pending:
        _check_room(writer, pending)
        with connect(config.cluster) as client:
            _run_shards(client, config, planned, pending, summary, on_shard)
    summary.identity = str(writer.finish().identity)
    summary.seconds = time.perf_counter() - began
    return summary


def _run_shards(
    client: Client,
    config: ExtractConfig,
    planned: Planned,
    pending: list[int],
    summary: ExtractSummary,
    on_shard: Callable[[ExtractSummary], None] | None,
) -> None:
    plan = planned.plan
    job = ShardJob(
        store=config.store,
        plan_digest=plan.digest,
        dataset_root=str(config.dataset.root),
        sampling=config.sampling,
        backbone=config.backbone,
        hooks=tuple(hook.name for hook in plan.hooks),
        decode=config.decode,
        batch_size=config.batch_size,
        threads=config.cluster.threads,
    ).model_dump_json()
    failures: dict[int, list[str]] = {}
    waiting = iter(pending)
    workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))

    def submit(shard: int) -> Future:
        attempt = len(failures.get(shard, []))
        key = f"shard-{plan.digest[-12:]}-{shard}-{attempt}"
        return client.submit(run_shard, job, shard, key=key, pure=False)

    shard_of = {submit(shard): shard for shard in itertools.islice(waiting, _IN_FLIGHT_PER_WORKER * workers)}
    running = as_completed(list(shard_of))
    for future in running:
        shard = shard_of.pop(future)
        error = future.exception()
        again = None
        if error is None:
            done: ShardReport = future.result()
            summary.add(done)
            summary.shards_this_run += 1
            summary.clips_this_run += sum(done.clips.values())
            summary.tokens_this_run += done.clips.get("ok", 0) * plan.grid.tokens
            if on_shard is not None:
                on_shard(summary)
        else:
            if isinstance(error, TubeletError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
                raise error
            failures.setdefault(shard, []).append(_describe(error))
            if len(failures[shard]) < _ATTEMPTS and not isinstance(error, KilledWorker):
                again = shard
        future.release()
        following = again if again is not None else next(waiting, None)
        if following is not None:
            fresh = submit(following)
            shard_of[fresh] = following
            running.add(fresh)
    lost = sorted(set(pending) & set(StoreWriter.attach(config.store, plan.digest).pending()))
    if lost:
        reasons = "; ".join(f"shard {shard}: {failures.get(shard, ['lost'])[-1]}" for shard in lost[:5])
        raise TubeletError(
            f"{len(lost)} of {plan.shards} shards could not be extracted ({reasons})",
            "The others are committed. Mend the cause and run the same command again",
        )


def _describe(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "its worker died again and again (out of memory, or a crash in native code?)"
    return f"{type(error).__name__}: {error}"


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
