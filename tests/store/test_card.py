"""Laws of `tubelet card`: other tools read the description of a store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stores import make_plan, make_store
from tubelet_store.card import write_card
from tubelet_store.reader import Store

mlcroissant = pytest.importorskip("mlcroissant")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    plan = make_plan(clips=10, grid=(2, 2, 2), hooks={"blocks.1": 4})
    values = np.random.default_rng(0).standard_normal((10, 2, 4, 4)).astype(np.float32)
    return make_store(tmp_path / "s.zarr", plan, {"blocks.1": values}, failed=(3,))


def test_mlcroissant_finds_nothing_wrong_with_the_croissant_file(store: Store, tmp_path: Path) -> None:
    _, croissant = write_card(store, tmp_path / "card", "CC-BY-4.0", "Ten clips")
    issues = mlcroissant.Dataset(jsonld=croissant).metadata.issues
    assert not issues.errors
    broken = json.loads(croissant.read_text())
    broken["distribution"][0].pop("encodingFormat")
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=broken)


def test_the_data_card_says_what_how_and_what_failed(store: Store, tmp_path: Path) -> None:
    card, _ = write_card(store, tmp_path / "card", "CC-BY-4.0", "Ten clips")
    text = card.read_text()
    for said in ("# Ten clips", "CC-BY-4.0", "blocks.1", store.identity, "tubelet.open_store"):
        assert said in text, said
    assert "1 clip failed" in text
    assert "clip 3 " in text


def test_mlcroissant_reads_the_clip_table(store: Store) -> None:
    _, croissant = write_card(store, Path(store.url), "CC-BY-4.0", "Ten clips")
    rows = list(mlcroissant.Dataset(jsonld=croissant).records("clip"))
    assert [row["clip/clip"] for row in rows] == list(range(10))
    assert [row["clip/video_id"].decode() for row in rows] == store.clips()["video_id"].to_pylist()
