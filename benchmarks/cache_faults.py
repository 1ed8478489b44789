"""At least a thousand faults between a store and its readers: does a wrong byte come through?

    python benchmarks/cache_faults.py [--out benchmarks/results/cache_faults.txt] [--faults 1000]

An S3 server on loopback holds a store; a proxy in front of it spoils reads (tests/faulty_proxy.py). Eight processes
share one cache whose budget is twelve shards of eighty, map shards at random and compare every byte with the original.
A read that fails must name its object; it is tried again later, as a user would. Then eight processes train through one
such cache, over the same proxy; each must end with the weights that the same training from the local store gives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faulty_proxy import KINDS, FaultyProxy, faulty_proxy
from goals import Goal, goal_lines
from object_server import create_bucket, s3_environment, s3_server
from stores import make_plan, make_store
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.reader import Store
from tubelet_store.storage import open_root
from tubelet_store.storage.local import LocalRoot

PROCESSES = 8
SHARDS_IN_BUDGET = 12
SHARE = 0.5
TIMEOUT_S = 0.8
LONGEST_S = 170

READER = """
import sys
from pathlib import Path
import numpy as np
import tubelet_store.storage.client as client_module
from tubelet.errors import TubeletError
from tubelet_store.reader import open_store
from tubelet_store.reader import Store
from tubelet_store.cache import CacheConfig
client_module._FIRST_WAIT_S = 0.02
folder, budget, local, seed, timeout_s, client = sys.argv[1:]
cache = CacheConfig(
    directory=Path(folder), budget=int(budget), timeout_s=float(timeout_s), client=client, attempts=8
)
truth, rng = open_store(local), np.random.default_rng(int(seed))
store = open_store("s3://bucket/s.zarr", cache=cache)
while True:
    shard = int(rng.integers(store.plan.shards))
    store.prefetch("h", [shard, *rng.integers(0, store.plan.shards, 2)])
    try:
        mapped = store.shard_map("h", shard)
    except TubeletError as error:
        named = f"activations/h/c/{shard}/0/0/0" in str(error)
        print("named" if named else f"unnamed: {error}", flush=True)
        continue
    right = mapped.tobytes() == truth.shard_map("h", shard).tobytes()
    print("right" if right else f"WRONG {shard}", flush=True)
    del mapped
