"""How much memory the loader, and a whole training, need: their windows, whatever the size of the store.

    python benchmarks/memory.py [--out benchmarks/results/memory.txt]

A store, and one with 20 times the clips, are read in processes of their own, each once around. `anonymous` is the peak
of what the process itself holds (the kernel's RssAnon: windows, batches, tables, libraries), over that of a process
that has only imported the same and opened the store. `mapped` is the peak of pages of the store that lie in the page
cache and are mapped (RssFile): the kernel takes them back when anybody needs them.

The training takes as many steps on either store, with evaluations and checkpoints amid them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from random_store import random_store
from tubelet_store.plan import Grid, Hook

CLIPS, TIMES, CHANNELS, HOOK = 96, 20, 384, "blocks.6"
GRID = Grid(time=8, height=14, width=14)
BATCH, WINDOW, EVAL = 1024, 16_384, 12_288
LATENTS, STEPS, EVERY = 1536, 60, 20
MIB = 1 << 20

# What is measured; gives the number of tokens.
LOADER = """
def work():
    windows = Windows(
        Source(store, HOOK), np.arange(store.plan.clips), batch_tokens=BATCH, window_tokens=int(sys.argv[2])
    )
    return sum(len(batch) for batch in windows)
"""
TRAINING = """
def work():
    with tempfile.TemporaryDirectory() as out:
        train(TrainConfig.model_validate({
            "store": store.url, "out": out, "steps": STEPS, "batch_tokens": BATCH, "window_tokens": int(sys.argv[2]),
            "sae": {"latents": LATENTS, "k": 32}, "eval_every": EVERY, "checkpoint_every": EVERY, "eval_tokens": EVAL,
            "device": "cpu",
        }))
    return STEPS * BATCH
"""

# Reads /proc/self/status every 5 ms from a thread, so that short peaks are seen.
WATCHED = """
import json, sys, tempfile, threading
import numpy as np, torch
torch.set_num_threads(1)
from tubelet_store.reader import open_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train
from tubelet_trainer.data.source import Source
from tubelet_trainer.data.loader import Windows

def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

store = open_store(sys.argv[1])
store.clips(), store.ok()
torch.randn(4, 4) @ torch.randn(4, 4)
start, peak, done = now(), now(), threading.Event()

def watch():
    while not done.wait(0.005):
        for name, value in now().items():
            peak[name] = max(peak[name], value)

watcher = threading.Thread(target=watch)
watcher.start()
tokens = work()
done.set()
watcher.join()
print(json.dumps({"tokens": tokens, **{name: peak[name] - start[name] for name in peak}}))
"""


def write_store(folder: Path, clips: int) -> int:
    """A store of `clips` clips; the bytes of its tokens."""
    random_store(folder, GRID, Hook(name=HOOK, channels=CHANNELS), clips, clips_per_shard=48)
    return clips * GRID.tokens * CHANNELS * 2


def watched(work: str, folder: Path, window_tokens: int) -> dict[str, int]:
    """Tokens read by `work`, and peaks in bytes over the start."""
    names = ("HOOK", "BATCH", "EVAL", "LATENTS", "STEPS", "EVERY")
    constants = "".join(f"{name} = {globals()[name]!r}\n" for name in names)
    command = [sys.executable, "-c", constants + work + WATCHED, str(folder), str(window_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        f"{CHANNELS} channels float16, grid {GRID.time}x{GRID.height}x{GRID.width}, batches of {BATCH}; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "",
        f"{'':>9} {'store':>14} {'window tokens':>14} {'two windows':>12} {'anonymous':>11} {'over budget':>12} "
        f"{'mapped':>11}",
    ]
    print("\n".join(lines))
    anonymous: dict[tuple[str, int], list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, TIMES):
            path = Path(folder) / f"{times}.zarr"
            size = write_store(path, times * CLIPS)
            for name, work, window in (
                ("loader", LOADER, WINDOW),
                ("loader", LOADER, 2 * WINDOW),
                ("training", TRAINING, WINDOW // 2),
            ):
                peaks = watched(work, path, window)
                if peaks["tokens"] != (times * CLIPS * GRID.tokens if work == LOADER else STEPS * BATCH):
                    raise RuntimeError(f"read {peaks['tokens']} tokens")
                anonymous[name, window] = [*anonymous.get((name, window), []), peaks["RssAnon"]]
                budget = 2 * window * CHANNELS * 2
                line = (
                    f"{name:>9} {times:>3} x {size / times / MIB:>4.0f} MiB {window:>14} {budget / MIB:>8.0f} MiB "
                    f"{peaks['RssAnon'] / MIB:>7.0f} MiB {(peaks['RssAnon'] - budget) / MIB:>8.0f} MiB "
                    f"{peaks['RssFile'] / MIB:>7.0f} MiB"
                )
                print(line, flush=True)
                lines.append(line)
    lines += [
        "",
        "anonymous: what the process holds; mapped: pages of the store, which the kernel takes back at need.",
        "A training holds weights, optimizer and, during an evaluation, its tokens too.",
        f"{TIMES} x the store over 1 x, anonymous: "
        + ", ".join(f"{name} {window} {large / small:.2f} x" for (name, window), (small, large) in anonymous.items()),
    ]
    print("\n".join(lines[-4:]))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
