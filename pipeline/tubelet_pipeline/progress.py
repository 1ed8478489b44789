"""What a person sees of an extraction: a bar in a terminal, a line now and then in a log, a summary at the end."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tubelet_pipeline.driver import ExtractSummary
from tubelet_store.reader import open_store
from tubelet_store.store_summary import failed_clips, human_bytes

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
