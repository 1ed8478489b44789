"""How fast batches come, and how well they are mixed, compared with the parts a loader is usually made of.

    python benchmarks/loader.py [--out benchmarks/results/loader.txt] [--peer sae_lens=ENV/bin/python ...]

Every speed is a ratio to one thread copying the same bytes (the tokens as float16) from memory to memory, measured in
the same run right after, so that the table means something on another machine. Data: a store of about 0.6 GB in a
temporary folder, in the page cache. A GPU is not used: shuffling, which a GPU would do, is on the CPU here, and its
rows are marked. `--peer` adds the loader of another project, run by an interpreter that has it (see peer_loaders.py).

Mixing of a batch of 4096: how many clips it has tokens of, and the entropy of its clips relative to independent draws.

A second table is for stores larger than memory: the page cache is dropped before each reading (as far as the machine's
own disk cache lets one), and speeds are ratios to reading a shard's file from its beginning to its end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from goals import Goal, goal_lines
from peer_loaders import BATCH, clip_entropy, memcpy_seconds
from random_store import random_store
from tubelet_store.object_keys import ACTIVATIONS, shard_key
from tubelet_store.plan import Grid, Hook
from tubelet_store.reader import Store, open_store
from tubelet_trainer.data.buffers import page_aligned
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.source import Source

CLIPS, CLIPS_PER_SHARD, GRID, CHANNELS = 256, 32, Grid(time=8, height=14, width=14), 768
HOOK = "blocks.6"
TOKEN_BYTES = 2 * CHANNELS
REPEATS = 5

STAGING_CLIPS, STAGING_ROWS = "tubelet staging, whole clips", "tubelet staging, rows of the grid"
RANDOM_ROWS = "torch DataLoader on memory maps, random rows, 0 workers"

# Clips that peers get: what they write first takes long.
PEER_CLIPS = 64


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


def staging(store: Store, block_patches: int, check: bool = False, fresh: bool = False) -> float:
    """Copying the blocks of a window from the memory maps into a reused buffer, one thread.

    Args:
        store: The store.
        block_patches: Patches of a block.
        check: Also search for NaN, as is done once for each block where batches are wanted on the CPU.
        fresh: Map the shards again for each window, as in the first epoch of a run: every page faults.
    """
    source = Source(store, HOOK, block_patches)
    rng = np.random.default_rng(0)
    count = 131_072 // source.block_tokens
    out = page_aligned(count * source.block_tokens, CHANNELS, torch.int16).numpy()
    out = out.reshape(count, GRID.time, block_patches, CHANNELS)
    everything = np.divmod(np.arange(CLIPS * source.groups), source.groups)
    # Touch every page: what is measured is every epoch but the first.
    for first in [*range(0, len(everything[0]) - count, count), len(everything[0]) - count]:
        clips, groups = (each[first : first + count] for each in everything)
        source.copy_blocks(clips, groups, out)

    def work() -> int:
        reader = Source(open_store(store.url), HOOK, block_patches) if fresh else source
        blocks = np.sort(rng.choice(CLIPS * source.groups, count, replace=False))
        clips, groups = np.divmod(blocks, source.groups)
        reader.copy_blocks(clips, groups, out)
        if check:
            reader.refuse_nonfinite(clips, groups, out)
        return out.nbytes

    return ratio(work)


def ours(store: Store, block_patches: int, window_tokens: int, dtype: torch.dtype | None) -> Row:
    """Shuffled batches of a long run: the epochs after the first one."""
    source = Source(store, HOOK, block_patches)
    per_epoch = CLIPS * GRID.tokens // BATCH
    windows = ActivationLoader(
        source,
        np.arange(CLIPS),
        batch_tokens=BATCH,
        window_tokens=window_tokens,
        total_tokens=(REPEATS + 1) * per_epoch * BATCH,
        dtype=dtype,
    )
    stream = iter(windows)
    clips, entropy = mixing(next(stream).clip.numpy() for _ in range(per_epoch))
    speed = ratio(lambda: sum(len(next(stream)) for _ in range(per_epoch)) * TOKEN_BYTES)
    kind = "float16" if dtype is None else "float32"
    name = (
        f"tubelet, {kind}, blocks of {block_patches} patches x {GRID.time}, window {window_tokens // 1024}k tokens (*)"
    )
    return Row(name, speed, clips, entropy)


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


class RandomBatches(RandomRows):
    """The same with a whole batch gathered at once: the best that can be written for a DataLoader."""

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        shards, rows = np.divmod(np.asarray(indices), self.per_shard)
        batch = np.empty((len(rows), CHANNELS), np.float16)
        for shard in np.unique(shards):
            batch[shards == shard] = self.maps[shard][rows[shards == shard]]
        return torch.from_numpy(batch).float()


def data_loader(dataset: RandomRows, workers: int) -> float:
    """torch's DataLoader, shuffle=True, batches of 4096 rows."""
    whole = isinstance(dataset, RandomBatches)

    def work() -> int:
        # Spawned workers would copy the maps; a loader over memory maps is forked in practice.
        loader = DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            num_workers=workers,
            collate_fn=_as_it_is if whole else None,
            multiprocessing_context="fork" if workers else None,
        )
        size_bytes = 0
        for number, batch in enumerate(loader):
            size_bytes += len(batch) * TOKEN_BYTES
            if number == 7:
                break
        return size_bytes

    return ratio(work)


