"""Where shard tasks run: a local Dask cluster, or one whose scheduler is already up."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from distributed import Client, LocalCluster
from pydantic import Field

from tubelet_store.config import Config
from tubelet_store.errors import TubeletError

_CONNECT_TIMEOUT_S = 30


class ClusterConfig(Config):
    """Workers of the extraction."""

    scheduler: str | None = None
    """Address of a running scheduler (tcp://host:8786). None: $DASK_SCHEDULER_ADDRESS, else a local cluster."""
    workers: int = Field(default=max(1, (os.cpu_count() or 1) // 2), ge=1)
    """Worker processes of the local cluster; one shard each at a time."""
    threads: int = Field(default=2, ge=1)
    """Threads of the forward pass per worker, on CPU (Dask would leave one)."""


@contextlib.contextmanager
def connect(config: ClusterConfig) -> Iterator[Client]:
    """A client of the cluster that `config` describes; a local cluster ends with the context.

    Raises:
        TubeletError: no scheduler answers.
    """
    address = config.scheduler or os.environ.get("DASK_SCHEDULER_ADDRESS")
    if address:
        try:
            client = Client(address, timeout=_CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError, ValueError) as error:
            raise TubeletError(
                f"No Dask scheduler answers at {address}", "Start it, or leave out --cluster.scheduler to run locally"
            ) from error
        with client:
            yield client
        return
    # Lost workers are reported by us, per shard; Dask's own account of them is for debugging.
    with (
        LocalCluster(
            n_workers=config.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
