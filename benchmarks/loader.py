"""How fast batches come, and how well they are mixed, beside what a loader is usually made of.

    python benchmarks/loader.py [--out benchmarks/results/loader.txt]

Every speed is a ratio to one thread copying the same bytes from memory to memory, measured in the same run right
before, so that the table means something on another machine. Data: a store of about 0.6 GB in a temporary folder, in
the page cache. A GPU is not used: shuffling, which a GPU would do, is on the CPU here, and its row is marked.

Mixing of a batch of 4096: how many clips it has tokens of, and the entropy of its clips relative to independent draws.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from random_store import random_store
from tubelet_store import Grid, Hook, Store
from tubelet_trainer.source import Source
from tubelet_trainer.windows import Windows

CLIPS, CLIPS_PER_SHARD, GRID, CHANNELS = 256, 32, Grid(time=8, height=14, width=14), 768
HOOK = "blocks.6"
TOKEN_BYTES = 2 * CHANNELS
BATCH = 4096
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ratio: float
    """Speed as a multiple of memcpy."""
    clips: float | None = None
    """Mean number of distinct clips in a batch."""
    entropy: float | None = None
    """Mean entropy of a batch's clips, relative to independent draws."""


def make_store(folder: Path) -> Store:
    """The store that all ways of reading read."""
    return random_store(folder, GRID, Hook(name=HOOK, channels=CHANNELS), CLIPS, CLIPS_PER_SHARD)


def memcpy_seconds(size_bytes: int) -> float:
    """Seconds one thread needs to copy `size_bytes` between warm buffers of at most 256 MiB."""
    block = min(size_bytes, 1 << 28)
    source, target = np.ones(block, np.uint8), np.ones(block, np.uint8)
    start = time.perf_counter()
    np.copyto(target, source)
    return (time.perf_counter() - start) * size_bytes / block


def ratio(work: Callable[[], int]) -> float:
    """Median speed of `work` (which returns the token bytes it delivered) as a multiple of memcpy."""
    ratios = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        size_bytes = work()
        spent = time.perf_counter() - start
        ratios.append(memcpy_seconds(size_bytes) / spent)
    return statistics.median(ratios)


def mixing(batches: Iterator[NDArray[np.int64]]) -> tuple[float, float]:
    """Mean distinct clips and mean relative entropy of batches, each given as the clip of every token."""
    rng = np.random.default_rng(0)
    independent = statistics.mean(clip_entropy(rng.integers(0, CLIPS, BATCH)) for _ in range(50))
    distinct, entropies = [], []
    for clips in batches:
        if len(clips) == BATCH:
            distinct.append(len(np.unique(clips)))
            entropies.append(clip_entropy(clips) / independent)
    return statistics.mean(distinct), statistics.mean(entropies)


def clip_entropy(clips: NDArray[np.int64]) -> float:
    """Entropy in nats of the clips of a batch."""
    shares = np.unique(clips, return_counts=True)[1] / len(clips)
    return float(-(shares * np.log(shares)).sum())


def staging(store: Store, block_patches: int, check: bool) -> float:
    """Copying the blocks of a window from the memory maps into a reused buffer, one thread."""
    source = Source(store, HOOK, block_patches)
    rng = np.random.default_rng(0)
    count = 131_072 // source.block_tokens
    out = np.zeros((count, GRID.time, block_patches, CHANNELS), dtype=source.bits)

    def work() -> int:
        blocks = np.sort(rng.choice(CLIPS * source.groups, count, replace=False))
        clips, groups = np.divmod(blocks, source.groups)
        source.copy_blocks(clips, groups, out)
        if check:
            source.refuse_nonfinite(clips, groups, out)
        return out.nbytes

    return ratio(work)


def ours(store: Store, block_patches: int, window_tokens: int) -> Row:
    """Whole epochs of shuffled float32 batches."""
    source = Source(store, HOOK, block_patches)
    windows = Windows(source, np.arange(CLIPS), batch_tokens=BATCH, window_tokens=window_tokens)

    def work() -> int:
        windows.step = 0
        return sum(len(batch) for batch in windows) * TOKEN_BYTES

    work()  # the first pass allocates the buffers
    speed = ratio(work)
    windows.step = 0
    clips, entropy = mixing(batch.clip.numpy() for batch in windows)
    patches = f"{block_patches} patches x {GRID.time}"
    return Row(f"tubelet, blocks of {patches}, window {window_tokens // 1024}k tokens (*)", speed, clips, entropy)


