"""Makes the files that `test_written_before.py` reads: stores, catalogue, trained SAEs, checkpoints, digests.

They were made once, at commit 274ddd9, before the packages were regrouped, on the machine that `expected.json` names:

    git checkout 274ddd9
    python tests/baseline/make.py

They are not made again: what is tested is that later versions read what this one wrote, and compute what it computed.
Stores are of format 1. The script is kept to tell how; it need not run with later versions.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from recorded import (
    BFLOAT16,
    CASES,
    CATALOG,
    ENCODED,
    EXPECTED,
    EXTRACTED,
    GROUP,
    HERE,
    INTERRUPTED_AFTER,
    INTERRUPTED_RUNS,
    KINDS,
    MERGED,
    PLAIN,
    STORES,
    TRAINED,
    array_digest,
    column_digests,
    machine,
    results,
    train_config,
    write_config,
)
from tubelet_store.cli import main

from stores import make_plan, make_store, planned_table
from tubelet_store import Grid, open_store
from tubelet_store.plan import TokenSelection
from tubelet_trainer import load_sae
from tubelet_trainer.run import Run


def tubelet(*arguments: str) -> None:
    """Run a verb."""
    if status := main(list(arguments)):
        raise SystemExit(f"tubelet {' '.join(arguments)} ended with status {status}")


def made_up(clips: int, grid: tuple[int, int, int], hooks: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Activations with something to learn: sparse sums of directions, which last through time, beside noise."""
    rng = np.random.default_rng(seed)
    time, tokens = grid[0], grid[1] * grid[2]
    found = {}
    for number, (hook, channels) in enumerate(hooks.items()):
        # The same directions in every store.
        directions = np.random.default_rng(100 + number).standard_normal((20, channels))
        lasting = rng.random((clips, 1, tokens, 20)) < 0.1
        strength = lasting * rng.uniform(1, 2, (clips, time, tokens, 20))
        x = strength @ directions + 0.1 * rng.standard_normal((clips, time, tokens, channels)) + 0.5
        found[hook] = x.astype(np.float32)
    return found


def make_stores(work: Path) -> None:
    """Four stores below `stores`."""
    grid, hooks = (3, 3, 4), {"blocks.1": 8, "blocks.3": 12}
    plan = make_plan(
        clips=26, clips_per_shard=9, grid=grid, hooks=hooks, special_tokens=("cls", "register.0"), special_time=3
    )
    make_store(Path(PLAIN), plan, made_up(26, grid, hooks, 0), failed=(3, 20), clips_per_video=2)

    hooks = {"blocks.1": 8}
    kept = TokenSelection(kind="patches", grid=Grid(time=3, height=3, width=4), seed=5)
    plan = make_plan(clips=18, clips_per_shard=7, grid=(3, 1, 12), hooks=hooks, dtype="bfloat16", tokens=kept)
    make_store(Path(BFLOAT16), plan, made_up(18, (3, 1, 12), hooks, 1), failed=(0,))

    table = planned_table(20)
    for number in range(2):
        plan = make_plan(clips=10, clips_per_shard=4, grid=grid, hooks=hooks)
        plan = plan.model_copy(update={"clip_table": f"sha256:part-{number}"})
        part = planned_table(10).set_column(1, "video_id", table["video_id"].slice(10 * number, 10))
        make_store(work / f"part-{number}", plan, made_up(10, grid, hooks, 2 + number), failed=(7,), table=part)
    tubelet("merge", str(work / "part-0"), str(work / "part-1"), "--out", MERGED)

    # From real videos: what an extraction notes of sampling, pixels, backbone and decoder.
    here = Path.cwd()
    os.chdir(work)
    tubelet("videos", "ssv2", "--videos", "32")
    settings = {
        "dataset": {"kind": "ssv2", "root": "ssv2", "split": "validation", "limit": 8},
        "sampling": {"kind": "dense", "frames": 16, "stride": 3},
        "backbone": {"id": "videomae-tiny"},
        "hooks": ["blocks.2"],
        "tokens": {"kind": "pooled", "height": 2, "width": 2, "time": 4},
        "store": "extracted",
    }
    tubelet("extract", write_config(Path("extract.yaml"), settings))
    os.chdir(here)
    shutil.copytree(work / "extracted", EXTRACTED)


