"""catalog.yaml is what it says: an Intake catalogue, whose entries open the demo's stores once they are there."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pages
import pytest
import yaml

from stores import make_plan, make_store
from tubelet_store import open_store

CATALOG = pages.ROOT / "catalog.yaml"
DESCRIBED = {
    "store",
    "identity",
    "hook",
    "dims",
    "clips",
    "grid",
    "channels",
    "dtype",
    "backbone",
    "dataset",
    "sampling",
    "clip_table",
    "license",
    "owner",
}


@pytest.fixture(scope="module")
def catalog() -> dict:
    return yaml.safe_load(CATALOG.read_text())


def test_it_has_the_sections_of_intake_2(catalog):
    assert catalog["version"] == 2
    assert set(catalog) == {"version", "metadata", "user_parameters", "aliases", "data", "entries"}
    assert catalog["metadata"]["tubelet"]["schema"] == 1
    assert set(catalog["aliases"].values()) == set(catalog["entries"])


def test_every_entry_opens_its_own_array_by_a_token_of_another_name(catalog):
    for name, entry in catalog["entries"].items():
        token = entry["kwargs"]["data"].removeprefix("{data(").removesuffix(")}")
        # Intake recurses without end where a token is called like an entry.
        assert token in catalog["data"]
        assert token not in catalog["entries"]
        described = entry["metadata"]["tubelet"]
        assert set(described) == DESCRIBED, name
        url = catalog["data"][token]["kwargs"]["url"]
        assert url == f"{{CATALOG_DIR}}/{described['store']}/activations/{described['hook']}"


def test_nothing_in_it_is_secret_or_of_this_machine_or_calls_a_function(catalog):
    text = CATALOG.read_text()
    assert "{func(" not in text
    for data in catalog["data"].values():
        assert data["kwargs"]["storage_options"] == {}
        assert data["kwargs"]["url"].startswith("{CATALOG_DIR}/")


def test_it_describes_what_the_demo_makes(catalog):
    """The demo's own settings files are the reference; only what they say can be compared without running it."""
    from tubelet_lens import demo
    from tubelet_pipeline.demo_backbones import NAMES

    for entry in catalog["entries"].values():
        described = entry["metadata"]["tubelet"]
        assert described["store"].partition("/")[0] == str(demo.DemoConfig().out)
        assert described["hook"] == demo._HOOK
        assert described["backbone"]["id"] in NAMES


def test_intake_reads_the_stores_through_dask(catalog, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        intake = pytest.importorskip("intake")
        shutil.copy(CATALOG, tmp_path)
        for entry in catalog["entries"].values():
            described = entry["metadata"]["tubelet"]
            grid = described["grid"]
            plan = make_plan(
                grid=(grid["time"], grid["height"], grid["width"]),
                hooks={described["hook"]: described["channels"]},
                dtype=described["dtype"],
            )
            make_store(tmp_path / described["store"], plan)
        opened = intake.open_catalog(str(tmp_path / CATALOG.name))
        assert set(opened) == set(catalog["aliases"])
        for name, entry in catalog["entries"].items():
            described = entry["metadata"]["tubelet"]
            array = opened[name].read()
            store = open_store(str(tmp_path / described["store"]))
            assert array.ndim == len(described["dims"])
            assert array.shape == (store.plan.clips, *store.plan.clip_shape(store.plan.hooks[0]))
            np.testing.assert_array_equal(array[4].compute(), store.shard_map(described["hook"], 1)[0])
