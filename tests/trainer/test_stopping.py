"""A run that is asked to stop, whose folder is locked, or one of whose SAEs diverges loses nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.process_group import ALONE
from tubelet_trainer.run.checkpoint import load_latest
from tubelet_trainer.run.loop import train
from tubelet_trainer.run.run_folder import exclusive
from tubelet_trainer.run.stop_signal import StopRequest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=30, clips_per_shard=8, grid=(4, 3, 4), hooks={"h": 16})
    return make_store(tmp_path_factory.mktemp("stopping") / "s.zarr", plan)


def configure(store, out, **fields):
    tree = {
        "store": store.url, "out": out, "steps": 24, "batch_tokens": 64, "window_tokens": 500, "log_every": 4,
        "sae": {"k": 4, "dead_after_tokens": 128}, "eval_tokens": 128, "checkpoint_every": 1000, "device": "cpu",
        "holdout": {"fraction": 0.1},
    }  # fmt: skip
    return TrainConfig.model_validate({**tree, **fields})


def same(one, other):
    ours, theirs = (load_file(folder / "sae.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


SLOW = """
import signal, sys, time, torch
torch.set_num_threads(1)
# A parent in the background of a script ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tubelet.cli.main import main
from tubelet_trainer.process_group import ALONE
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.run.stop_signal import StopRequest

learn = SAEGroup.learn

def slow(run, batch, step):
    time.sleep(0.02)
    return learn(run, batch, step)

SAEGroup.learn = slow
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_keeps_every_step_it_took(store, tmp_path, number, status):
    fields = {"steps": 300, "log_every": 1}
    whole = train(configure(store, tmp_path / "whole", **fields)).out
    out = tmp_path / "run"
    config = configure(store, out, **fields)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) > 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    # No step that was taken is lost: the last one logged is in the checkpoint, though none was due for long.
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert load_latest(out / "checkpoints").step == steps[-1] < 300
    assert f"stopped after step {steps[-1]} of 300" in said
    assert same(train(config), whole)


def test_a_reader_that_is_gone_costs_no_checkpoint(store, tmp_path):
    """`tubelet train ... 2>&1 | tee log`: Ctrl-C ends tee too."""
    config = configure(store, tmp_path / "run", steps=300, log_every=1)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-c", SLOW, str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) > 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    process.stdout.close()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert load_latest(tmp_path / "run" / "checkpoints").step == steps[-1] < 300


def test_an_ignored_signal_stays_ignored_and_one_that_comes_twice_at_once_is_one(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested(ALONE, torch.device("cpu"))
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested(ALONE, torch.device("cpu"))
        with pytest.raises(SystemExit, match="143"):
            stop.leave(ALONE)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr("tubelet_trainer.run.stop_signal._SAME_WITHIN_S", 0.0)
        with StopRequest().listening():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_folder_is_one_runs_at_a_time(store, tmp_path, capsys):
    out = tmp_path / "run"
    with exclusive(out):
        assert main(["train", store.url, "--out", str(out), "--steps", "2", "--device", "cpu"]) == 2
    assert f"Another process is training into {out}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert main(["train", store.url, "--out", str(out), "--steps", "2", "--device", "cpu"]) == 0


GRID = {"optimizer": {"lr": [1e-3, 1e30], "warmup_steps": [0]}, "sae.seed": [0, 1]}


def test_of_several_saes_one_that_breaks_down_is_set_aside(store, tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = configure(store, out, sweep=GRID, checkpoint_every=8)
    with pytest.raises(TubeletError, match=r"2 of 4 SAEs diverged; the others are complete. Step 4 of lr=1e\+30"):
        train(config)
    names = sorted(path.name for path in out.iterdir() if path.is_dir() and path.name != "checkpoints")
    healthy = [name for name in names if name.startswith("lr=0.001")]
    assert (len(names), len(healthy)) == (4, 2)
    for number, name in enumerate(healthy):
        alone = configure(
            store, tmp_path / name, sae={"k": 4, "dead_after_tokens": 128, "seed": number},
            optimizer={"lr": 1e-3, "warmup_steps": 0},
        )  # fmt: skip
        assert same(out / name, train(alone))
    assert not any((out / name / "sae.json").exists() for name in set(names) - set(healthy))
    # The same command trains nothing more, and says it again; so does one that continues.
    monkeypatch.setattr(SAEGroup, "learn", None)
    with pytest.raises(TubeletError, match="2 of 4 SAEs diverged"):
        train(config)
    monkeypatch.undo()
    before = {name: load_file(out / name / "sae.safetensors") for name in healthy}
    (out / "checkpoints" / "latest").write_text("step-00000016")
    for name in healthy:
        (out / name / "sae.json").unlink()
    with pytest.raises(TubeletError, match="2 of 4 SAEs diverged"):
        train(config)
    for name, tensors in before.items():
        found = load_file(out / name / "sae.safetensors")
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_where_all_saes_break_down_the_run_stops(store, tmp_path):
    sweep = {"optimizer.lr": [1e29, 1e30]}
    config = configure(store, tmp_path / "run", sweep=sweep, optimizer={"warmup_steps": 0}, checkpoint_every=1)
    with pytest.raises(TubeletError, match=r"2 of 2 SAEs diverged\. .*lr=1e\+29.*lr=1e\+30.*Lower optimizer\.lr"):
        train(config)


def test_a_run_continues_where_its_stores_have_moved(store, tmp_path):
    other = make_store(tmp_path / "other.zarr", make_plan(clips=10, grid=(4, 3, 4), hooks={"h": 16}), seed=9)
    whole = train(configure(store, tmp_path / "whole", mix={other.url: 0.25})).out
    out = tmp_path / "run"
    train(configure(store, out, mix={other.url: 0.25}, checkpoint_every=8))
    (out / "checkpoints" / "latest").write_text("step-00000016")
    (out / "sae.json").unlink()
    moved = tmp_path / "moved" / "else.zarr"
    shutil.copytree(other.url, moved)
    shutil.rmtree(other.url)
    assert same(train(configure(store, out, mix={str(moved): 0.25})), whole)
    twin = make_store(tmp_path / "twin.zarr", make_plan(clips=10, grid=(4, 3, 4), hooks={"h": 16}), seed=10)
    with pytest.raises(TubeletError, match="store identities"):
        train(configure(store, out, mix={twin.url: 0.25}))