def describe_stores() -> dict[str, Any]:
    """What readers find in each."""
    found = {}
    for name in STORES:
        store = open_store(name)
        hooks = [hook.name for hook in store.plan.hooks]
        found[name] = {
            "identity": store.identity,
            "plan_digest": store.plan.digest,
            "clips": column_digests(store.clips()),
            "ok": int(store.ok().sum()),
            "activations": {hook: array_digest(np.asarray(store[hook][:]).view(np.uint16)) for hook in hooks},
            "mean": {hook: store.moments(hook).mean.tolist() for hook in hooks},
            "count": {hook: store.moments(hook).count for hook in hooks},
        }
        if store.plan.special_tokens:
            special = {hook: np.asarray(store.special_tokens(hook)[:]) for hook in hooks}
            found[name]["special_tokens"] = {hook: array_digest(x.view(np.uint16)) for hook, x in special.items()}
    return found


def make_catalog() -> None:
    """A catalogue with a replaced name, a name that is not pinned, and a nested catalogue."""
    owner = ["--owner", "Nobody in particular", "--licence", "CC-BY-4.0"]
    tubelet("catalog", "add", "plain", PLAIN, "--description", "Made up, 2 hooks: a test", *owner)
    tubelet("catalog", "add", "newest", MERGED)
    tubelet("catalog", "add", "newest", EXTRACTED, "--replace", "true", *owner)
    tubelet("catalog", "add", "unpinned", BFLOAT16, "--pin", "false")
    tubelet("catalog", "add", "inside", MERGED, "--catalog", "nested.yaml")
    tubelet("catalog", "add", "nested", "nested.yaml", "--description", "Another catalogue")


def make_runs(work: Path) -> dict[str, Any]:
    """A trained group of SAEs, two interrupted runs; how the latter end."""
    tubelet("train", write_config(work / "trained.yaml", train_config(GROUP, Path(TRAINED), Path())))
    shutil.rmtree(Path(TRAINED) / "checkpoints")
    learn = Run.learn

    def learn_or_crash(run: Run, batch: Any, step: int) -> Any:
        if step == INTERRUPTED_AFTER:
            raise ConnectionAbortedError("stands for a crash")
        return learn(run, batch, step)

    found = {}
    for name, case in INTERRUPTED_RUNS.items():
        config = train_config(case, Path(name), Path(), checkpoint_every=INTERRUPTED_AFTER)
        written = write_config(work / f"{name}.yaml", config)
        try:
            with mock.patch.object(Run, "learn", learn_or_crash):
                main(["train", written])
        except ConnectionAbortedError:
            pass
        (Path(name) / ".lock").unlink(missing_ok=True)
        whole, continued = work / "whole" / name, work / "continued" / name
        tubelet("train", write_config(work / "whole.yaml", {**config, "out": str(whole)}))
        shutil.copytree(name, continued)
        tubelet("train", write_config(work / "continued.yaml", {**config, "out": str(continued)}))
        found[name] = ends = results(continued)
        if ends != results(whole):
            raise SystemExit(f"{name}: an interrupted run ends otherwise than a whole one")
    return found


def encode() -> dict[str, np.ndarray]:
    """Codes and reconstructions of the first clip's tokens by each trained SAE."""
    store, found = open_store(PLAIN), {}
    for entry in KINDS:
        sae = load_sae(Path(TRAINED) / entry["name"])
        x = torch.from_numpy(np.asarray(store[entry.get("hook", "blocks.1")][0], np.float32)).flatten(0, 1)
        found[f"{entry['name']} codes"] = sae.encode(x).numpy()
        found[f"{entry['name']} reconstruction"] = sae(x).numpy()
    return found


def main_() -> None:
    """Make everything anew."""
    torch.set_num_threads(1)
    os.chdir(HERE)
    for path in ("stores", TRAINED, *INTERRUPTED_RUNS):
        shutil.rmtree(path, ignore_errors=True)
    for path in (CATALOG, "nested.yaml"):
        Path(path).unlink(missing_ok=True)
    Path("stores").mkdir()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_stores(work)
        make_catalog()
        resumed = make_runs(work)
        trained = {}
        for name, case in CASES.items():
            tubelet("train", write_config(work / f"{name}.yaml", train_config(case, work / name, Path())))
            trained[name] = results(work / name)["."]
    of_weights = {tuple(found["weights"]): name for name, found in trained.items()}
    if missing := CASES.keys() - set(of_weights.values()):
        raise SystemExit(f"These options change nothing: {', '.join(sorted(missing))}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    expected = {
        "commit": commit,
        "machine": machine(),
        "stores": describe_stores(),
        "trained": results(Path(TRAINED)),
        "resumed": resumed,
        "cases": trained,
    }
    EXPECTED.write_text(json.dumps(expected, indent=0) + "\n")
    np.savez_compressed(ENCODED, **encode())


if __name__ == "__main__":
    main_()
