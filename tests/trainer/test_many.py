"""Laws of several SAEs on one stream."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.config import load_config
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.streams import open_stores
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.optim.stacked import StackedSAEs
from tubelet_trainer.run.checkpoint import load_latest
from tubelet_trainer.run.loop import train
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.sae_files import load_record
from tubelet_trainer.specs import specs


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=30, clips_per_shard=8, grid=(4, 3, 4), hooks={"h": 16, "g": 12})
    return make_store(tmp_path_factory.mktemp("many") / "s.zarr", plan, failed=(3,))


def configure(store, out, **fields):
    tree = {
        "store": store.url, "out": out, "hook": "h", "steps": 20, "batch_tokens": 64, "window_tokens": 500,
        "sae": {"k": 4, "dead_after_tokens": 96}, "log_every": 5, "eval_every": 10, "eval_tokens": 128,
        "checkpoint_every": 6, "holdout": {"fraction": 0.1}, "device": "cpu", "pairs": {"anchors": 32},
    }  # fmt: skip
    return TrainConfig.model_validate({**tree, **fields})


SAES = {
    "plain": {"sae": {"k": 4}},
    "batch": {"sae": {"kind": "batchtopk", "k": 6, "nesting": {"kind": "groups"}}},
    "time": {"sae": {"k": 4}, "objective": {"lambda_t": 0.3, "codes": "post"}},
    "space": {"sae": {"k": 4}, "objective": {"lambda_s": 0.3}, "optimizer": {"lr": 0.01}},
    "seeded": {"sae": {"kind": "batchtopk", "k": 6, "seed": 3}, "optimizer": {"ema": 0.9, "lr": 0.003}},
    "slow": {"sae": {"k": 4}, "objective": {"lambda_smooth": 0.1, "lambda_slow": 0.5, "codes": "prefix"}},
    "signed": {"sae": {"kind": "abstopk", "k": 4}, "optimizer": {"resample_every": 6}},
    "signed too": {"sae": {"kind": "abstopk", "k": 4, "seed": 2, "nesting": {"kind": "hierarchical"}}},
    "random": {"sae": {"k": 4, "seed": 5, "nesting": {"kind": "random"}, "init": {"directions": "data"}}},
    "jump": {"sae": {"kind": "jumprelu"}, "hook": "g"},
}


def weights(folder):
    return load_file(folder / "sae.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def together(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("together") / "run"
    listed = [{"name": name, **spec} for name, spec in SAES.items()]
    return train(configure(store, out, sae={"dead_after_tokens": 96}, saes=listed)).out


@pytest.mark.parametrize("name", SAES)
def test_trained_together_equals_trained_alone(together, tmp_path, name):
    # The configuration in an SAE's folder describes it alone.
    tree = yaml.safe_load((together / name / "config.yaml").read_text())
    assert not tree["saes"]
    alone = train(TrainConfig.model_validate({**tree, "out": tmp_path / "alone"})).out
    assert same(weights(alone), weights(together / name))
    assert log(alone) == log(together / name)
    if name == "plain":
        assert any(line.get("auxk") for line in log(alone)), "no latent died: AuxK went untested"


def test_saes_of_equal_shape_step_as_one(store, tmp_path):
    listed = [{"name": name, **spec} for name, spec in SAES.items()]
    run = Run(configure(store, tmp_path, sae={"dead_after_tokens": 96}, saes=listed), [store], torch.device("cpu"))
    names = [
        [run.sae_runs[run.sae_group.sae_trainers.index(own)].name for own in c.sae_trainers]
        for c in run.sae_group.stacks
    ]
    topk = ["plain", "time", "space", "slow", "random"]
    assert names == [topk, ["batch", "seeded"], ["signed", "signed too"], ["jump"]]
    for stacked in run.sae_group.stacks:
        # One array of weights for all; storages differ between arrays.
        arrays = {sae.W_enc.untyped_storage().data_ptr() for sae in stacked.saes}
        assert len(arrays) == 1
    together, alone = [], []
    for step, batch in zip(range(3), run.loader, strict=False):
        run.sae_group.learn(batch, step)
        stacked = run.sae_group.stacks[0]
        x = stacked.saes[0].normalization(batch.hooks["h"])
        together += stacked.losses(batch, x)[0]
        alone += [StackedSAEs([own], "h").losses(batch, x)[0][0] for own in stacked.sae_trainers]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.pre_BF, theirs.pre_BF)
        assert torch.equal(ours.recon_BD, theirs.recon_BD)


def log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


def test_each_has_its_folder_and_its_own_hook(together):
    assert load_record(together / "jump").provenance["hook"] == "g"
    assert load_record(together / "jump").channels == 12
    assert load_record(together / "plain").channels == 16
    assert load_record(together / "time").provenance["objective"]["lambda_t"] == 0.3
    assert not (together / "sae.json").exists()
    kept = load_latest(together / "checkpoints")
    assert {name.split("/")[0] for name in kept.tensors} == SAES.keys()


def test_several_continue_where_they_were_cut(store, tmp_path):
    fields = {"sweep": {"sae.seed": [0, 1], "objective": {"lambda_t": [0, 0.1]}}}
    whole = train(configure(store, tmp_path / "whole", **fields)).out
    learn = SAEGroup.learn

    def learn_or_crash(self, batch, step):
        if step == 13:
            raise RuntimeError("cut")
        return learn(self, batch, step)

    config = configure(store, tmp_path / "cut", **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEGroup, "learn", learn_or_crash)
        with pytest.raises(RuntimeError, match="cut"):
            train(config)
    train(config)
    names = sorted(path.name for path in whole.iterdir() if path.is_dir() and path.name != "checkpoints")
    assert names == ["seed=0,lambda_t=0", "seed=0,lambda_t=0.1", "seed=1,lambda_t=0", "seed=1,lambda_t=0.1"]
    for name in names:
        assert same(weights(whole / name), weights(tmp_path / "cut" / name))
    with pytest.raises(TubeletError, match="another configuration"):
        train(configure(store, tmp_path / "cut", sweep={"sae.seed": [0, 2]}))


def test_a_sweep_is_the_product_of_its_lists_and_of_the_list_of_saes(store, tmp_path):
    listed = [{"name": "a"}, {"sae": {"kind": "batchtopk"}}]
    config = configure(store, tmp_path, saes=listed, sweep={"sae": {"k": [2, 3]}, "objective.lambda_s": [0, 1]})
    found = specs(config)
    assert [(s.config.sae.kind, s.config.sae.k, s.config.objective.lambda_s) for s in found] == [
        (kind, k, weight) for kind in ("topk", "batchtopk") for k in (2, 3) for weight in (0, 1)
    ]
    assert found[0].name == "a,k=2,lambda_s=0"
    assert len({s.name for s in found}) == 8
    nestings = [{"kind": "flat"}, {"kind": "random", "prefixes": 4}, {"kind": "ks", "ks": [2, 4]}]
    found = specs(configure(store, tmp_path, sae={"k": 4}, sweep={"sae.nesting": nestings}))
    assert [s.name for s in found] == ["nesting=flat", "nesting=random-prefixes-4", "nesting=ks-ks-2+4"]
    assert all(not s.config.saes and not s.config.sweep for s in found)


def test_a_store_is_not_mixed_with_itself(store, tmp_path):
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.url, copy)
    with pytest.raises(TubeletError, match="is the same store as"):
        train(configure(store, tmp_path / "run", mix={str(copy): 0.25}))


def test_of_a_folder_with_several_saes_one_must_be_named(together):
    with pytest.raises(TubeletError, match=r"holds 10 SAEs\. Name the folder of one: batch, jump, plain"):
        load_record(together)


def test_sweeps_run_from_the_command_line(store, tmp_path, capsys):
    arguments = ["train", store.url, "--out", str(tmp_path / "run"), "--hook", "h", "--steps", "3", "--sae.k", "3"]
    arguments += ["--batch_tokens", "32", "--device", "cpu"]
    assert main([*arguments, "--sweep.sae.seed", "[1, 2]"]) == 0
    assert "a batch mixes" in capsys.readouterr().err
    assert (tmp_path / "run" / "seed=2" / "sae.json").is_file()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sweep": {"seed": [0, 1]}}, "one stream"),
        ({"sweep": {"sea.k": [0, 1]}}, "Did you mean 'sae'"),
        ({"sweep": {"sae.kk": [0, 1]}}, "sae.kk"),
        ({"sweep": {"sae.k": 3}}, "not a list"),
        ({"saes": [{"name": "a"}, {"name": "a"}]}, "Two SAEs"),
        ({"saes": [{"name": "../a"}]}, "cannot name"),
        ({"saes": [{"batch_tokens": 7}]}, "batch_tokens"),
    ],
)
def test_mistakes_in_lists_and_sweeps_are_named(store, tmp_path, fields, words):
    with pytest.raises(TubeletError, match=words):
        train(configure(store, tmp_path / "run", **fields))


def test_stores_are_mixed_in_training(store, tmp_path):
    plan = make_plan(clips=10, clips_per_shard=8, grid=(4, 3, 4), hooks={"h": 16, "g": 12})
    other = make_store(tmp_path / "other.zarr", plan, seed=9)
    config = configure(store, tmp_path / "run", mix={other.url: 0.25}, objective={"lambda_t": 0.1})
    record = load_record(train(config))
    assert record.provenance["mix"] == [
        {"store": "other.zarr", "store_identity": other.identity, "share": 0.25},
    ]
    run = Run(config, open_stores(config), torch.device("cpu"))
    clips = torch.cat([batch.clip for batch in run.loader])
    assert abs(float((clips >= 30).float().mean()) - 0.25) < 0.01
    narrow = make_store(tmp_path / "narrow.zarr", make_plan(clips=10, grid=(4, 3, 4), hooks={"h": 8}))
    with pytest.raises(TubeletError, match="hook h differ"):
        train(configure(store, tmp_path / "bad", mix={narrow.url: 0.25}))


def test_a_run_of_several_kinds_is_resumed_from_its_own_config_yaml(together):
    before = {name: weights(together / name) for name in SAES}
    again = train(load_config(TrainConfig, together / "config.yaml", {})).out
    assert all(same(weights(again / name), before[name]) for name in SAES)
