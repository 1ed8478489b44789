"""The Python on the first pages runs, on a store and an SAE made small, under the names the demo gives them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pages
import pytest

from stores import make_plan, make_store

FIRST_PAGES = {pages.ROOT / "README.md", pages.DOCS / "index.md"}


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    from tubelet_trainer.config import TrainConfig
    from tubelet_trainer.run.loop import train

    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(pages.ROOT / "catalog.yaml", folder)
    store = make_store(folder / "demo" / "train.zarr", make_plan(hooks={"blocks.2": 96}), failed=[3])
    train(TrainConfig(store=store.url, out=folder / "demo" / "run", steps=2, batch_tokens=64, device="cpu"))
    return folder


@pytest.mark.parametrize(
    "snippet", [s for s in pages.snippets("python") if s.page in FIRST_PAGES], ids=lambda snippet: snippet.where
)
def test_it_runs(snippet, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    exec(compile(snippet.text, snippet.where, "exec"), {})


def test_both_first_pages_have_an_example():
    assert {snippet.page for snippet in pages.snippets("python")} >= FIRST_PAGES


def test_other_python_compiles():
    for snippet in pages.snippets("python"):
        compile(snippet.text, snippet.where, "exec")
