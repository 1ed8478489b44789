"""Verbs of the pipeline: `tubelet videos`, `estimate`, `extract`. Heavy imports wait until a verb runs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_pipeline.estimate import EstimateConfig
    from tubelet_pipeline.extract_config import ExtractConfig
    from tubelet_pipeline.synthetic.render_dataset import VideosConfig


class Preempted(BaseException):
    """SIGTERM came. Not an Exception: nothing on the way may take it for a failure of its own."""


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the main thread when SIGTERM comes; a second one ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Preempted

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _extract_config() -> type[ExtractConfig]:
    from tubelet_pipeline.extract_config import ExtractConfig

    return ExtractConfig


def _extract(config: ExtractConfig) -> int:
    from tubelet_pipeline.driver import extract
    from tubelet_pipeline.extract_report import ExtractProgress, print_summary

    try:
        with ExtractProgress() as progress, preemptible():
            summary = extract(config, progress)
    except Preempted:
        print("tubelet: told to stop (SIGTERM); run the same command again to continue.", file=sys.stderr)
        return 128 + signal.SIGTERM
    print_summary(summary)
    return 0 if summary.clips["ok"] else 1


def _estimate_config() -> type[EstimateConfig]:
    from tubelet_pipeline.estimate import EstimateConfig

    return EstimateConfig


def _estimate(config: EstimateConfig) -> int:
    from tubelet_pipeline.estimate import estimate, estimate_lines

    found = estimate(config)
    print(json.dumps(found.as_dict(), indent=2) if config.format == "json" else "\n".join(estimate_lines(found)))
    return 0


ESTIMATE = Verb("estimate", "Tell what an extraction will cost, before it runs.", _estimate_config, _estimate)
EXTRACT = Verb("extract", "Decode videos, run a frozen backbone, store its activations.", _extract_config, _extract)


def _videos_config() -> type[VideosConfig]:
    from tubelet_pipeline.synthetic.render_dataset import VideosConfig

    return VideosConfig


def _videos(config: VideosConfig) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tubelet_pipeline.synthetic.render_dataset import dataset_bytes, make_dataset

    console = Console(stderr=True)
    begin_s = time.monotonic()
    rendered = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("rendering videos", total=config.videos)

        def on_video(is_new: bool) -> None:
            nonlocal rendered
            rendered += is_new
            progress.advance(bar)

        entries = make_dataset(config, on_video)
    splits = {split: sum(e.split == split for e in entries) for split in ("train", "validation", "test")}
    print(
        f"{config.out}: {len(entries)} videos ({', '.join(f'{n} {split}' for split, n in splits.items() if n)}), "
        f"{len({e.template for e in entries})} classes, {dataset_bytes(config.out) / 1e6:.1f} MB; "
        f"{rendered} rendered in {time.monotonic() - begin_s:.1f} s, {len(entries) - rendered} were there"
    )
    return 0


VIDEOS = Verb(
    name="videos",
    summary="Render a labeled demo data set of moving shapes as real video files.",
    config=_videos_config,
    run=_videos,
    positionals=("out",),
)
