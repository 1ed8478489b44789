"""A few rendered videos, a tiny backbone, a job that extracts the one with the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from families import backbone_for
from processes import run_tubelet
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset

VIDEOS = 26
CLIPS_PER_SHARD = 3


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SSv2-like data set of VIDEOS training videos, one of them cut short."""
    root = tmp_path_factory.mktemp("videos") / "ssv2"
    make_dataset(VideosConfig(out=root, videos=VIDEOS, frames=20, height=64, width=64, validation_share=0.0, workers=1))
    broken = sorted(root.rglob("*.webm"))[5]
    broken.write_bytes(broken.read_bytes()[:300])
    return root


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VideoMAE of two small layers with random weights."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-videomae"
    return write_tiny_videomae(folder, image_size=32, patch_size=8, frames=8, hidden=32, layers=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `backbone_of` writes its checkpoints."""
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def backbone_of(root: Path) -> Callable[[str], Backbone]:
    """Loads the tiny backbone of a case of `families.CASES`, once."""
    return functools.cache(functools.partial(backbone_for, root=root))


@pytest.fixture
def job(job_settings: dict[str, Any], tmp_path: Path) -> Path:
    """The job as a YAML file that writes `tmp_path`/store.zarr."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job_settings, "store": str(tmp_path / "store.zarr")}))
    return path


@pytest.fixture(scope="session")
def job_settings(videos: Path, backbone: Path) -> dict[str, Any]:
    """Extract both layers of `videos` with two workers."""
    return {
        "dataset": {"kind": "ssv2", "root": str(videos), "split": "train"},
        "sampling": {"kind": "dense", "frames": 8, "stride": 2},
        "backbone": {"id": str(backbone)},
        "hooks": ["blocks.0", "blocks.-1"],
        "clips_per_shard": CLIPS_PER_SHARD,
        "decode": {"processes": 1},
        "cluster": {"workers": 2, "threads": 1},
    }


@pytest.fixture(scope="session")
def undisturbed(job_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the job writes when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**job_settings, "store": str(folder / "store.zarr")}))
    status, out, err = run_tubelet("extract", str(path))
    assert status == 0, err
    assert "stored      25 of 26 clips" in out
    return folder / "store.zarr"
