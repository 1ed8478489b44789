"""Verbs of the pipeline: `tubelet videos`, `estimate`, `extract`. Heavy imports wait until a verb runs."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_pipeline.estimate import EstimateConfig
    from tubelet_pipeline.extract_config import ExtractConfig
    from tubelet_pipeline.synthetic.render_dataset import VideosConfig


_SHARE_TOLERANCE = 0.02


class Preempted(BaseException):
    """SIGTERM was received, as SLURM and Kubernetes send it before they take a machine away.

    Not an Exception: no handler on the way may take it for a failure of its own.
    """


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """Raise `Preempted` in the main thread on SIGTERM; a second one ends the process."""
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
        print("tubelet: stopped by SIGTERM; run the same command again to continue.", file=sys.stderr)
        return 128 + signal.SIGTERM
    print_summary(summary)
    return 0 if summary.clips["ok"] else 1


def _estimate_config() -> type[EstimateConfig]:
    from tubelet_pipeline.estimate import EstimateConfig

    return EstimateConfig


def _estimate(config: EstimateConfig) -> int:
    from tubelet_pipeline.estimate import estimate, estimate_lines

    costs = estimate(config)
    print(json.dumps(costs.as_dict(), indent=2) if config.format == "json" else "\n".join(estimate_lines(costs)))
    return 0


ESTIMATE = Verb("estimate", "Estimate the cost of an extraction before it runs.", _estimate_config, _estimate)
EXTRACT = Verb("extract", "Decode videos, run a frozen backbone, store its activations.", _extract_config, _extract)


def _videos_config() -> type[VideosConfig]:
    from tubelet_pipeline.synthetic.render_dataset import VideosConfig

    return VideosConfig


def _videos(config: VideosConfig) -> int:
    from tubelet.formats import percent
    from tubelet.progress import Progress
    from tubelet_pipeline.synthetic.annotations import SPLITS
    from tubelet_pipeline.synthetic.render_dataset import dataset_bytes, make_dataset

    begin_s = time.monotonic()
    rendered = 0
    with Progress("rendering", config.videos, "videos") as progress:

        def on_video(is_new: bool) -> None:
            nonlocal rendered
            rendered += is_new
            progress.advance()

        entries = make_dataset(config, on_video)
    splits: Counter[str] = Counter(entry.split for entry in entries)
    shares = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split])
    print(
        f"{config.out}: {len(entries)} videos ({shares}), {len({e.template for e in entries})} classes, "
        f"{dataset_bytes(config.out) / 1e6:.1f} MB; {rendered} rendered in {time.monotonic() - begin_s:.1f} s, "
        f"{len(entries) - rendered} existed"
    )
    for split, asked in (("validation", config.validation_share), ("test", config.test_share)):
        share = splits[split] / len(entries)
        if abs(share - asked) > _SHARE_TOLERANCE:
            print(
                f"{split} share {percent(share)} instead of {percent(asked)}: every class is split at the nearest "
                "whole video; more --videos come closer"
            )
    return 0


VIDEOS = Verb(
    name="videos",
    summary="Render a labeled demo data set of moving shapes as real video files.",
    config=_videos_config,
    run=_videos,
    positionals=("out",),
)
