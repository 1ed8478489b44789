"""Laws of a training run, on real stores, through the public entry points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.reader import open_store
from tubelet_trainer.config import HoldoutConfig, OptimizerConfig, TrainConfig
from tubelet_trainer.data.clip_mixing import measure_mixing
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.run.checkpoint import Checkpoint, load_latest, save_checkpoint
from tubelet_trainer.run.loop import train
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.sae_files import load_record, load_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=40, clips_per_shard=8, grid=(4, 3, 5), hooks={"h": 16})
    return make_store(tmp_path_factory.mktemp("train") / "s.zarr", plan, failed=(3, 20), clips_per_video=2)


def configure(store, out, **fields):
    tree = {
        "store": store.url,
        "out": out,
        "steps": 30,
        "batch_tokens": 64,
        "window_tokens": 512,
        "sae": {"k": 4, "dead_after_tokens": 64},
        "log_every": 5,
        "eval_every": 10,
        "eval_tokens": 256,
        "checkpoint_every": 7,
        "holdout": {"fraction": 0.2},
        "device": "cpu",
    }
    return TrainConfig.model_validate({**tree, **fields})


def weights(out):
    return load_file(Path(out) / "sae.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    """A whole run."""
    return train(configure(store, tmp_path_factory.mktemp("whole") / "run")).out


def test_planted_features_are_found(tmp_path):
    features, channels, active = 24, 32, 3
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((features, channels))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    plan = make_plan(clips=60, clips_per_shard=20, grid=(4, 8, 8), hooks={"h": channels})
    count = 60 * 256
    strength = np.zeros((count, features))
    chosen = rng.random((count, features)).argsort(axis=1)[:, :active]
    np.put_along_axis(strength, chosen, rng.uniform(1, 2, (count, active)), axis=1)
    x = (strength @ directions + 5).astype(np.float32).reshape(60, 4, 64, channels)
    store = make_store(tmp_path / "s.zarr", plan, {"h": x})
    options = {"lr": 3e-3, "warmup_steps": 20}
    config = configure(
        store, tmp_path / "run", steps=600, batch_tokens=256, window_tokens=4096, optimizer=options,
        sae={"latents": 36, "k": active, "dead_after_tokens": 640}, checkpoint_every=600, eval_every=600,
    )  # fmt: skip
    sae = load_sae(train(config))
    similarity = torch.from_numpy(directions).float() @ nnf.normalize(sae.W_dec, dim=1).T
    assert similarity.max(dim=1).values.mean() > 0.9
    record = load_record(tmp_path / "run")
    assert record.provenance["metrics"]["fvu"] < 0.2


@pytest.mark.parametrize("stop", [1, 7, 8, 21, 29])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_a_run_continued_at_any_step_ends_in_the_same_weights(store, tmp_path, stop, kind):
    sae = {"kind": kind, "k": 4, "dead_after_tokens": 64}
    whole = train(configure(store, tmp_path / "whole", sae=sae)).out
    config = configure(store, tmp_path / "cut", sae=sae, checkpoint_every=1)
    cut_after(config, stop)
    assert same(weights(train(config)), weights(whole))
    # The log of a continued run is the log of an uninterrupted one, save for the clock.
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert any(line.get("auxk") for line in log(tmp_path / "whole")), "no latent died: AuxK went untested"


class Cut(Exception):
    """Stands for a crash in the middle of a run."""


def cut_after(config, steps):
    """Run `config` and crash in step `steps` + 1."""
    learn = SAEGroup.learn

    def learn_or_crash(self, batch, step):
        if step == steps:
            raise Cut
        return learn(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEGroup, "learn", learn_or_crash)
        with pytest.raises(Cut):
            train(config)


def log(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


def test_kill_at_any_moment_then_rerun_gives_the_same_weights(store, tmp_path):
    fields = {"steps": 400, "checkpoint_every": 5, "log_every": 1}
    whole = weights(train(configure(store, tmp_path / "whole", **fields)))
    out = tmp_path / "killed"
    config = configure(store, out, **fields)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", RUN_ONE_THREAD, str(tmp_path / "run.yaml")]
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 4:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seen = steps_logged(out)
        deadline = time.monotonic() + 60
        while process.poll() is None and steps_logged(out) < seen + 40 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "resuming after step" in finished.stderr
    assert same(weights(out), whole)
    assert [line["step"] for line in log(out) if line["kind"] == "train"] == list(range(1, 401))


RUN_ONE_THREAD = """
import sys, torch
torch.set_num_threads(1)
from tubelet.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""


