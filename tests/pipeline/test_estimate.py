"""An estimate is exact where it counts: bytes and objects are those of the store that the same job writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tubelet.cli.main import main
from tubelet_pipeline.estimate import EstimateConfig, estimate
from tubelet_store.reader import open_store


def test_sizes_and_counts_are_those_of_the_store(job_settings: dict[str, Any], undisturbed: Path) -> None:
    costs = estimate(EstimateConfig.model_validate({**job_settings, "store": "/nowhere/s.zarr"}))
    store = open_store(str(undisturbed))
    assert (costs.clips, costs.shards, costs.clips_per_shard) == (26, 9, 3)
    for hook, size in costs.bytes_per_hook.items():
        folder = undisturbed / "activations" / hook / "c"
        assert size == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert list(costs.bytes_per_hook) == [hook.name for hook in store.plan.hooks]
    files = sum(path.is_file() for path in undisturbed.rglob("*"))
    assert costs.objects == files
    assert costs.alternatives["dtype float32"] == pytest.approx(2 * costs.total_bytes, rel=0.01)
    assert costs.alternatives["4 of 16 patches"] == pytest.approx(costs.total_bytes / 4, rel=0.02)
    assert costs.alternatives["without blocks.0"] == costs.bytes_per_hook["blocks.1"]
    assert 0 < costs.seconds < 60
    assert not Path("/nowhere").exists()


def test_it_prints_text_and_json(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(job)]) == 0
    text = capsys.readouterr().out
    for word in ("blocks.1:", "objects", "PUT", "limited by", "dtype float32", "patches"):
        assert word in text
    assert main(["estimate", str(job), "--format", "json", "--calibration_clips", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 26
