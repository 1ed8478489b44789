"""What an extraction reports: counts so far, a machine-readable log, progress for people, and a summary."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tubelet.errors import TubeletError
from tubelet.formats import human_bytes
from tubelet.tables import Table, Tabular
from tubelet_pipeline.shard_task import ShardReport
from tubelet_store.reader import open_store
from tubelet_store.store_summary import failed_clips


@dataclass(repr=False)
class ExtractSummary(Tabular):
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
    dashboard: str | None = None
    """Address of Dask's dashboard, where there is one."""

    def add(self, shard: ShardReport) -> None:
        """Count a committed shard."""
        self.shards_done += 1
        self.clips.update(shard.clips)
        self.size_bytes += shard.size_bytes

    def __fspath__(self) -> str:
        return self.store

    def table(self) -> Table:
        """Clips stored and failed, size, rate, and where the store is."""
        total = sum(self.clips.values())
        rows = [
            ("store", self.store),
            ("clips", f"{self.clips['ok']:,} of {total:,} stored"),
            *((f"failed: {code}", f"{count:,}") for code, count in self.clips.items() if code != "ok"),
            ("size", human_bytes(self.size_bytes)),
            ("shards", f"{self.shards_done:,} of {self.shards:,}, {self.shards_this_run:,} in this run"),
            ("identity", self.identity),
        ]
        if self.shards_this_run:
            rows.append(("rate", f"{self.clips_this_run / self.seconds:.1f} clips/s"))
        return Table.of_rows(("extraction", "value"), rows)


class RunLog:
    """Writes events to `path`; with None they go nowhere. Use as a context manager.

    Every line has `time` (UNIX seconds) and `event`:

        start   plan, store, shards, pending, clips, workers, dashboard, versions
        shard   shard, clips (by `ok` or failure code), size_bytes, seconds (by stage)
        spooled shard
        retry   shard, reason
        failed  shard, reason
        lost    scheduler connection lost; reason
        end     status (`complete` or the error), shards_this_run, seconds, identity

    Raises:
        TubeletError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise TubeletError(
                    f"The run log {path} cannot be written: {error.strerror}", "Set log to another path"
                ) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._file is not None:
            line = {"time": round(time.time(), 3), "event": event, **fields}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


_LOG_EVERY_S = 10.0
_FAILURES_SHOWN = 20


class ExtractProgress:
    """Shows shards as they are committed. Pass it to `extract` as `on_shard`."""

    def __init__(self) -> None:
        console = Console()
        self._log = None if console.is_terminal else console
        self._bar = Progress(
            TextColumn("extracting"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards, {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("extracting", total=None, rate="starting")
        self._began = time.perf_counter()
        self._logged = self._began

    def __enter__(self) -> ExtractProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, summary: ExtractSummary) -> None:
        """Show the counts so far."""
        now = time.perf_counter()
        if not summary.shards_this_run:
            # Workers are there: what they took to come says nothing about the rate.
            self._began = now
            if summary.dashboard is not None:
                self._bar.console.print(f"dashboard: {summary.dashboard}", highlight=False, soft_wrap=True)
            return
        seconds = now - self._began
        done = sum(summary.clips.values())
        failed = done - summary.clips["ok"]
        rate = f"{summary.clips_this_run / seconds:.1f} clips/s, {summary.tokens_this_run / seconds:.0f} tokens/s"
        rate += f", {failed} clip{'s' * (failed > 1)} failed" if failed else ""
        self._bar.update(self._task, total=summary.shards, completed=summary.shards_done, rate=rate)
        if self._log is not None and (now - self._logged > _LOG_EVERY_S or summary.shards_done == summary.shards):
            self._logged = now
            left = seconds / summary.shards_this_run * (summary.shards - summary.shards_done)
            self._log.print(
                f"extracting: {summary.shards_done} of {summary.shards} shards, {rate}, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )


def print_summary(summary: ExtractSummary) -> None:
    """Clips stored and failed, with reasons; size, rate, and where the store lies."""
    total = sum(summary.clips.values())
    failed = total - summary.clips["ok"]
    print(f"stored      {summary.clips['ok']} of {total} clips, {human_bytes(summary.size_bytes)}")
    if failed:
        print(f"failed      {failed}: " + ", ".join(f"{n} {code}" for code, n in summary.clips.items() if code != "ok"))
        for clip in failed_clips(open_store(summary.store))[:_FAILURES_SHOWN]:
            print(f"            {clip['uri']}: {clip['error']}")
        if failed > _FAILURES_SHOWN:
            print(f"            ... `tubelet info {summary.store} --format json` lists them all")
    if summary.shards_this_run:
        print(
            f"this run    {summary.shards_this_run} of {summary.shards} shards in {summary.seconds:.1f} s: "
            f"{summary.clips_this_run / summary.seconds:.1f} clips/s, "
            f"{summary.tokens_this_run / summary.seconds:.0f} tokens/s"
        )
    else:
        print("this run    nothing was missing")
    print(f"store       {summary.store}\nidentity    {summary.identity}")
