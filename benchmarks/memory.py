"""How much memory the loader needs: its windows, whatever the size of the store.

    python benchmarks/memory.py [--out benchmarks/results/memory.txt]

A store, and one with 20 times the clips, are read in processes of their own, each once around. `anonymous` is the peak
of what the process itself holds (the kernel's RssAnon: windows, batches, tables, libraries), over that of a process
that has only imported the same and opened the store. `mapped` is the peak of pages of the store that lie in the page
cache and are mapped (RssFile): the kernel takes them back when anybody needs them.
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
from tubelet_store import Grid, Hook

CLIPS, TIMES, CHANNELS, HOOK = 48, 20, 384, "blocks.6"
GRID = Grid(time=8, height=14, width=14)
BATCH, WINDOW = 1024, 32_768
MIB = 1 << 20

# Reads /proc/self/status every 5 ms from a thread, so that short peaks are seen.
READER = """
import json, sys, threading, time
import numpy as np, torch
torch.set_num_threads(1)
from tubelet_store import open_store
from tubelet_trainer.source import Source
from tubelet_trainer.windows import Windows

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
tokens = 0
windows = Windows(
    Source(store, sys.argv[2]),
    np.arange(store.plan.clips),
    batch_tokens=int(sys.argv[3]),
    window_tokens=int(sys.argv[4]),
)
for batch in windows:
    tokens += len(batch)
done.set()
watcher.join()
print(json.dumps({"tokens": tokens, **{name: peak[name] - start[name] for name in peak}}))
"""


def write_store(folder: Path, clips: int) -> int:
    """A store of `clips` clips; the bytes of its tokens."""
    random_store(folder, GRID, Hook(name=HOOK, channels=CHANNELS), clips, clips_per_shard=48)
    return clips * GRID.tokens * CHANNELS * 2


def read(folder: Path, window_tokens: int) -> dict[str, int]:
    """Tokens read, and peaks in bytes over the start."""
    command = [sys.executable, "-c", READER, str(folder), HOOK, str(BATCH), str(window_tokens)]
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
        f"{'store':>14} {'window tokens':>14} {'two windows':>12} {'anonymous':>11} {'over budget':>12} {'mapped':>11}",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, TIMES):
            path = Path(folder) / f"{times}.zarr"
            size = write_store(path, times * CLIPS)
            for window in (WINDOW, 2 * WINDOW):
                peaks = read(path, window)
                if peaks["tokens"] != times * CLIPS * GRID.tokens:
                    raise RuntimeError(f"read {peaks['tokens']} tokens")
                budget = 2 * window * CHANNELS * 2
                line = (
                    f"{times:>3} x {size / times / MIB:>4.0f} MiB {window:>14} {budget / MIB:>8.0f} MiB "
                    f"{peaks['RssAnon'] / MIB:>7.0f} MiB {(peaks['RssAnon'] - budget) / MIB:>8.0f} MiB "
                    f"{peaks['RssFile'] / MIB:>7.0f} MiB"
                )
                print(line, flush=True)
                lines.append(line)
    lines += [
        "",
        "anonymous: what the process holds; mapped: pages of the store, which the kernel takes back at need.",
        f"Windows of a store are of equal size: the small one's ({CLIPS * GRID.tokens} tokens) are smaller than asked.",
    ]
    print("\n".join(lines[-3:]))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
