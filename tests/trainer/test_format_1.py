"""Laws of files written in British spelling: see also `tests/baseline`, which holds some."""

from __future__ import annotations

import pytest

from tubelet.config import dump_yaml, load_config
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.format_1 import current_record, current_tensor
from tubelet_trainer.specs import specs

THEN = """
store: s.zarr
out: run
mirror: {budget: 5 GiB}
pairs: {neighbours: 8}
sae: {normalisation: {centre: false}}
optimiser: {lr: 0.01}
saes: [{name: a, optimiser: {ema: 0.9}}]
sweep: {sae.normalisation.centre: [true, false], optimiser.beta2: [0.9]}
"""


def test_a_configuration_in_british_spelling_means_the_same(tmp_path):
    (tmp_path / "then.yaml").write_text(THEN)
    config = load_config(TrainConfig, tmp_path / "then.yaml", {})
    assert (config.pairs.neighbors, config.optimizer.lr) == (8, 0.01)
    assert config.cache.budget == 5 * 2**30
    first, second = (spec.config for spec in specs(config))
    assert (first.sae.normalization.center, second.sae.normalization.center) == (True, False)
    assert (first.optimizer.ema, first.optimizer.beta2, first.optimizer.lr) == (0.9, 0.9, 0.01)
    now = dump_yaml(config)
    assert not [word for word in ("isation", "optimiser", "neighbour", "centre", "mirror") if word in now]


def test_other_names_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("store: s.zarr\nout: run\noptimisr: {lr: 1}\n")
    with pytest.raises(TubeletError, match="optimisr"):
        load_config(TrainConfig, tmp_path / "run.yaml", {})
    # Only files may be of an earlier version.
    with pytest.raises(TubeletError, match=r"optimiser.*optimizer"):
        load_config(TrainConfig, None, {"store": "s.zarr", "out": "run", "optimiser.lr": "1"})


def test_what_belongs_to_a_store_is_not_renamed():
    provenance = {"backbone": {"normalisation": "imagenet"}, "pairs": {"neighbours": 4}}
    record = current_record({"config": {"normalisation": {"centre": True}}, "broken": {}, "provenance": provenance})
    assert record == {
        "config": {"normalization": {"center": True}},
        "diverged": {},
        "provenance": {"backbone": {"normalisation": "imagenet"}, "pairs": {"neighbors": 4}},
    }


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("normalisation.mean", "normalization.mean"),
        ("a/sae/normalisation.whiten", "a/sae/normalization.whiten"),
        ("clock/silent_tokens", "dead_latents/silent_tokens"),
        ("clock/clock/dead_counts", "clock/dead_latents/dead_counts"),
        ("clock/sae/W_enc", "clock/sae/W_enc"),
        ("adam/W_enc/exp_avg", "adam/W_enc/exp_avg"),
    ],
)
def test_tensors_have_the_names_of_today(then, now):
    assert current_tensor(then) == now
