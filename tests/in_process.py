"""An extraction whose one Dask worker is a thread of this process: starts in no time, and a test can look inside."""

from __future__ import annotations

from distributed import LocalCluster

from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.extract_report import ExtractSummary


def extract_here(config: ExtractConfig) -> ExtractSummary:
    """Run `config` to its end."""
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with LocalCluster(dashboard_address=None, **options) as cluster:
        return extract(config.model_copy(update={"scheduler": cluster.scheduler_address}))
