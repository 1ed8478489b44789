"""Cluster managers without a cluster: the documented sections give the job script and the manifest they promise."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.cli.dask_worker import main as dask_worker

from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_pipeline.cluster import ClusterConfig, connect, start_cluster
from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_store.reader import open_store

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
SLURM = "dask_jobqueue.SLURMCluster"
KUBERNETES = "dask_kubernetes.operator.KubeCluster"

# A queue of one machine: a job runs at once, in the background, with its script's own process number as its id.
# As SLURM does: the script is kept when it is submitted, for it may be removed right after.
SBATCH = """#!/bin/sh
cp "$1" "$1.kept"
setsid sh "$1.kept" > "$1.log" 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -- -"$1"
"""


def documented(name: str) -> ClusterConfig:
    """The `cluster:` section of the page that names the class."""
    sections = [
        yaml.safe_load(text)["cluster"] for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    ]
    (section,) = (section for section in sections if section.get("class") == name)
    return validate(ClusterConfig, section, str(PAGE))


def worker_options(command: list[str]) -> dict[str, Any]:
    """What `dask worker` understands of its arguments, as it would itself."""
    return dict(dask_worker.make_context("dask worker", command).params)


def test_the_documented_slurm_section_requests_one_worker_a_gpu_that_ends_before_its_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobqueue = pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-must-not-travel")
    config = documented(SLURM)
    with jobqueue.SLURMCluster(**config.kwargs) as cluster:
        script = cluster.job_script()
    assert "a-secret" not in script
    asked = re.findall(r"^#SBATCH (.+)$", script, re.MULTILINE)
    for line in ("-p gpu", "-n 1", "--cpus-per-task=16", "-t 04:00:00", "--gres=gpu:1", "--signal=TERM@60"):
        assert line in asked
    (line,) = (line for line in script.splitlines() if "dask_worker" in line)
    options = worker_options(shlex.split(line)[3:])
    # The class gives `--nthreads 16`; ours comes later and counts: two shards at a time, which share the GPU.
    assert options["nthreads"] == 2
    assert options["resources"] == "GPU=2"
    assert config.resources == {"GPU": 1}
    assert (options["lifetime"], options["lifetime_stagger"]) == ("235m", "4m")


def test_the_documented_kubernetes_section_gives_pods_that_the_operator_takes() -> None:
    operator = pytest.importorskip("dask_kubernetes.operator")
    config = documented(KUBERNETES)
    spec = operator.make_cluster_spec(**config.kwargs)
    assert (spec["apiVersion"], spec["kind"]) == ("kubernetes.dask.org/v1", "DaskCluster")
    (worker,) = spec["spec"]["worker"]["spec"]["containers"]
    (scheduler,) = spec["spec"]["scheduler"]["spec"]["containers"]
    assert worker["image"] == scheduler["image"] == config.kwargs["image"]
    assert worker["args"][:2] == ["dask", "worker"]
    assert worker_options(["tcp://scheduler:8786", *worker["args"][2:]])["nthreads"] == 2
    assert worker["resources"]["requests"] == {"memory": "32Gi", "cpu": "8"}
    # As the page warns: a GPU asked for here would be taken by the scheduler too.
    assert scheduler["resources"] == worker["resources"]
    assert [variable["name"] for variable in worker["env"]] == ["AWS_REGION"]


def test_kubernetes_without_a_cluster_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask_kubernetes.operator")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(TubeletError, match=r"KubeCluster does not start: .*credentials"),
        connect(documented(KUBERNETES)),
    ):
        pass


def test_an_extraction_runs_on_workers_that_a_queue_started(
    job_settings: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dask_jobqueue")
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    kwargs = {
        "cores": 1,
        "processes": 1,
        "memory": "4GB",
        "interface": "lo",
        "worker_extra_args": ["--resources", "GPU=1"],
        "local_directory": str(tmp_path),
        "scheduler_options": {"dashboard_address": ":0"},
    }
    section = {"class": SLURM, "kwargs": kwargs, "workers": 2, "threads": 1, "resources": {"GPU": 1}}
    config = ExtractConfig.model_validate({**job_settings, "store": str(tmp_path / "s.zarr"), "cluster": section})
    assert extract(config).identity == open_store(str(undisturbed)).identity


def test_a_missing_queue_is_a_one_line_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask_jobqueue")
    config = documented(SLURM)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TubeletError, match="submits its jobs with sbatch, which is not"), start_cluster(config):
        pass