def _as_it_is(batch: Any) -> Any:
    return batch


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


def peers(store: Store, interpreters: dict[str, str], folder: Path) -> list[Row]:
    """The rows of other projects' loaders."""
    tokens = np.concatenate(
        [np.asarray(store.shard_map(HOOK, shard)) for shard in range(PEER_CLIPS // CLIPS_PER_SHARD)]
    )
    tokens = tokens.reshape(PEER_CLIPS, GRID.tokens, CHANNELS)
    tokens[..., 0] = np.arange(PEER_CLIPS)[:, None]
    np.save(folder / "tokens.npy", tokens)
    rows = []
    for name, interpreter in interpreters.items():
        (folder / name).mkdir()
        script = Path(__file__).with_name("peer_loaders.py")
        command = [interpreter, str(script), name, str(folder / "tokens.npy"), str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows += [Row(**row) for row in json.loads(done.stdout)]
    return rows


def cold(store: Store) -> list[Row]:
    """Reading with a cold page cache, as ratios to reading one file from end to end."""
    paths = [Path(store.url) / shard_key(ACTIVATIONS, HOOK, shard) for shard in range(store.plan.shards)]

    def drop() -> None:
        gc.collect()  # pages that are mapped stay
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def sequential() -> int:
        buffer, size_bytes = bytearray(1 << 22), 0
        with paths[0].open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                size_bytes += read
        return size_bytes

    def scattered(share: float, ask: bool) -> Callable[[], int]:
        def work() -> int:
            source = Source(store, HOOK, GRID.width)
            count = int(CLIPS * source.groups * share)
            out = np.empty((count, GRID.time, GRID.width, CHANNELS), source.bits)
            rng = np.random.default_rng(0)
            blocks = np.sort(rng.choice(CLIPS * source.groups, count, replace=False))
            clips, groups = np.divmod(blocks, source.groups)
            if ask:
                source.read_ahead(clips, groups)
            source.copy_blocks(clips, groups, out)
            return out.nbytes

        return work

    def rows() -> int:
        dataset = RandomBatches(store)
        return dataset.__getitems__(np.random.default_rng(0).integers(0, len(dataset), 512).tolist()).nbytes // 2

    def speed(work: Callable[[], int]) -> float:
        rates = []
        for _ in range(REPEATS):
            drop()
            start = time.perf_counter()
            rates.append(work() / (time.perf_counter() - start))
        return statistics.median(rates)

    reference = speed(sequential)
    ways = {
        "tubelet staging, 1/3 of the blocks of all shards": scattered(1 / 3, ask=True),
        "  the same without asking the kernel to read ahead": scattered(1 / 3, ask=False),
        "tubelet staging, 1/30 of the blocks of all shards": scattered(1 / 30, ask=True),
        "  the same, without asking the kernel to read ahead": scattered(1 / 30, ask=False),
        "NumPy gather of random rows from the memory maps": rows,
    }
    measured = [Row(f"one file from end to end ({reference / 1e9:.1f} GB/s)", 1.0)]
    measured += [Row(name, speed(work) / reference) for name, work in list(ways.items())]
    return measured


def measure(store: Store, interpreters: dict[str, str], folder: Path) -> list[Row]:
    """All rows of the first table."""
    rng = np.random.default_rng(1)
    iid = mixing(rng.integers(0, CLIPS, BATCH) for _ in range(50))
    rows, batches = RandomRows(store), RandomBatches(store)
    return [
        Row("memcpy, one thread", 1.0),
        Row(STAGING_CLIPS, staging(store, GRID.space)),
        Row(STAGING_ROWS, staging(store, GRID.width)),
        Row("tubelet staging, rows of the grid, checked for NaN", staging(store, GRID.width, check=True)),
        Row("tubelet staging, rows of the grid, maps never touched", staging(store, GRID.width, fresh=True)),
        ours(store, GRID.width, 262_144, None),
        ours(store, GRID.width, 262_144, torch.float32),
        ours(store, GRID.width, 65_536, None),
        ours(store, GRID.width, 65_536, torch.float32),
        ours(store, GRID.space, 65_536, torch.float32),
        Row("NumPy gather of random rows from one shard's map, float16", gather_rows(store), *iid),
        Row(RANDOM_ROWS, data_loader(rows, 0), *iid),
        Row("torch DataLoader on memory maps, random rows, 2 workers", data_loader(rows, 2), *iid),
        Row("torch DataLoader, batches gathered at once, 0 workers", data_loader(batches, 0), *iid),
        Row("torch DataLoader, batches gathered at once, 2 workers", data_loader(batches, 2), *iid),
        Row("zarr-python, random rows", zarr_reads(store, whole_clips=False), *iid),
        Row("zarr-python, random clips, no shuffle inside", zarr_reads(store, whole_clips=True), 1, 0),
        *peers(store, interpreters, folder),
    ]


def best_shuffled(rows: list[Row]) -> Row:
    """Our fastest float32 row of those that are mixed well."""
    mixed = [row for row in rows if row.name.startswith("tubelet, float32") and (row.entropy or 0) > 0.95]
    return max(mixed, key=lambda row: row.ratio)


def goals(rows: list[Row], peers: Iterable[str]) -> list[Goal]:
    """Staging close to memcpy; shuffled batches far above row loaders at equal mixing."""
    of = {row.name: row for row in rows}
    best = best_shuffled(rows)
    return [
        Goal("loader/staging-clips-over-memcpy", of[STAGING_CLIPS].ratio, at_least=0.85),
        Goal("loader/staging-rows-over-memcpy", of[STAGING_ROWS].ratio, at_least=0.85),
        Goal("loader/shuffled-entropy", best.entropy or 0.0, at_least=0.95),
        Goal("loader/shuffled-over-DataLoader-rows", best.ratio / of[RANDOM_ROWS].ratio, at_least=20),
        *(
            Goal(f"loader/shuffled-over-{peer}", best.ratio / row.ratio, at_least=20)
            for peer in peers
            for row in rows
            if row.name.startswith(peer)
        ),
    ]


def table(rows: list[Row], from_disk: list[Row], gigabytes_per_s: float, load: float) -> str:
    """The tables as text."""
    data = f"{CLIPS} clips of {GRID.tokens} tokens x {CHANNELS} float16, batches of {BATCH}, warm page cache"
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    )
    # Other work on the machine slows threads and page faults more than a single copy: it is reported with the figures.
    lines = [data, f"{machine}; memcpy {gigabytes_per_s:.1f} GB/s; load average {load:.1f}", ""]
    best = best_shuffled(rows).ratio
    lines.append(f"{'':<66}{'x memcpy':>10}{'clips':>8}{'entropy':>9}{'we are':>11}")
    for row in rows:
        clips = "" if row.clips is None else f"{row.clips:.0f}"
        entropy = "" if row.entropy is None else f"{row.entropy:.3f}"
        times = "" if row.clips is None or row.name.startswith("tubelet") else f"{best / row.ratio:,.1f} x"
        lines.append(f"{row.name:<66}{row.ratio:>10.2g}{clips:>8}{entropy:>9}{times:>11}")
    lines += [
        "",
        "(*) Shuffle and conversion to float32 run on the CPU here; on a GPU only the staging is the host's work.",
        "clips: distinct clips in a batch; entropy: of a batch's clips, 1 = independent draws.",
        f"we are: speed of our best float32 row of entropy above 0.95 over this row's. Peers read {PEER_CLIPS} clips.",
        "",
        f"{'with a cold page cache':<66}{'x a file':>10}",
    ]
    lines += [f"{row.name:<66}{row.ratio:>10.2g}" for row in from_disk]
    return "\n".join(lines) + "\n"


def run() -> None:
    """Measure, print, and write to `--out` if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    arguments = parser.parse_args()
    interpreters: dict[str, str] = dict(each.split("=", 1) for each in arguments.peer)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tubelet-bench-") as folder:
        store = make_store(Path(folder) / "store.zarr")
        speed = 1e-9 * (1 << 28) / statistics.median(memcpy_seconds(1 << 28) for _ in range(5))
        load = os.getloadavg()[0]
        rows = measure(store, interpreters, Path(folder))
        text = table(rows, cold(store), speed, load)
        text += "\n".join(goal_lines(goals(rows, interpreters))) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    run()
