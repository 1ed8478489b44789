"""Handing shards out to a Dask cluster, a bounded number at a time, and taking what comes back.

    pending ─▶ in flight (a few per worker) ─▶ committed
                  │  │  └▶ spooled: asked for again, on the machine that keeps it, until the storage answers
                  │  └▶ raised: tried again, _ATTEMPTS times in all
                  └▶ workers died: set aside as suspect; suspects run alone at the end

Dask blames every task that a dying worker had been given, so being blamed proves nothing: a suspect is found guilty
only when workers die while it is alone in flight.
"""

from __future__ import annotations

import errno
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from distributed import CancelledError, Client, Future, KilledWorker, as_completed

from tubelet.errors import StoreUnreachable, TubeletError
from tubelet_pipeline.cluster import ClusterConfig
from tubelet_pipeline.extract_report import RunLog
from tubelet_pipeline.shard_task import ShardReport, run_shard
from tubelet_pipeline.worker_state import ShardJob

_IN_FLIGHT_PER_WORKER = 4
_ATTEMPTS = 3
_COUNT_WORKERS_EVERY_S = 5.0
_SPOOL_PAUSE_S = 2.0


class SchedulerLost(Exception):
    """The connection to the scheduler broke; what was committed is committed."""


class ShardScheduler:
    """One job's shards on one cluster.

    Args:
        client: Of the cluster.
        job: What every task is told.
        cluster: How many workers to expect, and what a task asks for.
        log: Told what happens.
        on_done: Called with each committed shard's report.
        task: What runs on the workers; benchmarks give a cheaper one.
    """

    def __init__(
        self,
        client: Client,
        job: ShardJob,
        cluster: ClusterConfig,
        log: RunLog,
        on_done: Callable[[ShardReport], None],
        task: Callable[[str, int], ShardReport] = run_shard,
    ) -> None:
        self._task = task
        self._client, self._cluster, self._log, self._on_done = client, cluster, log, on_done
        self._job, self._plan, self._patience_s = job.model_dump_json(), job.plan_digest, job.upload.patience_s
        self._submitted: dict[int, int] = {}
        self._counted_at = 0.0
        self._window = 0
        self._raised: Counter[int] = Counter()
        self.failures: dict[int, list[str]] = {}
        """Why each shard failed, try by try; shards that were done in the end are in it too."""

    def run(self, pending: Sequence[int]) -> None:
        """Hand out `pending` until each is committed or has failed for good.

        Raises:
            SchedulerLost: the connection broke.
            TubeletError: a mistake that every shard would meet, or the object storage stayed away.
        """
        suspects: list[int] = []
        spooled: dict[int, str] = {}
        self._pass(pending, suspects, spooled)
        for shard in suspects:
            guilty: list[int] = []
            self._pass([shard], guilty, spooled)
            if guilty:
                self._log("failed", shard=shard, reason=self.failures[shard][-1])
        self._collect(spooled)

    def _collect(self, spooled: dict[int, str]) -> None:
        """Ask again for shards that wait on workers' disks, until they are uploaded."""
        deadline = time.monotonic() + self._patience_s
        while spooled:
            before, waiting = len(spooled), dict(spooled)
            spooled.clear()
            self._pass(list(waiting), [], spooled, waiting)
            if len(spooled) < before:
                deadline = time.monotonic() + self._patience_s
            elif time.monotonic() > deadline:
                raise TubeletError(
                    f"The store has not answered for {self._patience_s:g} s; {len(spooled)} finished shards wait in "
                    f"the spools of {', '.join(sorted(set(spooled.values())))}",
                    "Mend the connection and run the same command again, on the same machines: nothing is computed "
                    "twice",
                )
            if spooled:
                time.sleep(_SPOOL_PAUSE_S)

    def _pass(
        self,
        shards: Sequence[int],
        suspects: list[int],
        spooled: dict[int, str],
        hosts: dict[int, str] | None = None,
    ) -> None:
        """Run `shards`; what became of those that were not committed goes into `suspects`, `spooled`, `failures`."""
        waiting = deque(shards)
        running = as_completed()
        shard_of: dict[Future, int] = {}
        while waiting or shard_of:
            for shard in itertools.islice(_popped(waiting), max(0, self._room() - len(shard_of))):
                future = self._submit(shard, (hosts or {}).get(shard))
                shard_of[future] = shard
                running.add(future)
            future = next(running)
            shard = shard_of.pop(future)
            error = future.exception()
            if error is None:
                self._take(future.result(), spooled)
            elif isinstance(error, CancelledError):
                raise SchedulerLost(str(error))
            elif isinstance(error, KilledWorker):
                self._retry(shard, "its worker died again and again (out of memory, or a crash in native code?)")
                suspects.append(shard)
            elif not isinstance(error, StoreUnreachable) and _is_fatal_for_all_shards(error):
                raise error
            else:
                self._retry(shard, f"{type(error).__name__}: {error}")
                # Deaths do not count: they may have been another shard's.
                self._raised[shard] += 1
                if self._raised[shard] < _ATTEMPTS:
                    waiting.appendleft(shard)
            future.release()

    def _submit(self, shard: int, host: str | None) -> Future:
        # A key is not used twice: the scheduler may still hold what became of it.
        number = self._submitted[shard] = self._submitted.get(shard, -1) + 1
        return self._client.submit(
            self._task,
            self._job,
            shard,
            key=f"shard-{self._plan[-12:]}-{shard}-{number}",
            pure=False,
            resources=self._cluster.resources or None,
            workers=host,
            allow_other_workers=host is not None,
        )

    def _take(self, report: ShardReport, spooled: dict[int, str]) -> None:
        if report.spooled:
            spooled[report.shard] = report.host
            self._log("spooled", shard=report.shard, host=report.host)
            return
        self._log("shard", shard=report.shard, clips=report.clips, size_bytes=report.size_bytes, seconds=report.seconds)
        self._on_done(report)

    def _retry(self, shard: int, reason: str) -> None:
        self.failures.setdefault(shard, []).append(reason)
        self._log("retry", shard=shard, reason=reason)

    def _room(self) -> int:
        """How many shards may be in flight: workers come and go."""
        if time.monotonic() > self._counted_at + _COUNT_WORKERS_EVERY_S:
            self._counted_at = time.monotonic()
            workers = max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]), self._cluster.expected_workers)
            self._window = _IN_FLIGHT_PER_WORKER * workers
        return self._window


def _popped(waiting: deque[int]) -> Iterator[int]:
    while waiting:
        yield waiting.popleft()


def _is_fatal_for_all_shards(error: BaseException) -> bool:
    return isinstance(error, TubeletError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