"""

TRAINER = """
import sys
import torch
torch.set_num_threads(1)
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train
import tubelet_store.storage.client as client_module
client_module._FIRST_WAIT_S = 0.02
train(TrainConfig.model_validate_json(sys.argv[1]))
"""
TRAINING_SHARE = 0.25


def training(store: str, out: Path, seed: int, cache: dict[str, object] | None = None) -> subprocess.Popen[bytes]:
    """A process that trains a small SAE for one epoch of 80 steps."""
    settings = {
        "store": store,
        "out": str(out),
        "seed": seed,
        "epochs": 1,
        "batch_tokens": 256,
        "window_tokens": 1024,
        "resident_shards": 4,
        "sae": {"k": 4},
        "holdout": {"fraction": 0.0},
        "eval_every": 1000,
        "device": "cpu",
        **({"cache": cache} if cache else {}),
    }
    log = out.with_suffix(".log").open("w")
    return subprocess.Popen([sys.executable, "-c", TRAINER, json.dumps(settings)], stdout=log, stderr=log)


def same_weights(one: Path, other: Path) -> bool:
    """Both runs ended, with the same bits."""
    files = [out / "sae.safetensors" for out in (one, other)]
    return all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def train_through_faults(folder: Path, proxy: FaultyProxy, local: Store, budget: int) -> tuple[int, int, int]:
    """Eight trainings at once through one cache: how many ended, how many with the right weights, most bytes held."""
    proxy.share = TRAINING_SHARE
    directory = folder / "trainers"
    # Longer than a stall: eight starting interpreters keep a server waiting, and waiting is no fault.
    cache: dict[str, object] = {"directory": str(directory), "budget": budget, "timeout_s": 25 * TIMEOUT_S}
    running = [training("s3://bucket/s.zarr", folder / f"remote-{seed}", seed, cache) for seed in range(PROCESSES)]
    watch, most = LocalCache("s3://bucket/s.zarr", CacheConfig(directory=directory)), 0
    while any(job.poll() is None for job in running):
        most = max(most, watch.held_bytes())
        time.sleep(0.05)
    proxy.share = 0.0
    ended = sum(job.returncode == 0 for job in running)
    right = 0
    for seed in range(PROCESSES):
        training(local.url, folder / f"local-{seed}", seed).wait()
        right += same_weights(folder / f"remote-{seed}", folder / f"local-{seed}")
    return ended, right, most


def run() -> int:
    """The campaign; 0 if every process read, and nothing wrong came through."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--faults", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tubelet-faults-") as name, s3_server() as server:
        folder = Path(name)
        plan = make_plan(clips=320, clips_per_shard=4, grid=(4, 4, 4), hooks={"h": 64})
        local = make_store(folder / "s.zarr", plan)
        with faulty_proxy(server, stall_s=2 * TIMEOUT_S) as (proxy, url):
            os.environ |= s3_environment(server)
            create_bucket(server, "bucket")
            root = open_root("s3://bucket/s.zarr")
            for key in LocalRoot(Path(local.url)).list_keys():
                root.replace(key, local.root.read(key))
            os.environ["AWS_ENDPOINT_URL"] = url
            proxy.only = lambda path: "/activations/" in path
            proxy.share = SHARE
            size_bytes = local.root.size("activations/h/c/0/0/0/0") or 0
            budget = SHARDS_IN_BUDGET * size_bytes
            start = time.monotonic()

            def given_to(seed: int) -> tuple[str, ...]:
                client = ("obstore", "fsspec")[seed % 2]
                return str(folder / "m"), str(budget), local.url, str(seed), str(TIMEOUT_S), client

            logs = [folder / f"log-{seed}" for seed in range(PROCESSES)]
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", READER, *given_to(seed)],
                    stdout=log.open("w"),
                )
                for seed, log in enumerate(logs)
            ]
            watch, most = LocalCache("s3://bucket/s.zarr", CacheConfig(directory=folder / "m")), 0
            while proxy.faults.total() < given.faults and time.monotonic() - start < LONGEST_S:
                most = max(most, watch.held_bytes())
                time.sleep(0.05)
            crashed = sum(reader.poll() is not None for reader in readers)
            for reader in readers:
                reader.kill()
                reader.wait()
            # A kill may have cut the last line short.
            lines = [line for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            outcomes = Counter(line.split(":")[0].split()[0] for line in lines)
            idle = sum("right\n" not in log.read_text() for log in logs)
            faults = Counter(proxy.faults)
            wrong_files = wrong_in(folder / "m")
            reading_s = time.monotonic() - start
            ended, right, most_training = train_through_faults(folder, proxy, local, budget)
            wrong_files += wrong_in(folder / "trainers")
            training_faults = proxy.faults.total() - faults.total()
    text = table(faults, outcomes, most, budget, crashed, idle, wrong_files, reading_s)
    text += "\n".join(
        [
            "",
            f"{PROCESSES} trainings of 80 steps at once, one cache of {SHARDS_IN_BUDGET} shards of 80,"
            f" {TRAINING_SHARE:.0%} of the reads spoilt",
            "",
            f"{'faults in all':<46}{training_faults:>8}",
            f"{'trainings that ended':<46}{ended:>8}",
            f"{'with the weights of a local store, bit for bit':<46}{right:>8}",
            f"{'most bytes held / budget':<46}{most_training / budget:>8.3f}\n",
        ]
    )
    goals = [
        Goal("cache_faults/faults", faults.total(), at_least=given.faults),
        Goal("cache_faults/wrong-shards-and-files", outcomes["WRONG"] + wrong_files, at_most=0),
        Goal("cache_faults/unnamed-failures", outcomes["unnamed"], at_most=0),
        Goal("cache_faults/processes-lost-or-idle", crashed + idle, at_most=0),
        Goal("cache_faults/held-over-budget", max(most, most_training) / budget, at_most=1),
        Goal("cache_faults/trainings-bit-equal", right, at_least=PROCESSES),
    ]
    text += "\n".join(goal_lines(goals)) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text)
    return 0 if all(goal.is_met for goal in goals) else 1


def wrong_in(folder: Path) -> int:
    """Kept files whose bytes do not have the digest they are named by."""
    return sum(hashlib.sha256(path.read_bytes()).hexdigest() != path.name for path in (folder / "objects").iterdir())


def table(
    faults: Counter[str],
    outcomes: Counter[str],
    most: int,
    budget: int,
    crashed: int,
    idle: int,
    wrong_files: int,
    wall_s: float,
) -> str:
    """The result as text."""
    lines = [
        f"{PROCESSES} processes, one cache of {SHARDS_IN_BUDGET} shards of 80, {SHARE:.0%} of the reads spoilt,"
        f" {wall_s:.0f} s",
        "",
        *(f"fault {kind:<40}{faults[kind]:>8}" for kind in KINDS),
        f"{'faults in all':<46}{faults.total():>8}",
        "",
        f"{'shards mapped, every byte right':<46}{outcomes['right']:>8}",
        f"{'shards mapped with a wrong byte':<46}{outcomes['WRONG']:>8}",
        f"{'reads that failed, naming the object':<46}{outcomes['named']:>8}",
        f"{'reads that failed otherwise':<46}{outcomes['unnamed']:>8}",
        f"{'processes that crashed':<46}{crashed:>8}",
        f"{'processes that mapped none':<46}{idle:>8}",
        f"{'files kept with wrong bytes':<46}{wrong_files:>8}",
        f"{'most bytes held / budget':<46}{most / budget:>8.3f}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run())
