"""A notebook's way through the public API, on videos and stores like the demo's but few and small."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import tubelet
from tubelet.cli.main import main
from tubelet.cli.verb import example_of
from tubelet.errors import TubeletError
from tubelet.tables import Table


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The notebook's folder: rendered videos, `extract.yaml`, and a catalog once the store is made."""
    folder = tmp_path_factory.mktemp("notebook")
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(1)
    shape = ["--frames", "16", "--height", "64", "--width", "64", "--workers", "1", "--validation_share", "0.2"]
    assert main(["videos", "demo/ssv2", "--videos", "40", *shape]) == 0
    settings = {
        "dataset": {"kind": "ssv2", "root": "demo/ssv2", "split": "train"},
        "sampling": {"kind": "dense", "frames": 16, "stride": 1},
        "backbone": {"id": "videomae-tiny"},
        "hooks": ["blocks.2"],
        "store": "demo/train.zarr",
        "cluster": {"workers": 1},
    }
    Path("extract.yaml").write_text(yaml.safe_dump(settings))
    yield folder
    torch.set_num_threads(threads)
    os.chdir(before)


@pytest.mark.timeout(600)
def test_the_notebook_runs_as_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tubelet.extract("extract.yaml")
    assert "32 of 32 stored" in repr(made)
    assert main(["catalog", "add", "demo-train", "demo/train.zarr"]) == 0
    capsys.readouterr()

    store = tubelet.open_store("catalog.yaml#demo-train")
    x = store["blocks.2"]
    clips, times, places, channels = x.shape
    assert clips == 32

    run = tubelet.train(store="demo/train.zarr", out="runs/a", sae={"kind": "batchtopk", "k": 16}, epochs=2)
    assert {"name", "hook", "kind", "latents", "fvu", "l0"} <= set(repr(run).splitlines()[1].split())
    assert len(run) == 1
    frame = run.to_pandas()
    assert frame["kind"].tolist() == ["batchtopk"]
    assert 0 < frame["fvu"][0] < 2

    sae = tubelet.load_sae("runs/a")
    codes = sae.encode(x[:4])
    assert codes.shape == (4, times, places, sae.latents)
    assert sae.decode(codes).shape == (4, times, places, channels)
    torch.testing.assert_close(run.load().encode(x[:4]), codes, rtol=0, atol=0)

    report = tubelet.evaluate(run="runs/a", store="demo/train.zarr")
    assert Path("runs/a/evaluation/report.html").is_file()
    figures = report.to_pandas()
    assert "reconstruction.fvu" in figures["name"].tolist()
    assert (figures["n"] > 0).any()
    assert "<table>" in report._repr_html_()
    assert isinstance(report.latents, Table)
    column = next(name for name in report.latents.columns if name != "latent")
    ranked = report.latents.sort_by(column, descending=True)
    values = [value for value in ranked[column] if value == value]
    assert values == sorted(values, reverse=True)

    latent = int(ranked["latent"][0])
    quick = {"usage_clips": 4, "probe_clips": 0, "controls": 2}
    edited = tubelet.edit(
        run=run, store=store, clips=[0], latent=latent, operation={"kind": "suppress"}, root="demo/ssv2", **quick
    )
    assert len(edited.table()) == 1
    assert Path(f"runs/a/edits/latent-{latent}/edit.html").is_file()

    site = tubelet.gallery(run=run, store=store, latents={"kind": "list", "numbers": [latent]})
    assert site.pages == 1
    assert "address" in repr(site)
    # Progress went to stderr; nothing of the API writes to stdout.
    assert capsys.readouterr().out == ""


def test_the_example_of_extract_extracts(here: Path) -> None:
    Path("example.yaml").write_text(example_of("extract"))
    assert main(["extract", "example.yaml", "--sampling.stride", "1", "--cluster.workers", "1"]) == 0
    store = tubelet.open_store("demo/two-hooks.zarr")
    assert store["blocks.1"].shape == store["blocks.2"].shape
    assert len(store["blocks.1"]) == 8


def test_wrong_inputs_are_one_line(here: Path) -> None:
    for call in (
        lambda: tubelet.open_store("nowhere.zarr"),
        lambda: tubelet.load_sae("runs/none"),
        lambda: tubelet.evaluate(run="runs/none", store="demo/train.zarr"),
        lambda: tubelet.train(store="demo/train.zarr", out="runs/b", sae={"kind": "topk", "kk": 16}),
        lambda: tubelet.extract("extract.yaml", hooks="blocks.2,blocks.3"),
        lambda: tubelet.gallery(runn="runs/a"),
    ):
        with pytest.raises(TubeletError) as caught:
            call()
        assert "\n" not in str(caught.value)
