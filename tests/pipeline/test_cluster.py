"""Clusters of every kind: what a job file may start, what is checked before the first shard."""

from __future__ import annotations

import logging
import signal
import sys
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_pipeline.cluster import CLUSTER_CLASSES, ClusterConfig, connect
from tubelet_pipeline.driver import dashboard_of
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.preflight import check_workers


def cluster(**fields: Any) -> ClusterConfig:
    return validate(ClusterConfig, fields, "job.yaml")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"class": "os.system"}, ["os.system is not one of the cluster classes", "dask_jobqueue.SLURMCluster"]),
        ({"class": "dask_jobqueue.SLURMClustr"}, ["Did you mean 'dask_jobqueue.SLURMCluster'?"]),
        ({"class": "my_lab.Cluster"}, ["Start any other cluster yourself and give its scheduler"]),
        ({"scheduler": "tcp://a:1", "class": "dask_jobqueue.SLURMCluster"}, ["exclude each other"]),
        ({"scheduler": "tcp://a:1", "scheduler_file": "s.json"}, ["exclude each other"]),
        ({"kwargs": {"cores": 1}}, ["kwargs belong to a class"]),
        ({"adapt": {"maximum": 3}}, ["adapt goes with a class"]),
        ({"class": "dask_jobqueue.SLURMCluster", "workers": 2, "adapt": {"maximum": 3}}, ["instead of workers"]),
        ({"class": "dask_jobqueue.SLURMCluster", "adapt": {"minimum": 4, "maximum": 3}}, ["minimum 4 is above"]),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused_before_anything_starts(
    fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(TubeletError) as caught:
        cluster(**fields)
    for word in words:
        assert word in str(caught.value)


def test_nothing_outside_the_list_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TubeletError, match=r"evil\.Cluster is not one of"):
        cluster(**{"class": "evil.Cluster"})
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", sorted(CLUSTER_CLASSES))
def test_a_cluster_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
    with (
        pytest.raises(TubeletError, match=f"needs {CLUSTER_CLASSES[name]}, not installed"),
        connect(cluster(**{"class": name})),
    ):
        pass


@pytest.mark.parametrize(
    ("size", "asked"), [({"workers": 3}, ("scale", 3)), ({"adapt": {"minimum": 1, "maximum": 2}}, ("adapt", 1, 2))]
)
def test_a_cluster_class_gets_its_arguments_and_its_size(
    size: dict[str, Any], asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real cluster under the name of one that needs a queue.
    seen: list[tuple[Any, ...]] = []

    class Queue(LocalCluster):
        def scale(self, n: int) -> None:
            seen.append(("scale", n))
            super().scale(n)

        def adapt(self, minimum: int, maximum: int) -> None:
            seen.append(("adapt", minimum, maximum))
            super().adapt(minimum=minimum, maximum=maximum)

    module = types.ModuleType("dask_jobqueue")
    module.SLURMCluster = Queue  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_jobqueue", module)
    kwargs = {"n_workers": 0, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    config = cluster(**{"class": "dask_jobqueue.SLURMCluster", "kwargs": kwargs, **size})
    with connect(config) as client:
        check_workers(client, config, "preflight")
    assert asked in seen

    wrong = cluster(**{"class": "dask_jobqueue.SLURMCluster", "kwargs": {"no_such": 1}, **size})
    with pytest.raises(TubeletError, match="no_such"), connect(wrong):
        pass


def test_a_resource_that_no_worker_has_is_an_error_without_waiting(tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as running,
        Client(running),
    ):
        address = running.scheduler_address
        asks = cluster(scheduler=address, resources={"GPU": 1})
        with connect(asks) as client, pytest.raises(TubeletError) as caught:
            check_workers(client, asks, "preflight-gpu")
        assert "None of the 1 workers has the resources of a shard task (GPU=1)" in str(caught.value)
        assert "--resources GPU=1" in str(caught.value)

        # The same scheduler, through its file and through the environment.
        file = tmp_path / "scheduler.json"
        with Client(address) as client:
            client.write_scheduler_file(file)
        by_file = cluster(scheduler_file=str(file))
        with connect(by_file) as client:
            assert check_workers(client, by_file, "preflight-file")["tubelet"]


def test_workers_with_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as running,
        Client(running) as client,
    ):
        monkeypatch.setattr("tubelet_pipeline.preflight.importlib.metadata.version", lambda name: "0.0.1")
        with pytest.raises(TubeletError, match=r"runs other versions: tubelet 0\.0\.1 here"):
            check_workers(client, cluster(), "preflight-versions")


def test_no_worker_within_the_time_is_an_error() -> None:
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as running,
        Client(running) as client,
        pytest.raises(TubeletError, match=r"No worker took a task within 0\.1 s"),
    ):
        check_workers(client, cluster(start_timeout_s=0.1), "preflight-none")


def test_the_short_options_replace_the_section(job_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base = {**job_settings, "store": "s.zarr", "cluster": {"class": "dask_jobqueue.SLURMCluster", "workers": 4}}
    config = validate(ExtractConfig, {**base, "scheduler": "tcp://host:8786"}, "the command line")
    assert config.workers_from.address == "tcp://host:8786"
    assert config.workers_from.class_ is None
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://other:1")
    assert ClusterConfig().address == "tcp://other:1"
    assert cluster(**{"class": "dask_jobqueue.SLURMCluster"}).address is None


def test_dask_s_own_tracebacks_stay_off_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    # Dask's client logs one when its scheduler is lost, with a handler of its own.
    own = logging.getLogger("distributed.client")
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as running,
        connect(cluster(scheduler=running.scheduler_address)),
    ):
        own.error("Failed to reconnect to scheduler")
        assert "Failed to reconnect" not in capfd.readouterr().err


def test_of_a_local_cluster_the_dashboard_answers_and_ctrl_c_does_not_reach_the_workers() -> None:
    def blocks_sigint() -> bool:  # nested: workers cannot import this module
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    with connect(ClusterConfig(workers=1)) as client:
        address = dashboard_of(client)
        assert address is not None
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"Bokeh" in page.read()
        assert list(client.run(blocks_sigint).values()) == [True]
        assert not blocks_sigint()
