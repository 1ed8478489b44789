"""Laws of the warnings about an L0 controller that cannot reach its target."""

from __future__ import annotations

import json

import numpy as np
import pytest

from stores import make_plan, make_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train

D = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    x = np.random.default_rng(0).standard_normal((12, 4, 6, D)).astype(np.float32)
    plan = make_plan(clips=12, clips_per_shard=4, grid=(4, 2, 3), hooks={"h": D})
    return make_store(tmp_path_factory.mktemp("steering") / "s.zarr", plan, {"h": x})


def run(store, out, steps=900, **sae):
    """A run whose learning rate is too low for anything to change, unless the weight alone does."""
    tree = {
        "store": store.url, "out": out, "steps": steps, "batch_tokens": 16, "window_tokens": 300, "block_patches": 6,
        "sae": {"latents": 16, "sparsity_warmup_steps": 0, **sae}, "optimizer": {"lr": 1e-6}, "device": "cpu",
        "holdout": {"fraction": 0}, "log_every": 30, "checkpoint_every": 900,
    }  # fmt: skip
    train(TrainConfig.model_validate(tree))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"train"' in line]


@pytest.mark.parametrize(
    ("sae", "words", "limit"),
    [
        ({"kind": "relu", "target_l0": 1}, "does not fall to target_l0 1", 1),
        ({"kind": "jumprelu", "target_l0": 15}, "does not rise to target_l0 15", -1),
        ({"kind": "gated", "target_l0": 8}, None, 0),
    ],
)
def test_a_target_out_of_reach_warns_once_and_at_the_end(store, tmp_path, capsys, sae, words, limit):
    lines = run(store, tmp_path / "run", **sae)
    said = [line for line in capsys.readouterr().err.splitlines() if "target_l0" in line]
    assert lines[-1]["sparsity_limit"] == limit
    if words is None:
        assert not said
        return
    first = next(line["step"] for line in lines if line["sparsity_limit"])
    assert first < lines[-1]["step"]
    assert [line.split(":")[0] for line in said] == [f"step {first}", "step 900"]
    assert all(words in line for line in said)
    assert f"L0 is {lines[-1]['l0']:.1f}" in said[-1]


def test_a_target_that_a_short_run_misses_warns_at_the_end(store, tmp_path, capsys):
    lines = run(store, tmp_path / "run", steps=60, kind="relu", target_l0=1)
    assert lines[-1]["sparsity_limit"] == 0
    assert lines[-1]["l0"] > 1.5
    said = [line for line in capsys.readouterr().err.splitlines() if "target_l0" in line]
    assert len(said) == 1
    assert f"L0 is {lines[-1]['l0']:.1f} at the end, target_l0 1 not reached" in said[0]
    assert "raise sae.sparsity or train longer" in said[0]