def steps_logged(out):
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def test_held_out_videos_and_failed_clips_are_never_trained_on(store, tmp_path):
    config = configure(store, tmp_path / "run", steps=200)
    run = Run(config, [store], torch.device("cpu"))
    seen = {int(clip) for batch in run.loader for clip in batch.clip.unique()}
    videos = store.clips()["video_id"].to_pylist()
    out = held_out(videos, config.holdout)
    held = {int(clip) for batch in run.heldout for clip in batch.clip.unique()}
    assert seen == set(np.flatnonzero(~out & store.ok()))
    assert held
    assert not {videos[clip] for clip in seen} & {videos[clip] for clip in held}
    assert not {3, 20} & (seen | held)


def test_decoder_rows_keep_unit_norm(finished):
    assert (load_sae(finished).W_dec.norm(dim=1) - 1).abs().max() < 1e-5


def test_what_a_run_leaves(store, finished):
    record = load_record(finished)
    assert record.provenance["store_identity"] == store.identity
    assert record.provenance["hook"] == "h"
    assert record.provenance["holdout"] == {"fraction": 0.2, "seed": 0}
    assert record.provenance["loader"]["step"] == 30
    run = Run(configure(store, finished), [store], torch.device("cpu"))
    assert record.provenance["mixing"] == asdict(measure_mixing(run.loader))
    lines = log(finished)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [5, 10, 15, 20, 25, 30]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [10, 20, 30]
    mixing, first = lines[:2]
    assert mixing == {"kind": "mixing", "step": 0, **record.provenance["mixing"]}
    assert first.keys() >= {"loss", "fvu", "l0", "dead", "auxk", "lr", "grad_norm"}
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "latest",
        "step-00000028",
        "step-00000030",
    ]
    assert not list(finished.rglob("*.tmp"))


def test_a_finished_run_is_not_run_again(store, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("sae.*")}
    train(configure(store, finished))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("sae.*")} == before


def test_lost_export_is_made_again_from_the_last_checkpoint(store, tmp_path):
    out = train(configure(store, tmp_path / "run")).out
    before, lines = weights(out), log(out)
    (out / "sae.json").unlink()
    assert same(weights(train(configure(store, out))), before)
    assert log(out) == lines


def test_another_configuration_is_refused_by_name(store, finished, tmp_path):
    with pytest.raises(TubeletError, match=r"sae\.k: 4 -> 5"):
        train(configure(store, finished, sae={"k": 5, "dead_after_tokens": 64}))
    with pytest.raises(TubeletError, match=r"seed: 0 -> 1"):
        train(configure(store, finished, seed=1))
    other = make_store(tmp_path / "other.zarr", store.plan, seed=5, clips_per_video=2)
    with pytest.raises(TubeletError, match="store identities"):
        train(configure(other, finished))
    with pytest.raises(TubeletError, match="already holds a run"):
        train(configure(store, finished, resume=False))


def test_what_only_shows_or_keeps_may_change(store, tmp_path):
    whole = train(configure(store, tmp_path / "whole")).out
    config = configure(store, tmp_path / "cut")
    cut_after(config, 10)
    other = configure(store, tmp_path / "cut", log_every=2, eval_every=3, checkpoint_every=4, keep_checkpoints=1)
    assert same(weights(train(other)), weights(whole))


def test_an_epoch_ends_with_a_short_batch_so_that_each_token_is_seen_once(store, tmp_path):
    run = Run(configure(store, tmp_path, steps=None, epochs=2), [store], torch.device("cpu"))
    clips = len(run.loader.clips)
    assert run.loader.total_tokens == 2 * clips * 60
    assert sum(len(batch) for batch in run.loader) == 2 * clips * 60


def test_training_that_blows_up_stops_before_a_checkpoint(store, tmp_path):
    config = configure(store, tmp_path / "run", optimizer={"lr": 1e30, "warmup_steps": 0}, checkpoint_every=1)
    with pytest.raises(TubeletError, match=r"Step \d+: .*not finite.*Lower optimizer\.lr"):
        train(config)
    checkpoint = load_latest(tmp_path / "run" / "checkpoints")
    assert checkpoint is None or all(tensor.isfinite().all() for tensor in checkpoint.tensors.values())


