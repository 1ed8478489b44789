"""Laws of what a training run can do beside stepping: it repeats with everything on, stops early, is tracked."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.run import trackers
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.sae_files import load_record, load_sae


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=40, clips_per_shard=8, grid=(4, 3, 5), hooks={"h": 16})
    return make_store(tmp_path_factory.mktemp("training") / "s.zarr", plan, failed=(3,), clips_per_video=2)


def configure(store, out, **fields):
    tree = {
        "store": store.url,
        "out": out,
        "steps": 40,
        "batch_tokens": 64,
        "window_tokens": 512,
        "log_every": 5,
        "eval_every": 10,
        "eval_tokens": 256,
        "checkpoint_every": 7,
        "holdout": {"fraction": 0.2},
        "device": "cpu",
        "optimizer": {"lr": 3e-3},
    }
    return TrainConfig.model_validate({**tree, **fields})


def log(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines]


class Cut(Exception):
    """Stands for a crash in the middle of a run."""


def cut_after(config, steps):
    learn = SAEGroup.learn

    def learn_or_crash(self, batch, step):
        if step == steps:
            raise Cut
        return learn(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEGroup, "learn", learn_or_crash)
        with pytest.raises(Cut):
            train(config)


ON = {"ema": 0.9, "resample_every": 8, "lr": 3e-3}
EVERYTHING = {
    "topk, whitened, from data": {
        "kind": "topk", "k": 4, "dead_after_tokens": 128, "k_anneal_steps": 15, "nesting": {"kind": "ks"},
        "init": {"directions": "data", "bias": "geometric_median"}, "normalization": {"whitening": "zca"},
    },
    "batchtopk, random prefixes": {
        "kind": "batchtopk", "k": 4, "dead_after_tokens": 128, "init": {"directions": "active_subspace"},
        "nesting": {"kind": "random", "prefixes": 4, "sort_every": 7},
    },
    "relu, controlled": {"kind": "relu", "target_l0": 4, "dead_after_tokens": 128, "auxk": 8},
    "jumprelu, controlled": {"kind": "jumprelu", "target_l0": 4, "dead_after_tokens": 128},
    "gated": {"kind": "gated", "dead_after_tokens": 128, "nesting": {"kind": "groups"}},
    "abstopk, hierarchical": {"kind": "abstopk", "k": 4, "dead_after_tokens": 128, "nesting": {"kind": "hierarchical"}},
}  # fmt: skip


@pytest.mark.parametrize("sae", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_with_everything_on_a_continued_run_ends_in_the_same_weights(store, tmp_path, sae):
    whole = train(configure(store, tmp_path / "whole", sae=sae, optimizer=ON)).out
    config = configure(store, tmp_path / "cut", sae=sae, optimizer=ON, checkpoint_every=1)
    cut_after(config, 18)
    out = train(config).out
    ours, theirs = (load_file(folder / "sae.safetensors") for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log(out) == log(whole)
    state = load_file(whole / "checkpoints" / "step-00000040" / "state.safetensors")
    found = {part.split("/")[-2] if "ema" in part else part for part in state}
    assert any("ema" in name for name in state), found
    if "target_l0" in sae:
        gains = [tensor for name, tensor in state.items() if name.endswith("log_gain")]
        assert len(gains) == 1
        assert gains[0] != 0


def test_evaluation_and_export_use_the_running_mean(store, tmp_path):
    fields = {"sae": {"k": 4}, "optimizer": {**ON, "ema": 0.5}}
    out = train(configure(store, tmp_path / "run", **fields)).out
    state = load_file(out / "checkpoints" / "step-00000040" / "state.safetensors")
    mean = next(tensor for name, tensor in state.items() if name.endswith("ema/W_enc"))
    assert torch.equal(load_sae(out).W_enc.detach(), mean)
    last = next(line for line in reversed(log(out)) if line["kind"] == "eval")
    assert math.isclose(last["fvu"], load_record(out).provenance["metrics"]["fvu"])


@pytest.mark.parametrize(
    ("sae", "words"),
    [
        (
            {"kind": "relu", "sparsity": 1e4, "sparsity_warmup_steps": 0},
            r"(dead|No latent is active).*Lower sae\.sparsity",
        ),
        ({"kind": "topk", "k": 4, "nesting": {"kind": "flat"}}, r"(not finite|diverges).*Lower optimizer\.lr"),
    ],
)
def test_a_lost_run_stops_with_a_remedy(store, tmp_path, sae, words):
    lr = 3.0 if sae["kind"] == "relu" else 1e4
    config = configure(store, tmp_path / "run", steps=400, sae=sae, optimizer={"lr": lr, "warmup_steps": 0})
    with pytest.raises(TubeletError, match=words):
        train(config)


def test_the_start_of_a_run_prints_the_offset_of_its_tokens(store, tmp_path, capsys):
    train(configure(store, tmp_path / "run", steps=2, sae={"k": 4}))
    assert "standard deviations from the origin; tokens are centered" in capsys.readouterr().err


def test_bfloat16_learns_about_the_same(store, tmp_path):
    fvu = {}
    for precision in ("float32", "bfloat16"):
        out = train(configure(store, tmp_path / precision, sae={"k": 4}, precision=precision)).out
        fvu[precision] = load_record(out).provenance["metrics"]["fvu"]
        assert load_sae(out).W_enc.dtype == torch.float32
    assert abs(fvu["bfloat16"] - fvu["float32"]) < 0.02
    assert fvu["bfloat16"] != fvu["float32"]


def test_tensorboard_gets_what_the_jsonl_gets(store, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = configure(store, tmp_path / "run", sae={"k": 4}, tracker={"kind": "tensorboard"})
    cut_after(config, 17)
    out = train(config).out
    events = event_accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    lines = log(out)
    for kind in ("train", "eval"):
        found = {event.step: event.value for event in events.Scalars(f"{kind}/fvu")}
        expected = {line["step"]: line["fvu"] for line in lines if line["kind"] == kind}
        assert found.keys() == expected.keys()
        assert all(math.isclose(found[step], expected[step], rel_tol=1e-5) for step in found)


class Recorder(types.ModuleType):
    """A library that writes down what it is asked."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.id = "run-1"
        self.info = types.SimpleNamespace(run_id="run-1")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def asked(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.mark.parametrize(("kind", "write"), [("wandb", "log"), ("mlflow", "log_metrics")])
def test_other_trackers_get_the_same(store, tmp_path, monkeypatch, kind, write):
    """Against a recorder of the calls; the libraries themselves have a test below, where they are installed."""
    library = Recorder(kind)
    monkeypatch.setitem(sys.modules, kind, library)
    config = configure(store, tmp_path / "run", sae={"k": 4}, tracker={"kind": kind, "name": "a"}, checkpoint_every=5)
    cut_after(config, 17)
    out = train(config).out
    steps = [
        (next(iter(values)) if kind == "mlflow" else list(values)[1]).split("/")[0]
        + f"-{kwargs.get('step', values.get('step'))}"
        for (values,), kwargs in library.asked(write)
    ]
    assert steps == [f"{line['kind']}-{line['step']}" for line in log(out)]
    starts = library.asked("init" if kind == "wandb" else "start_run")
    assert [kwargs.get("id", kwargs.get("run_id")) for _, kwargs in starts] == [None, "run-1"]
    assert len(library.asked("finish" if kind == "wandb" else "end_run")) == 2


def test_settings_of_a_tracker_reach_its_library(store, tmp_path, monkeypatch):
    wandb, mlflow = Recorder("wandb"), Recorder("mlflow")
    for library in (wandb, mlflow):
        monkeypatch.setitem(sys.modules, library.__name__, library)
    fields = {"steps": 2, "sae": {"k": 4}}
    tracker = {"kind": "wandb", "project": "p", "name": "n", "mode": "offline"}
    train(configure(store, tmp_path / "wandb", **fields, tracker=tracker))
    tracker = {"kind": "mlflow", "uri": "http://u", "experiment": "e", "name": "n"}
    train(configure(store, tmp_path / "mlflow", **fields, tracker=tracker))
    ((_, given),) = wandb.asked("init")
    assert {name: given[name] for name in ("project", "name", "mode")} == {
        "project": "p",
        "name": "n",
        "mode": "offline",
    }
    assert mlflow.asked("set_tracking_uri") == [(("http://u",), {})]
    assert mlflow.asked("set_experiment") == [(("e",), {})]
    assert mlflow.asked("start_run") == [((), {"run_id": None, "run_name": "n"})]


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_the_libraries_themselves_take_it(store, tmp_path, kind):
    pytest.importorskip(kind)
    tracker = {"wandb": {"mode": "offline"}, "mlflow": {"uri": str(tmp_path / "mlruns")}}[kind]
    # Newer MLflow writes to folders only when told to.
    environment = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"}
    config = configure(store, tmp_path / "run", steps=10, sae={"k": 4}, tracker={"kind": kind, **tracker})
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    code = "import sys; from tubelet.cli.main import main; sys.exit(main(['train', sys.argv[1]]))"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run.yaml")],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_tracker_is_one_clear_line_before_training(store, tmp_path, monkeypatch, kind):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers, "import_module", missing)
    config = configure(store, tmp_path / "run", sae={"k": 4}, tracker={"kind": kind})
    with pytest.raises(TubeletError, match=f"needs {kind}.*pip install {kind}"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_cannot_be_opened_is_one_clear_line(store, tmp_path, monkeypatch):
    class NoKey:
        @staticmethod
        def init(**_):
            raise ConnectionError("No API key configured.\nA second line.")

    monkeypatch.setattr(trackers, "import_module", lambda name: NoKey)
    config = configure(store, tmp_path / "run", sae={"k": 4}, tracker={"kind": "wandb"})
    with pytest.raises(
        TubeletError, match=r"wandb cannot be opened: ConnectionError: No API key configured\. .*offline"
    ):
        train(config)


def test_a_run_that_has_not_learned_says_so(store, tmp_path, capsys):
    # An encoder as it starts, all of whose latents may be active.
    train(configure(store, tmp_path / "run", steps=4, sae={"kind": "relu"}, optimizer={"lr": 1e-9}))
    said = capsys.readouterr().err
    assert "is worse than predicting the mean (FVU 1)" in said
    assert "only 4 steps" in said


def test_batchtopk_keeps_k_on_held_out_tokens_after_a_short_run(tmp_path):
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((256, 32))
    strength = (generator.random((40 * 256, 256)) < 0.05) * generator.exponential(1, (40 * 256, 256))
    x = (strength @ directions + 3).astype(np.float32).reshape(40, 4, 64, 32)
    store = make_store(tmp_path / "s.zarr", make_plan(clips=40, grid=(4, 8, 8), hooks={"h": 32}), {"h": x})
    sae = {"kind": "batchtopk", "k": 16}
    out = train(configure(store, tmp_path / "run", steps=200, batch_tokens=256, window_tokens=2048, sae=sae)).out
    assert abs(load_record(out).provenance["metrics"]["l0"] - 16) < 1.6


def test_what_is_not_defined_is_null_and_named(store, tmp_path):
    """The last batch has one token: it does not differ from its mean."""
    fields = {"steps": None, "tokens": 5 * 64 + 1, "sae": {"k": 4}, "holdout": {"fraction": 0}, "log_every": 1}
    out = train(configure(store, tmp_path / "run", **fields, tracker={"kind": "tensorboard"})).out
    text = (out / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    _, *others, last = log(out)
    assert last["fvu"] is None
    assert last["undefined"] == ["fvu"]
    assert last["l0"] == 4
    assert all("undefined" not in line and line["fvu"] > 0 for line in others)
    assert load_record(out).provenance["metrics"]["fvu"] is None


def test_a_run_without_held_out_videos_killed_after_its_last_checkpoint_is_finished(store, tmp_path):
    fields = {"sae": {"k": 4}, "holdout": {"fraction": 0}}
    whole = train(configure(store, tmp_path / "whole", **fields)).out
    config = configure(store, tmp_path / "cut", **fields)
    out = train(config).out
    # Killed between the last checkpoint and the export: no step is left, and no evaluation to report.
    for name in ("sae.json", "sae.safetensors"):
        (out / name).unlink()
    assert train(config).out == out
    ours, theirs = (load_file(folder / "sae.safetensors") for folder in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log(out) == log(whole)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_run_learns_the_same(store, tmp_path):
    outs = [train(configure(store, tmp_path / str(on), steps=12, sae={"k": 4}, compile=on)) for on in (False, True)]
    ours, theirs = (load_file(out / "sae.safetensors") for out in outs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)


def test_steps_that_cannot_be_repeated_are_refused(store, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(TubeletError, match="cuda_graphs needs a GPU"):
            train(configure(store, tmp_path / "run", cuda_graphs=True))
    sae = {"kind": "relu", "nesting": {"kind": "random"}}
    with pytest.raises(TubeletError, match="another shape in every step"):
        train(configure(store, tmp_path / "run", sae=sae, compile=True))
