"""Verbs of the pipeline: `tubelet videos`, `estimate`, `extract`. Heavy imports wait until a verb runs."""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING

from tubelet.cli.main import Verb
from tubelet_pipeline.verbs_videos import VIDEOS

if TYPE_CHECKING:
    from tubelet_pipeline.config import ExtractConfig
    from tubelet_pipeline.estimate import EstimateConfig

__all__ = ["ESTIMATE", "EXTRACT", "VIDEOS"]


def _extract_config() -> type[ExtractConfig]:
    from tubelet_pipeline.config import ExtractConfig

    return ExtractConfig


def _extract(config: ExtractConfig) -> int:
    from tubelet_pipeline.driver import extract
    from tubelet_pipeline.preemption import Preempted, preemptible
    from tubelet_pipeline.progress import ExtractProgress, print_summary

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
    from tubelet_pipeline.estimate import estimate
    from tubelet_pipeline.estimate_text import estimate_lines

    found = estimate(config)
    print(json.dumps(found.as_dict(), indent=2) if config.format == "json" else "\n".join(estimate_lines(found)))
    return 0


ESTIMATE = Verb("estimate", "Tell what an extraction will cost, before it runs.", _estimate_config, _estimate)
EXTRACT = Verb("extract", "Decode videos, run a frozen backbone, store its activations.", _extract_config, _extract)