def test_checkpoints_read_back_and_old_ones_go(tmp_path):
    for step in (1, 2, 10, 11):
        tensors = {"a": torch.full((3,), float(step)), "b": torch.tensor(step)}
        save_checkpoint(tmp_path, Checkpoint(step, tensors, {"x": [1, None]}), keep=3)
    found = load_latest(tmp_path)
    assert found.step == 11
    assert found.record["x"] == [1, None]
    assert torch.equal(found.tensors["b"], torch.tensor(11))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000010", "step-00000011"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_checkpoint(tmp_path, Checkpoint(3, {"a": torch.ones(3)}, {}), keep=1)
    path = tmp_path / "step-00000003" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TubeletError, match="step-00000003"):
        load_latest(tmp_path)


def test_the_learning_rate_rises_stays_and_falls():
    options = OptimizerConfig(warmup_steps=10, decay_fraction=0.2)
    factors = [options.lr_factor(step, 1000) for step in range(1000)]
    assert np.all(np.diff(factors[:11]) > 0)
    assert factors[10:799] == [1.0] * 789
    assert np.all(np.diff(factors[801:]) < 0)
    assert 0 < factors[-1] < 0.01
    assert 0 < factors[0] < 0.1


def test_mistakes_are_one_clear_line(store, tmp_path, capsys):
    def run(*arguments):
        status = main(["train", *arguments])
        return status, capsys.readouterr().err

    out = ("--out", str(tmp_path / "run"))
    for arguments, words in [
        ((str(tmp_path / "none.zarr"), *out), "No store at"),
        ((store.url, *out, "--hook", "g"), "no hook 'g'"),
        ((store.url, *out, "--sae.expnsion", "4"), "expansion"),
        ((store.url, *out, "--steps", "3", "--epochs", "2"), "give one of steps and epochs"),
        ((store.url, *out, "--block_patches", "4"), "block_patches 4 does not divide"),
        ((store.url, *out, "--holdout.fraction", "0.999999"), "no clip is left to train on"),
    ]:
        status, error = run(*arguments)
        assert status == 2, arguments
        assert words in error
        assert len(error.splitlines()) == 1
    if not torch.cuda.is_available():
        status, error = run(store.url, *out, "--device", "cuda")
        assert status == 2
        assert "no GPU" in error


def test_an_unfinished_store_is_refused(store, tmp_path):
    assert open_store(store.url).complete
    unfinished = tmp_path / "u.zarr"
    from stores import planned_table
    from tubelet_store.store_writer import StoreWriter

    StoreWriter.begin(str(unfinished), make_plan(), planned_table(10), {})
    with pytest.raises(TubeletError, match="unfinished"):
        train(TrainConfig(store=str(unfinished), out=tmp_path / "run"))


BLOCKED = """
import sys

BLOCKED = {"dask", "distributed", "decord", "av", "transformers", "tubelet_pipeline", "tubelet_lens"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
torch.set_num_threads(1)
from tubelet_trainer.sae.sae_files import load_sae
from tubelet_trainer.verbs import TRAIN
from tubelet.config import load_config
from pathlib import Path
config = load_config(TRAIN.config(), Path(sys.argv[1]), {})
assert TRAIN.run(config) == 0
assert load_sae(config.out).latents == 128
"""


def test_trains_where_neither_dask_nor_decoders_nor_transformers_are_installed(store, tmp_path):
    config = configure(store, tmp_path / "run", steps=5)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_the_verb_is_described_without_loading_torch():
    code = (
        "import sys; from tubelet_trainer.verbs import TRAIN; from tubelet.cli.help import usage;"
        "print(usage(TRAIN, True)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for field in ("--store", "--sae.k", "--optimizer.lr", "--holdout.fraction"):
        assert field in done.stdout


def test_holdout_can_be_switched_off(store, tmp_path):
    out = train(configure(store, tmp_path / "run", holdout=HoldoutConfig(fraction=0).model_dump())).out
    assert not [line for line in log(out) if line["kind"] == "eval"]
    assert load_record(out).provenance["metrics"]["fvu"] > 0
