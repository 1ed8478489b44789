"""Laws of training with several processes (gloo, on the CPU): the same as one, up to rounding."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.checkpoint import load_latest
from tubelet_trainer.run.loop import train

BATCH, STEPS = 64, 12

# The last batch has one token: nothing is left for the second rank.
TOKENS = BATCH * STEPS + 1

SPLIT_BATCH = {
    "topk": {"sae": {"k": 4}},
    "batchtopk": {"sae": {"kind": "batchtopk", "k": 4}},
    "both": {"sae": {"kind": "batchtopk", "k": 4}, "objective": {"lambda_t": 0.3, "lambda_s": 0.1, "codes": "post"}},
    "slow": {"sae": {"k": 4}, "objective": {"lambda_smooth": 0.1, "lambda_slow": 0.5, "codes": "prefix"}},
    "groups": {"sae": {"k": 4, "nesting": {"kind": "groups"}}, "optimizer": {"ema": 0.9}},
    "jumprelu": {"sae": {"kind": "jumprelu"}},
    "gated": {"sae": {"kind": "gated"}},
    "relu": {"sae": {"kind": "relu", "init": {"directions": "data"}, "target_l0": 4}},
    "signed": {"sae": {"kind": "abstopk", "k": 4, "nesting": {"kind": "hierarchical"}}},
    "random": {"sae": {"kind": "batchtopk", "k": 4, "nesting": {"kind": "random", "sort_every": 5}}},
    "resampled": {"sae": {"k": 4}, "optimizer": {"resample_every": 5}},
}
SPLIT_LATENTS = {name: SPLIT_BATCH[name] for name in ("topk", "batchtopk")}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=30, clips_per_shard=8, grid=(4, 3, 4), hooks={"h": 16})
    return make_store(tmp_path_factory.mktemp("ranks") / "s.zarr", plan)


def configure(store, out, listed, **fields):
    tree = {
        "store": store.url, "out": out, "tokens": TOKENS, "batch_tokens": BATCH, "window_tokens": 500, "device": "cpu",
        "sae": {"latents": 96, "dead_after_tokens": 128}, "log_every": 1, "eval_every": 10, "eval_tokens": 128,
        "checkpoint_every": 6, "holdout": {"fraction": 0.1}, "pairs": {"anchors": 33}, "block_patches": 12,
        "saes": [{"name": name, **spec} for name, spec in listed.items()], "optimizer": {"warmup_steps": 1},
    }  # fmt: skip
    return TrainConfig.model_validate({**tree, **fields})


CODE = """
import sys, torch
torch.set_num_threads(1)
from tubelet.cli.main import main
from tubelet_trainer.optim.sae_group import SAEGroup

learn, steps = SAEGroup.learn, []

def counted(run, batch, step):
    steps.append((step, batch.whole))
    return learn(run, batch, step)