class RandomRows(Dataset[torch.Tensor]):
    """A map-style dataset over the memory maps: one token per item."""

    def __init__(self, store: Store) -> None:
        self.maps = [store.shard_map(HOOK, shard).reshape(-1, CHANNELS) for shard in range(store.plan.shards)]
        self.per_shard = len(self.maps[0])

    def __len__(self) -> int:
        return self.per_shard * len(self.maps)

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, row = divmod(index, self.per_shard)
        return torch.from_numpy(self.maps[shard][row].astype(np.float32))


def data_loader(store: Store, workers: int) -> float:
    """torch's DataLoader, shuffle=True, batches of 4096 rows."""
    dataset = RandomRows(store)

    def work() -> int:
        # Spawned workers would copy the maps; a loader over memory maps is forked in practice.
        loader = DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        size_bytes = 0
        for number, batch in enumerate(loader):
            size_bytes += len(batch) * TOKEN_BYTES
            if number == 7:
                break
        return size_bytes

    return ratio(work)


def gather_rows(store: Store) -> float:
    """NumPy fancy indexing of random rows of one memory-mapped shard: the best a row-wise loader can do."""
    rows = np.asarray(store.shard_map(HOOK, 0)).reshape(-1, CHANNELS).view(np.int16)
    rng = np.random.default_rng(0)

    def work() -> int:
        taken = rows[rng.integers(0, len(rows), BATCH)]
        return taken.nbytes

    return ratio(work)


def zarr_reads(store: Store, whole_clips: bool) -> float:
    """zarr-python: random tokens one by one, or random whole clips."""
    array = zarr.open_array(f"{store.url}/activations/{HOOK}", mode="r")
    rng = np.random.default_rng(0)

    def work() -> int:
        size_bytes = 0
        for _ in range(16 if whole_clips else 100):
            clip, step, patch = (int(rng.integers(size)) for size in (CLIPS, GRID.time, GRID.space))
            values = np.asarray(array[clip] if whole_clips else array[clip, step, patch])
            size_bytes += values.nbytes
        return size_bytes

    return ratio(work)


def measure(store: Store) -> list[Row]:
    """All rows of the table."""
    rng = np.random.default_rng(1)
    iid = mixing(rng.integers(0, CLIPS, BATCH) for _ in range(50))
    return [
        Row("memcpy, one thread", 1.0),
        Row("tubelet staging, whole clips", staging(store, GRID.space, check=False)),
        Row("tubelet staging, rows of the grid", staging(store, GRID.width, check=False)),
        Row("tubelet staging, rows of the grid, checked for NaN", staging(store, GRID.width, check=True)),
        ours(store, GRID.width, 262_144),
        ours(store, GRID.width, 65_536),
        ours(store, GRID.space, 65_536),
        Row("NumPy gather of random rows from a memory map", gather_rows(store), *iid),
        Row("torch DataLoader on memory maps, random rows, 0 workers", data_loader(store, 0), *iid),
        Row("torch DataLoader on memory maps, random rows, 2 workers", data_loader(store, 2), *iid),
        Row("zarr-python, random rows", zarr_reads(store, whole_clips=False), *iid),
        Row("zarr-python, random clips, no shuffle inside", zarr_reads(store, whole_clips=True)),
    ]


def table(rows: list[Row], gigabytes_per_s: float, load: float) -> str:
    """The table as text."""
    data = f"{CLIPS} clips of {GRID.tokens} tokens x {CHANNELS} float16, batches of {BATCH}, warm page cache"
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    )
    # Other work on the machine slows threads and page faults more than a single copy: it belongs beside the figures.
    lines = [data, f"{machine}; memcpy {gigabytes_per_s:.1f} GB/s; load average {load:.1f}", ""]
    lines.append(f"{'':<64}{'x memcpy':>10}{'clips':>8}{'entropy':>9}")
    for row in rows:
        clips = "" if row.clips is None else f"{row.clips:.0f}"
        entropy = "" if row.entropy is None else f"{row.entropy:.3f}"
        lines.append(f"{row.name:<64}{row.ratio:>10.2g}{clips:>8}{entropy:>9}")
    lines += [
        "",
        "(*) Shuffle and conversion to float32 run on the CPU here; on a GPU only the staging is the host's work.",
    ]
    lines.append("clips: distinct clips in a batch; entropy: of a batch's clips, 1 = independent draws.")
    return "\n".join(lines) + "\n"


def run() -> None:
    """Measure, print, and write to `--out` if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tubelet-bench-") as folder:
        store = make_store(Path(folder) / "store.zarr")
        speed = 1e-9 * (1 << 28) / statistics.median(memcpy_seconds(1 << 28) for _ in range(5))
        load = os.getloadavg()[0]
        text = table(measure(store), speed, load)
    print(text, end="")
    if out is not None:
        out.write_text(text)


if __name__ == "__main__":
    run()
