"""What an extraction reports: counts so far, a machine-readable log, progress for people, and a summary."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tubelet.errors import TubeletError
from tubelet.formats import human_bytes
from tubelet.progress import Progress
from tubelet.tables import Table, Tabular
from tubelet_pipeline.shard_task import ShardReport
from tubelet_store.reader import open_store
from tubelet_store.store_summary import failed_clips


@dataclass(repr=False)
class ExtractSummary(Tabular):
    """Counts of an extraction: of this run, and of earlier runs into the same store."""

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
    """Address of Dask's dashboard; None without one."""

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
    """Writes events to `path`, if one is given. Use as a context manager.

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


_VIDEOS_LISTED = 20


class ExtractProgress:
    """Shows shards as they are committed, on stderr. Pass it to `extract` as `on_shard`."""

    def __init__(self) -> None:
        self._progress = Progress("extracting", unit="shards")
        self._start_s = time.perf_counter()

    def __enter__(self) -> ExtractProgress:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def __call__(self, summary: ExtractSummary) -> None:
        """Show the counts so far."""
        if not summary.shards_this_run:
            # The workers are ready: the time they took to start says nothing about the rate.
            self._start_s = time.perf_counter()
            self._progress.restart(summary.shards_done)
            if summary.dashboard is not None:
                self._progress.note(f"dashboard: {summary.dashboard}")
            return
        seconds = time.perf_counter() - self._start_s
        failed = summary.clips.total() - summary.clips["ok"]
        text = f"{summary.clips_this_run / seconds:.1f} clips/s, {summary.tokens_this_run / seconds:.0f} tokens/s"
        text += f", {failed} clip{'s' * (failed > 1)} failed" if failed else ""
        self._progress.update(summary.shards_done, total=summary.shards, text=text)


def failed_videos(clips: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per video and error, however many of its views failed.

    Args:
        clips: Failed clips with `uri` and `error`, as `failed_clips` gives them.
    """
    counts = Counter((clip["uri"], clip["error"]) for clip in clips)
    return [f"{uri}: {error}" + (f" ({count} clips)" if count > 1 else "") for (uri, error), count in counts.items()]


def print_summary(summary: ExtractSummary) -> None:
    """Print clips stored and failed, each failed video once with its reason; size, rate, and where the store is."""
    total = summary.clips.total()
    failed = total - summary.clips["ok"]
    print(f"stored      {summary.clips['ok']} of {total} clips, {human_bytes(summary.size_bytes)}")
    if failed:
        print(f"failed      {failed}: " + ", ".join(f"{n} {code}" for code, n in summary.clips.items() if code != "ok"))
        videos = failed_videos(failed_clips(open_store(summary.store)))
        for line in videos[:_VIDEOS_LISTED]:
            print(f"            {line}")
        if len(videos) > _VIDEOS_LISTED:
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