SAEGroup.learn = counted
code = main(["train", sys.argv[1]])
print(len(steps), steps[-1])
sys.exit(code)
"""


def start_ranks(config, folder, ranks, code):
    """Processes that train."""
    path = folder / "ranks.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(ranks)
    ]


def train_on_ranks(config, folder, ranks=2):
    """What every process prints; all must have taken the same steps."""
    processes = start_ranks(config, folder, ranks, CODE)
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = "\n".join(f"--- rank {rank}\n{error}" for rank, (_, error) in enumerate(outputs))
    assert [process.returncode for process in processes] == [0] * ranks, said
    # The first one prints its results before.
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1, outputs
    return outputs


def assert_equal_up_to_rounding(one, other, names):
    for name in names:
        mine, theirs = (load_file(folder / name / "sae.safetensors") for folder in (one, other))
        assert mine.keys() == theirs.keys()
        for key in mine:
            torch.testing.assert_close(
                mine[key], theirs[key], rtol=1e-3, atol=2e-5, msg=lambda m, k=key, n=name: f"{n} {k}: {m}"
            )
        logs = [
            [json.loads(line) for line in (f / name / "metrics.jsonl").read_text().splitlines()] for f in (one, other)
        ]
        for a, b in zip(*logs, strict=True):
            assert a.keys() == b.keys()
            undefined = a.get("undefined", [])
            assert undefined == b.get("undefined", [])
            for key in a.keys() - {"tokens_per_s", "kind", "undefined", *undefined}:
                assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), (name, a["step"], key)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    return train(configure(store, tmp_path_factory.mktemp("alone") / "run", SPLIT_BATCH)).out


def test_ranks_that_split_the_batch_equal_train(store, alone, tmp_path):
    outputs = train_on_ranks(configure(store, tmp_path / "run", SPLIT_BATCH), tmp_path)
    assert_equal_up_to_rounding(alone, tmp_path / "run", SPLIT_BATCH)
    assert load_latest(tmp_path / "run" / "checkpoints").step == STEPS + 1
    assert f"{STEPS + 1} ({STEPS}, 1)" in outputs[1][0]
    # Only the first reports.
    assert "clips to train on" in outputs[0][1]
    assert "clips to train on" not in outputs[1][1]


def test_a_batch_that_does_not_divide_into_ranks_is_shared_all_the_same(store, alone, tmp_path):
    some = {name: SPLIT_BATCH[name] for name in ("batchtopk", "both", "resampled")}
    outputs = train_on_ranks(configure(store, tmp_path / "run", some), tmp_path, ranks=3)
    assert_equal_up_to_rounding(alone, tmp_path / "run", some)
    assert f"{STEPS + 1} ({STEPS}, 1)" in outputs[2][0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_split_the_dictionary_equal_train(store, alone, tmp_path, ranks):
    train_on_ranks(configure(store, tmp_path / "run", SPLIT_LATENTS, parallel="dictionary"), tmp_path, ranks)
    assert_equal_up_to_rounding(alone, tmp_path / "run", SPLIT_LATENTS)


@pytest.mark.parametrize("begin", [1, 2])
@pytest.mark.parametrize("parallel", ["data", "dictionary"])
def test_a_run_is_continued_by_another_number_of_processes(store, tmp_path, parallel, begin):
    whole = train(configure(store, tmp_path / "whole", SPLIT_LATENTS)).out
    out = tmp_path / "run"
    config = configure(store, out, SPLIT_LATENTS, parallel=parallel)
    train(config) if begin == 1 else train_on_ranks(config, tmp_path)
    # Forget the second half.
    (out / "checkpoints" / "latest").write_text("step-00000012")
    for name in SPLIT_LATENTS:
        (out / name / "sae.json").unlink()
    train_on_ranks(config, tmp_path) if begin == 1 else train(config)
    assert_equal_up_to_rounding(whole, out, SPLIT_LATENTS)


SLOW = CODE.replace("    return learn", "    time.sleep(0.02)\n    return learn").replace(
    "import sys", "import time, sys"
)

# As slow as a disk may be: no rank may end before the first one has written.
SLOW_DISK = SLOW.replace(
    "code = main",
    """
import tubelet_trainer.run.loop as loop
save = loop.save_checkpoint

def slow_save(*arguments):
    time.sleep(1.5)
    save(*arguments)

loop.save_checkpoint = slow_save
code = main""",
)


def test_ranks_that_are_stopped_leave_a_checkpoint_together(store, tmp_path):
    fields = {"tokens": 400 * BATCH, "checkpoint_every": 10_000, "log_every": 2}
    some = {"topk": SPLIT_BATCH["topk"]}
    out = tmp_path / "run"
    config = configure(store, out, some, **fields)
    processes = start_ranks(config, tmp_path, 2, SLOW_DISK)
    log, deadline = out / "topk" / "metrics.jsonl", time.monotonic() + 60
    while not (log.is_file() and len(log.read_text().splitlines()) > 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    # A launcher passes on to all what it got, and ends all when one has ended.
    for process in processes:
        process.send_signal(signal.SIGTERM)
    while all(process.poll() is None for process in processes):
        time.sleep(0.01)
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    # The last signal may come while an interpreter shuts down.
    assert 143 in codes, said
    assert set(codes) <= {143, -signal.SIGTERM}, said
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert load_latest(out / "checkpoints").step == steps[-1] < 400


def test_what_a_split_dictionary_cannot_do_is_named(store, tmp_path):
    from tubelet.errors import TubeletError
    from tubelet_trainer.process_group import ProcessGroup
    from tubelet_trainer.run.training_run import Run

    def run(spec):
        config = configure(store, tmp_path / "run", {"a": spec}, parallel="dictionary")
        return Run(config, [store], torch.device("cpu"), ProcessGroup(0, 5))

    with pytest.raises(TubeletError, match=r"objective\.lambda_t"):
        run({"objective": {"lambda_t": 1}})
    with pytest.raises(TubeletError, match="JumpReLU"):
        run({"sae": {"kind": "jumprelu"}})
    with pytest.raises(TubeletError, match="96 latents do not divide into 5"):
        run({})
