"""Checks before the first shard: a worker can take it, and runs the same versions as this process.

A task that requires a resource that no worker has waits without an error, so one small task with the same resources is
submitted first.
"""

from __future__ import annotations

import importlib.metadata
import socket
import time
import warnings

from distributed import Client, TimeoutError

from tubelet.errors import TubeletError
from tubelet_pipeline.cluster import ClusterConfig

# A difference in any of these changes bytes, or tasks cannot be unpickled.
_MUST_AGREE = ("tubelet", "torch", "transformers", "av")
_POLL_S = 2.0


def worker_versions() -> dict[str, str]:
    """Versions on the machine that runs this, and its host name."""
    versions = {"host": socket.gethostname()}
    for name in _MUST_AGREE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_workers(client: Client, config: ClusterConfig, key: str) -> dict[str, str]:
    """Versions on the first worker that takes a task; they equal those of this process.

    Args:
        client: Of the cluster.
        config: The resources of a shard task, and how long to wait.
        key: Of the probing task; the same for the same job.

    Raises:
        TubeletError: no worker comes, none has the resources, Tubelet is not installed there, or versions differ.
    """
    probe = client.submit(worker_versions, key=key, pure=False, resources=config.resources or None)
    deadline = time.monotonic() + config.start_timeout_s
    while True:
        try:
            versions: dict[str, str] = probe.result(timeout=_POLL_S)
            break
        except TimeoutError:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            if workers and config.expected_workers <= len(workers) and not any(_fits(w, config) for w in workers):
                raise _no_resources(len(workers), config) from None
            if time.monotonic() > deadline:
                if workers and not any(_fits(w, config) for w in workers):
                    raise _no_resources(len(workers), config) from None
                raise TubeletError(
                    f"No worker took a task within {config.start_timeout_s:g} s ({len(workers)} are known to the "
                    "scheduler)",
                    "Check the queue or the pods of the workers, or raise cluster.start_timeout_s",
                ) from None
        except ModuleNotFoundError as error:
            raise TubeletError(
                f"The workers cannot import {error.name}", "Install tubelet[pipeline] in their environment"
            ) from error
    probe.release()
    own = worker_versions()
    if different := [f"{n} {own[n]} here, {versions.get(n)} there" for n in _MUST_AGREE if versions.get(n) != own[n]]:
        raise TubeletError(
            f"Worker {versions['host']} runs other versions: {'; '.join(different)}",
            "Use the same environment (container, or pip install -c constraints.txt) on all machines",
        )
    with warnings.catch_warnings():
        # Other differences (numpy, tornado, ...) are recorded with each shard; Dask's table of them would fill the log.
        warnings.simplefilter("ignore")
        try:
            client.get_versions(check=True)
        except ValueError as error:
            raise TubeletError(
                f"Dask versions differ between client, scheduler and workers: {' '.join(str(error).split())}",
                "Use the same environment on all machines",
            ) from error
    return versions


def _fits(worker: dict[str, dict[str, float]], config: ClusterConfig) -> bool:
    has = worker.get("resources", {})
    return all(has.get(name, 0) >= amount for name, amount in config.resources.items())


def _no_resources(workers: int, config: ClusterConfig) -> TubeletError:
    required = ", ".join(f"{name}={amount:g}" for name, amount in config.resources.items())
    return TubeletError(
        f"None of the {workers} workers has the resources of a shard task ({required}), so the job would not start",
        f"Start workers with `--resources {required.replace(', ', ' ')}`, or leave out cluster.resources",
    )
