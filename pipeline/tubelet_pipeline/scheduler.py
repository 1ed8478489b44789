"""Running shards on a Dask cluster, a bounded number at a time.

    pending ─▶ in flight (a few per worker) ─▶ committed
                  │  │  └▶ spooled: submitted again, to the machine that keeps it, until object storage answers
                  │  └▶ raised: submitted again, _ATTEMPTS times in total
                  └▶ worker ended: suspect; suspects run alone at the end

Dask counts a worker's end against every task assigned to it, so the count proves nothing: a suspect fails only if
workers end while it is the only shard in flight.
"""

from __future__ import annotations

import errno
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
    """The connection to the Dask scheduler was lost; committed shards stay committed."""


class ShardScheduler:
    """One job's shards on one cluster.

    Args:
        client: Of the cluster.
        job: Sent to every task.
        cluster: How many workers to expect, and the resources a task asks for.
        log: Receives the events.
        on_committed: Called with each committed shard's report.
        task: What runs on the workers.
    """

    def __init__(
        self,
        client: Client,
        job: ShardJob,
        cluster: ClusterConfig,
        log: RunLog,
        on_committed: Callable[[ShardReport], None],
        task: Callable[[str, int], ShardReport] = run_shard,
    ) -> None:
        self._client, self._cluster, self._log = client, cluster, log
        self._on_committed, self._task = on_committed, task
        self._job, self._plan, self._patience_s = job.model_dump_json(), job.plan_digest, job.upload.patience_s
        self._submissions: Counter[int] = Counter()
        self._errors: Counter[int] = Counter()
        self._suspects: list[int] = []
        self._spooled: dict[int, str] = {}
        self._workers_counted_at = 0.0
        self._most_in_flight = 0
        self.failures: dict[int, list[str]] = {}
        """Reasons of failed attempts by shard, in order; shards that were committed later are included."""

    def run(self, pending: Sequence[int]) -> None:
        """Run `pending` until each shard is committed or has failed.

        Raises:
            SchedulerLost: the connection was lost.
            TubeletError: a fault that every shard would meet, or object storage stayed unreachable.
        """
        for shards, hosts in self._rounds(pending):
            waiting = deque(shards)
            completed = as_completed()
            in_flight: dict[Future, int] = {}
            while waiting or in_flight:
                while waiting and len(in_flight) < self._in_flight_limit():
                    shard = waiting.popleft()
                    host = hosts.get(shard)
                    future = self._client.submit(
                        self._task,
                        self._job,
                        shard,
                        # A key is never reused: the scheduler may still hold its earlier result.
                        key=f"shard-{self._plan[-12:]}-{shard}-{self._submissions[shard]}",
                        pure=False,
                        resources=self._cluster.resources or None,
                        workers=host,
                        allow_other_workers=host is not None,
                    )
                    self._submissions[shard] += 1
                    in_flight[future] = shard
                    completed.add(future)
                future = next(completed)
                shard = in_flight.pop(future)
                if self._must_retry(shard, future):
                    waiting.appendleft(shard)
                future.release()

    def _rounds(self, pending: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[int, str]]]:
        """Shards to run next, with the machines to prefer.

        First all; then each suspect alone; then those that wait on workers' disks, until they are uploaded.
        """
        yield pending, {}
        suspects, self._suspects = self._suspects, []
        for shard in suspects:
            yield [shard], {}
            if shard in self._suspects:
                self._log("failed", shard=shard, reason=self.failures[shard][-1])
        deadline = time.monotonic() + self._patience_s
        while self._spooled:
            hosts, self._spooled = self._spooled, {}
            yield list(hosts), hosts
            if len(self._spooled) < len(hosts):
                deadline = time.monotonic() + self._patience_s
            elif time.monotonic() > deadline:
                raise TubeletError(
                    f"The store has not answered for {self._patience_s:g} s; {len(self._spooled)} finished shards wait "
                    f"in the spools of {', '.join(sorted(set(self._spooled.values())))}",
                    "Fix the connection and run the same command again, on the same machines: no shard is computed "
                    "twice",
                )
            if self._spooled:
                time.sleep(_SPOOL_PAUSE_S)

    def _must_retry(self, shard: int, future: Future) -> bool:
        """Take the result of a completed task; whether `shard` is to be submitted again now."""
        error = future.exception()
        if error is None:
            report: ShardReport = future.result()
            if report.spooled:
                self._spooled[shard] = report.host
                self._log("spooled", shard=shard, host=report.host)
            else:
                self._log(
                    "shard", shard=shard, clips=report.clips, size_bytes=report.size_bytes, seconds=report.seconds
                )
                self._on_committed(report)
            return False
        if isinstance(error, CancelledError):
            raise SchedulerLost(str(error))
        if isinstance(error, KilledWorker):
            self._note_failure(shard, "its worker ended repeatedly (out of memory, or a crash in native code?)")
            self._suspects.append(shard)
            return False
        if _is_fatal_for_all_shards(error):
            raise error
        self._note_failure(shard, f"{type(error).__name__}: {error}")
        # Ended workers do not count here: another shard may be the cause.
        self._errors[shard] += 1
        return self._errors[shard] < _ATTEMPTS

    def _note_failure(self, shard: int, reason: str) -> None:
        self.failures.setdefault(shard, []).append(reason)
        self._log("retry", shard=shard, reason=reason)

    def _in_flight_limit(self) -> int:
        """How many shards may be in flight; workers join and leave."""
        if time.monotonic() > self._workers_counted_at + _COUNT_WORKERS_EVERY_S:
            self._workers_counted_at = time.monotonic()
            workers = max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]), self._cluster.expected_workers)
            self._most_in_flight = _IN_FLIGHT_PER_WORKER * workers
        return self._most_in_flight


def _is_fatal_for_all_shards(error: BaseException) -> bool:
    if isinstance(error, StoreUnreachable):
        return False
    return isinstance(error, TubeletError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
