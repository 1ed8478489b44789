"""Where shard tasks run: a Dask cluster of any kind, described by the job's `cluster:` section.

    nothing                       a local cluster, which ends with the job
    scheduler | scheduler_file    a running cluster ($DASK_SCHEDULER_ADDRESS does the same)
    class + kwargs                a cluster started for this job by a manager (SLURM, Kubernetes, one worker per GPU)

A job file can name only classes from a fixed list of cluster managers, so that it cannot run arbitrary code.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster
from distributed.utils import silence_logging_cmgr
from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError, nearest

_CONNECT_TIMEOUT_S = 30
_FILE_POLL_S = 0.5

_JOB_QUEUES = ("HTCondor", "LSF", "Moab", "OAR", "PBS", "SGE", "SLURM")

CLUSTER_CLASSES: dict[str, str] = {
    **{f"dask_jobqueue.{queue}Cluster": "dask-jobqueue" for queue in _JOB_QUEUES},
    "dask_jobqueue.slurm.SLURMRunner": "dask-jobqueue",
    "dask_kubernetes.operator.KubeCluster": "dask-kubernetes",
    "dask_cuda.LocalCUDACluster": "dask-cuda",
    "dask_gateway.GatewayCluster": "dask-gateway",
}
"""Classes that a job file may name, and the package of each."""

RUNNERS = ("dask_jobqueue.slurm.SLURMRunner",)
"""Classes that run inside an allocation: all its processes run the same command, one of them becomes the client."""


class Adapt(Config):
    """Let the number of workers follow the number of waiting shards."""

    minimum: int = Field(default=0, ge=0)
    """Smallest number of workers."""
    maximum: int = Field(ge=1)
    """Largest number of workers."""

    @model_validator(mode="after")
    def _in_order(self) -> Adapt:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class ClusterConfig(Config):
    """Workers of the extraction."""

    scheduler: str | None = None
    """Address of a running scheduler (tcp://host:8786). None: $DASK_SCHEDULER_ADDRESS, else a local cluster."""
    scheduler_file: Path | None = None
    """File in which a running scheduler wrote its address (`dask scheduler --scheduler-file`, `dask-mpi`)."""
    class_: str | None = Field(default=None, alias="class")
    """Cluster manager started for this job, such as `dask_jobqueue.SLURMCluster`."""
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of that class, as in its own documentation."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes. None: half the cores of this machine, or as many as the class starts."""
    adapt: Adapt | None = None
    """Number of workers by the number of waiting shards, instead of `workers`."""
    threads: int = Field(default=2, ge=1)
    """Threads of the forward pass per worker, on CPU (Dask sets one)."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Dask resources that one shard task requires, such as {GPU: 1}; workers must be started with them."""
    start_timeout_s: float = Field(default=600, gt=0)
    """Time to wait for the first worker that can take a shard; a job may wait in a queue."""

    @model_validator(mode="after")
    def _one_way(self) -> ClusterConfig:
        ways = [name for name in ("scheduler", "scheduler_file", "class_") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{' and '.join(ways).replace('class_', 'class')} exclude each other")
        if self.kwargs and self.class_ is None:
            raise ValueError("kwargs belong to a class; set class")
        if self.adapt is not None and (self.workers is not None or self.class_ is None):
            raise ValueError("adapt goes with a class, instead of workers")
        if self.class_ is not None and self.class_ not in CLUSTER_CLASSES:
            hint = nearest(self.class_, CLUSTER_CLASSES)
            listed = "" if hint.startswith("Valid") else f" Valid: {', '.join(sorted(CLUSTER_CLASSES))}."
            raise ValueError(
                f"{self.class_} is not one of the cluster classes a job file may start. {hint}{listed} Start any other "
                "cluster yourself and give its scheduler"
            )
        return self

    @property
    def address(self) -> str | None:
        """Address of the running scheduler; None if a cluster is to be started."""
        if self.scheduler is not None or self.scheduler_file is not None or self.class_ is not None:
            return self.scheduler
        return os.environ.get("DASK_SCHEDULER_ADDRESS")

    @property
    def is_local(self) -> bool:
        """Whether the workers run on this machine and end with the job."""
        return not self.lasting and self.class_ is None

    @property
    def is_runner(self) -> bool:
        """Whether every process of an allocation runs this command (see RUNNERS)."""
        return self.class_ in RUNNERS

    @property
    def lasting(self) -> bool:
        """Whether the scheduler outlives this job, so that a lost connection can be restored."""
        return self.address is not None or self.scheduler_file is not None

    @property
    def expected_workers(self) -> int:
        """Number of workers requested; 0 if unknown."""
        if self.adapt is not None:
            return self.adapt.maximum
        return self.workers or 0


@contextlib.contextmanager
def connect(config: ClusterConfig, tasks_per_worker: int = 2) -> Iterator[Client]:
    """A client of the cluster of `config`; a cluster started here ends with the context.

    Args:
        config: The cluster.
        tasks_per_worker: Tasks that a worker of a local cluster runs at once. Two for shards: one is decoded while the
            other is computed.

    Raises:
        TubeletError: no scheduler answers, or the cluster does not start.
    """
    with _quiet_dask(), contextlib.ExitStack() as stack:
        if config.is_local:
            with _without_sigint():
                cluster = stack.enter_context(_local(config, tasks_per_worker))
            yield stack.enter_context(Client(cluster))
        elif config.class_ is not None:
            cluster = stack.enter_context(start_cluster(config))
            yield stack.enter_context(Client(cluster, timeout=config.start_timeout_s))
        else:
            yield stack.enter_context(_client(config))


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Silence Dask's log of lost connections and workers; the driver reports each in one line."""
    with silence_logging_cmgr(logging.CRITICAL), silence_logging_cmgr(logging.CRITICAL, root="distributed.client"):
        yield


def _client(config: ClusterConfig) -> Client:
    file = config.scheduler_file
    where = config.address or f"the address in {file}"
    try:
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while file is not None and not file.is_file():
            # A scheduler that was just submitted has yet to write it.
            if time.monotonic() > deadline:
                raise FileNotFoundError(file)
            time.sleep(_FILE_POLL_S)
        place = {"address": config.address} if file is None else {"scheduler_file": str(file)}
        return Client(**place, timeout=_CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError, ValueError) as error:
        field = "scheduler" if file is None else "scheduler_file"
        raise TubeletError(
            f"No Dask scheduler answers at {where}", f"Start it, or leave out --cluster.{field} to run locally"
        ) from error


@contextlib.contextmanager
def _without_sigint() -> Iterator[None]:
    """Threads started here, and the processes that they start, never receive SIGINT.

    Ctrl-C goes to all processes of a terminal. The driver ends its workers itself; without this they would print
    tracebacks. In this process Ctrl-C takes effect on leaving the context.
    """
    # Its first start unblocks SIGINT again in the calling thread.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _local(config: ClusterConfig, tasks_per_worker: int) -> LocalCluster:
    return LocalCluster(
        n_workers=config.workers or max(1, (os.cpu_count() or 1) // 2),
        threads_per_worker=tasks_per_worker,
        processes=True,
        dashboard_address="127.0.0.1:0",
        resources=config.resources or None,
        silence_logs=logging.CRITICAL,
    )


@contextlib.contextmanager
def start_cluster(config: ClusterConfig) -> Iterator[Any]:
    """Start the cluster of `config.class_` at the configured size; it ends with the context.

    Raises:
        TubeletError: the package is not installed, the arguments do not fit, or the manager refuses.
    """
    assert config.class_ is not None
    module, _, name = config.class_.rpartition(".")
    try:
        cluster_class = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise TubeletError(
            f"cluster.class {config.class_} needs {CLUSTER_CLASSES[config.class_]}, not installed here ({error})",
            f"pip install -c constraints.txt {CLUSTER_CLASSES[config.class_]}",
        ) from error
    _check_queue(config.class_, cluster_class)
    try:
        cluster = cluster_class(**config.kwargs)
    except Exception as error:  # every manager raises its own exceptions
        raise TubeletError(
            f"{config.class_} does not start: {_causes(error)}",
            "Compare cluster.kwargs with the documentation of that class",
        ) from error
    with cluster:
        # The size of a runner is given by its allocation, that of LocalCUDACluster by the machine.
        if config.adapt is not None:
            cluster.adapt(minimum=config.adapt.minimum, maximum=config.adapt.maximum)
        elif config.workers is not None and not config.is_runner:
            cluster.scale(config.workers)
        yield cluster


def _check_queue(name: str, cluster_class: type) -> None:
    """Refuse a job queue without its submit command: dask-jobqueue would only log that, and wait for workers."""
    command = getattr(getattr(cluster_class, "job_cls", None), "submit_command", None)
    program = shlex.split(command)[0] if command else None
    if program is not None and shutil.which(program) is None:
        raise TubeletError(
            f"{name} submits its jobs with {program}, which is not on this machine's PATH",
            "Run the command where jobs can be submitted (a login node), or give the scheduler of a running cluster",
        )


def _causes(error: BaseException | None) -> str:
    messages = []
    while error is not None:
        messages.append(" ".join(str(error).split()) or type(error).__name__)
        error = error.__cause__
    return ": ".join(messages)
