"""Finding the backbone of a store again."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tubelet.errors import TubeletError
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.plan_extraction import make_plan
from tubelet_pipeline.redecode import BACKBONE_FOLDER, backbone_of
from tubelet_store.reader import open_store


def store_of(config: dict[str, Any], **provenance: Any) -> Any:
    """What `backbone_of` reads of a store that the job would write."""
    planned = make_plan(ExtractConfig.model_validate({**config, "store": "/nowhere"}))
    return SimpleNamespace(plan=planned.plan, state=SimpleNamespace(provenance={**planned.provenance, **provenance}))


def test_a_local_folder_is_found_from_any_directory(
    undisturbed: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(str(undisturbed))
    assert store.state.provenance[BACKBONE_FOLDER] == str(backbone.resolve())
    assert backbone_of(store, device="cpu").weights_digest == store.plan.backbone["weights_digest"]


def test_the_folder_is_no_part_of_the_plan(job_settings: dict[str, Any], backbone: Path, tmp_path: Path) -> None:
    moved = tmp_path / backbone.name
    shutil.copytree(backbone, moved)
    here, there = store_of(job_settings), store_of({**job_settings, "backbone": {"id": str(moved)}})
    assert here.plan.digest == there.plan.digest
    assert here.state.provenance[BACKBONE_FOLDER] != there.state.provenance[BACKBONE_FOLDER]


def test_a_folder_that_moved_is_named_and_can_be_replaced(job_settings: dict[str, Any], backbone: Path) -> None:
    store = store_of(job_settings, **{BACKBONE_FOLDER: "/gone/model"})
    with pytest.raises(TubeletError, match="/gone/model") as caught:
        backbone_of(store, device="cpu")
    assert "checkpoint" in caught.value.remedy
    assert backbone_of(store, str(backbone), "cpu").weights_digest == store.plan.backbone["weights_digest"]
