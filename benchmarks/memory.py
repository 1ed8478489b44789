"""How much memory the loader, and a whole training, need: their windows, whatever the size of the store.

    python benchmarks/memory.py [--out benchmarks/results/memory.txt] [--clips 48]

A store, and one with 20 times the clips, are read in processes of their own, each once around. `anonymous` is the peak
of what the process itself holds (the kernel's RssAnon: windows, batches, tables, libraries), over that of a process
that has only imported the same and opened the store. `mapped` is the peak of pages of the store that lie in the page
cache and are mapped (RssFile): the kernel reclaims them on demand.

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
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from goals import Goal, goal_lines
from random_store import random_store
from tubelet_store.plan import Grid, Hook
from tubelet_store.reader import Store, open_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.source import Source
from tubelet_trainer.run.loop import train

CLIPS, TIMES, CHANNELS, HOOK = 48, 20, 768, "blocks.6"
GRID = Grid(time=8, height=14, width=14)
BATCH, WINDOW, EVAL = 1024, 16_384, 12_288
LATENTS, STEPS, EVERY = 1536, 60, 20
MIB = 1 << 20


def read_once(store: Store, window_tokens: int) -> int:
    """Every batch of the loader; the number of tokens."""
    clips = np.arange(store.plan.clips)
    loader = ActivationLoader(Source(store, HOOK), clips, batch_tokens=BATCH, window_tokens=window_tokens)
    return sum(len(batch) for batch in loader)


def train_once(store: Store, window_tokens: int) -> int:
    """A training of `STEPS` steps; the number of tokens."""
    with tempfile.TemporaryDirectory() as out:
        settings = {
            "store": store.url,
            "out": out,
            "steps": STEPS,
            "batch_tokens": BATCH,
            "window_tokens": window_tokens,
            "sae": {"latents": LATENTS, "k": 32},
            "eval_every": EVERY,
            "checkpoint_every": EVERY,
            "eval_tokens": EVAL,
            "device": "cpu",
        }
        train(TrainConfig.model_validate(settings))
    return STEPS * BATCH


WORK: dict[str, Callable[[Store, int], int]] = {"loader": read_once, "training": train_once}


@dataclass(frozen=True)
class Peaks:
    """What one piece of work needed, over the start of its process."""

    tokens: int
    anonymous: int
    """Bytes."""
    mapped: int
    """Bytes."""


def _resident_bytes() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def watch_here(work: str, url: str, window_tokens: int) -> Peaks:
    """Do `work` in this process. A thread looks every 5 ms, so that short peaks are seen."""
    torch.set_num_threads(1)
    store = open_store(url)
    store.clips(), store.ok()
    torch.randn(4, 4) @ torch.randn(4, 4)
    start, done = _resident_bytes(), threading.Event()
    peak = dict(start)

    def watch() -> None:
        while not done.wait(0.005):
            for name, value in _resident_bytes().items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokens = WORK[work](store, window_tokens)
    done.set()
    watcher.join()
    return Peaks(tokens, peak["RssAnon"] - start["RssAnon"], peak["RssFile"] - start["RssFile"])


def watched(work: str, folder: Path, window_tokens: int) -> Peaks:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--watch", work, str(folder), str(window_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS, help="of the small store")
    parser.add_argument("--watch", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        work, url, window = arguments.watch
        print(json.dumps(vars(watch_here(work, url, int(window)))))
        return
    lines = [
        f"{CHANNELS} channels float16, grid {GRID.time}x{GRID.height}x{GRID.width} (VideoMAE-base), batches of {BATCH};"
        f" {os.cpu_count()} cores, Python {platform.python_version()}",
        "",
        f"{'':>9} {'store':>14} {'window tokens':>14} {'two windows':>12} {'anonymous':>11} {'over budget':>12} "
        f"{'mapped':>11}",
    ]
    print("\n".join(lines))
    anonymous: dict[tuple[str, int], list[int]] = {}
    over_budget = 0
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, TIMES):
            path, clips = Path(folder) / f"{times}.zarr", times * arguments.clips
            random_store(path, GRID, Hook(name=HOOK, channels=CHANNELS), clips, clips_per_shard=24)
            size = clips * GRID.tokens * CHANNELS * 2
            for name, window in (("loader", WINDOW), ("loader", 2 * WINDOW), ("training", WINDOW // 2)):
                peaks = watched(name, path, window)
                if peaks.tokens != (clips * GRID.tokens if name == "loader" else STEPS * BATCH):
                    raise RuntimeError(f"read {peaks.tokens} tokens")
                anonymous[name, window] = [*anonymous.get((name, window), []), peaks.anonymous]
                budget = 2 * window * CHANNELS * 2
                if name == "loader":
                    over_budget = max(over_budget, peaks.anonymous - budget)
                line = (
                    f"{name:>9} {times:>3} x {size / times / MIB:>4.0f} MiB {window:>14} {budget / MIB:>8.0f} MiB "
                    f"{peaks.anonymous / MIB:>7.0f} MiB {(peaks.anonymous - budget) / MIB:>8.0f} MiB "
                    f"{peaks.mapped / MIB:>7.0f} MiB"
                )
                print(line, flush=True)
                lines.append(line)
    growth = {name: large / small for name, (small, large) in anonymous.items()}
    goals = [Goal("memory/loader-MiB-over-two-windows", over_budget / MIB, at_most=16)]
    goals += [
        Goal(f"memory/{name}-{window}-growth-at-{TIMES}x", times, at_most=1.1)
        for (name, window), times in growth.items()
    ]
    end = [
        "",
        "anonymous: what the process holds; mapped: pages of the store, which the kernel takes back at need.",
        "A training holds weights, optimizer and, during an evaluation, its tokens too.",
        *goal_lines(goals),
    ]
    print("\n".join(end))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines + end) + "\n")


if __name__ == "__main__":
    main()
