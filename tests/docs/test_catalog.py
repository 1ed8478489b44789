"""catalog.yaml is what it says: an Intake catalog, whose entries open the demo's stores once they are there."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pages
import pytest

from stores import make_plan, make_store
from tubelet_store.catalog.catalog import Catalog
from tubelet_store.catalog.entry import StoreEntry
from tubelet_store.reader import open_store

CATALOG = pages.ROOT / "catalog.yaml"


@pytest.fixture(scope="module")
def stores() -> list[StoreEntry]:
    catalog = Catalog.read(str(CATALOG))
    assert catalog.problems == []
    return catalog.stores


def test_it_lists_what_the_demo_makes(stores):
    """The demo's own settings are the reference; only what they say can be compared without running it."""
    from tubelet_lens.demo.demo import HOOK, DemoConfig
    from tubelet_pipeline.demo_backbones import NAMES

    assert [entry.name for entry in stores] == ["demo-train", "demo-validation"]
    for entry in stores:
        folder = CATALOG.parent / DemoConfig().out
        assert entry.url == str(folder / f"{entry.name.removeprefix('demo-')}.zarr")
        assert [block.hook for block in entry.hooks] == [HOOK]
        assert entry.about.backbone["id"] in NAMES
        assert entry.about.license


def test_tubelet_and_intake_read_the_stores(stores, tmp_path):
    shutil.copy(CATALOG, tmp_path)
    for entry in stores:
        about = entry.about
        plan = make_plan(grid=about.grid, hooks={about.hook: about.shape[3]}, dtype=about.dtype)
        make_store(tmp_path / entry.url.removeprefix(f"{CATALOG.parent}/"), plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intake = pytest.importorskip("intake")
        opened = intake.open_catalog(str(tmp_path / CATALOG.name))
    for entry in stores:
        array = opened[f"{entry.name}/{entry.about.hook}"].read()
        mine = open_store(f"{tmp_path / CATALOG.name}#{entry.name}")[entry.about.hook]
        assert array.shape == mine.shape
        assert mine.shape[1:] == entry.about.shape[1:]
        np.testing.assert_array_equal(array[4].compute(scheduler="synchronous"), mine[4])
