"""Laws of what a run of several SAEs leaves: a table, and the temporal coherence of each SAE's codes."""

from __future__ import annotations

import csv
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.run.loop import train
from tubelet_trainer.run.train_result import read_run
from tubelet_trainer.sae.sae_files import load_sae

TIME = 4
SAES = {
    "sae": {"expansion": 2},
    "saes": [{"name": "topk", "sae": {"k": 3}}, {"name": "relu", "sae": {"kind": "relu"}}],
    "sweep": {"objective.lambda_t": [0, 0.5]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("table") / "s.zarr",
        make_plan(clips=30, clips_per_shard=8, grid=(TIME, 2, 3), hooks={"h": 12}),
    )


def configure(store, out, **fields):
    tree = {
        "store": store.url, "out": out, "steps": 12, "batch_tokens": 64, "window_tokens": 500, "eval_tokens": 10**6,
        "sae": {"k": 3, "expansion": 2}, "holdout": {"fraction": 0.3}, "device": "cpu",
    }  # fmt: skip
    return TrainConfig.model_validate({**tree, **fields})


@pytest.fixture(scope="module")
def sweep(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "run"
    return train(configure(store, out, **SAES))


def test_a_sweep_leaves_a_table_of_its_saes(sweep, store):
    with (sweep / "saes.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {f"{kind},lambda_t={weight}" for kind in ("topk", "relu") for weight in (0, 0.5)}
    for sae in sweep:
        row = rows[sae.name]
        assert (row["kind"], float(row["fvu"]), float(row["l0"]), float(row["dead"])) == (sae.kind, *figures(sae))
        assert row["k"] == ("3" if sae.kind == "topk" else "")
        assert row["sparsity"] == ("0.0008" if sae.kind == "relu" else "")
        assert float(row["lambda_t"]) == (0.5 if sae.name.endswith("0.5") else 0)
        assert sae.name in (sweep / "saes.md").read_text()
    assert (sweep / "saes.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(sweep.out) == sweep
    # A finished run gives the same result again.
    assert train(TrainConfig.model_validate_json(_json(sweep, store))) == sweep


def figures(sae):
    return sae.fvu, sae.l0, sae.dead


def _json(sweep, store):
    return configure(store, sweep.out, **SAES).model_dump_json(exclude_unset=True)


def test_coherence_is_the_mean_cosine_of_codes_at_successive_steps(sweep, store):
    table = store.clips()
    out = held_out(table["video_id"].to_pylist(), configure(store, sweep.out).holdout)
    tokens = torch.from_numpy(np.stack([store["h"][clip] for clip in np.flatnonzero(out)])).float()
    for sae in sweep:
        codes = load_sae(sae.folder).encode(tokens)
        before, after = codes[:, :-1].flatten(0, 2).double(), codes[:, 1:].flatten(0, 2).double()
        compared = (before != 0).any(1) & (after != 0).any(1)
        expected = nnf.cosine_similarity(before, after)[compared].mean()
        assert sae.coherence == pytest.approx(float(expected), rel=1e-4)
        assert -1 <= sae.coherence_other <= 1


def test_codes_that_stay_the_same_over_time_are_coherent(tmp_path):
    plan = make_plan(clips=20, clips_per_shard=8, grid=(TIME, 2, 3), hooks={"h": 12})
    x = np.random.default_rng(0).standard_normal((20, 1, 6, 12)).repeat(TIME, axis=1)
    store = make_store(tmp_path / "s.zarr", plan, {"h": x})
    result = train(configure(store, tmp_path / "run", sweep={"sae.seed": [0, 1]}))
    for sae in result:
        assert sae.coherence == pytest.approx(1)
        assert sae.coherence_other < 0.6


@pytest.mark.parametrize("missing", ["matplotlib", "steps"])
def test_a_plot_that_cannot_be_made_is_reported(store, tmp_path, monkeypatch, capsys, missing):
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        plan = make_plan(clips=20, clips_per_shard=8, grid=(1, 2, 3), hooks={"h": 12})
        store = make_store(tmp_path / "s.zarr", plan)
    result = train(configure(store, tmp_path / "run", sweep={"sae.seed": [0, 1]}))
    assert "no plot of FVU against coherence" in capsys.readouterr().err
    assert not (result / "saes.png").exists()
    assert ("coherence" in result.table().columns) == (missing == "matplotlib")
    assert all(math.isfinite(sae.fvu) for sae in result)


def test_one_sae_needs_no_comparison(store, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(configure(store, tmp_path / "run").model_dump_json(exclude_unset=True))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert not list((tmp_path / "run").glob("saes.*"))
    said = capsys.readouterr().out
    assert said.startswith("Training run")
    assert "topk" in said
