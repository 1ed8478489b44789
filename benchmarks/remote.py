"""How fast a store comes over S3, and what that costs, compared with the limit of the same server.

    python benchmarks/remote.py [--out benchmarks/results/remote.txt] [--folder /dev/shm]

A server on loopback (range_server.py, its own process) holds a store of about 0.26 GB; every way of reading it reads
the same objects. Raw: eight threads with plain sockets read 8 MiB ranges; the second raw row also writes them to files,
as whatever leaves a file must. Everything is measured twice: as fast as the machine can, where processor time decides,
and behind a limit like that of a network card. CPU: processor seconds of the client per GB, all its threads.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import obstore
import s3fs
import zarr

from goals import Goal, goal_lines
from random_store import random_store
from range_server import range_server
from tubelet_store.cache import CacheConfig
from tubelet_store.plan import Grid, Hook
from tubelet_store.reader import Store, open_store
from tubelet_store.storage.client import ClientName
from tubelet_store.storage.remote import open_client

CLIPS, CLIPS_PER_SHARD, GRID, CHANNELS = 112, 28, Grid(time=8, height=14, width=14), 768
HOOK = "blocks.6"
PART_BYTES = 8 << 20
CONNECTIONS = 8
LIMIT_MB_PER_S = 250.0
REPEATS = 3


UNLIMITED = "As fast as the machine can"
CACHE = "cache over obstore (checked, in files, mapped)"


@dataclass(frozen=True)
class Row:
    """One way of reading."""

    name: str
    mb_per_s: float
    cpu_s_per_gb: float


class Readers:
    """The ways of reading the store that the server at `endpoint` holds as s3://bucket/s.zarr."""

    def __init__(self, endpoint: str, truth: Store, scratch: Path) -> None:
        self.endpoint, self.truth, self.scratch = endpoint, truth, scratch
        self.url = "s3://bucket/s.zarr"
        self.keys = [truth.shard_object(HOOK, shard).stored.key for shard in range(truth.plan.shards)]
        self.sizes = [truth.shard_object(HOOK, shard).stored.size_bytes for shard in range(truth.plan.shards)]
        self.ranges = [
            (number, start, min(start + PART_BYTES, size))
            for number, size in enumerate(self.sizes)
            for start in range(0, size, PART_BYTES)
        ]

    def raw(self, write: bool) -> int:
        """Plain sockets, buffers used again."""
        todo = list(reversed(self.ranges))
        files = (
            [os.open(self.scratch / f"raw-{n}", os.O_RDWR | os.O_CREAT) for n in range(len(self.keys))] if write else []
        )
        for file, size in zip(files, self.sizes, strict=False):
            os.posix_fallocate(file, 0, size)
        host, port = urlsplit(self.endpoint).netloc.split(":")
        lock = threading.Lock()

        def work() -> None:
            buffer = memoryview(bytearray(PART_BYTES))
            with socket.create_connection((host, int(port))) as connection:
                while True:
                    with lock:
                        if not todo:
                            return
                        number, start, stop = todo.pop()
                    key = self.keys[number]
                    ask = f"GET /bucket/s.zarr/{key} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
                    connection.sendall(ask.encode())
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += connection.recv(4096)
                    body = head.partition(b"\r\n\r\n")[2]
                    buffer[: len(body)] = body
                    filled = len(body)
                    while filled < stop - start:
                        filled += connection.recv_into(buffer[filled : stop - start])
                    if write:
                        os.pwrite(files[number], buffer[: stop - start], start)

        run_threads(work)
        for file in files:
            os.close(file)
        return sum(self.sizes)

    def ranges_of(self, name: ClientName) -> Callable[[], int]:
        """A client's range reads from eight threads, bytes dropped. The client is connected."""
        client = open_client(self.url, name)
        client.size("zarr.json")

        def read(part: tuple[int, int, int]) -> int:
            number, start, stop = part
            return len(client.read_range(self.keys[number], start, stop))

        def work() -> int:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                return sum(pool.map(read, self.ranges))

        return work

    def s3fs_whole(self) -> int:
        """s3fs downloading whole objects to files."""
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        for number, key in enumerate(self.keys):
            files.get_file(f"bucket/s.zarr/{key}", str(self.scratch / f"s3fs-{number}"))
        return sum(self.sizes)

    def cache(self, client: str, check: str) -> Callable[[], int]:
        """A cache without any shard: every one is fetched ahead, checked, mapped. The store is open."""
        config = CacheConfig.model_validate(
            {"directory": self.scratch / "cache", "client": client, "check": check, "connections": CONNECTIONS}
        )
        store = open_store(self.url, cache=config)
        store.shard_object(HOOK, 0)

        def work() -> int:
            store.prefetch(HOOK, range(store.plan.shards))
            for shard in range(store.plan.shards):
                store.shard_map(HOOK, shard)
            return sum(self.sizes)

        return work

    def zarr_python(self) -> int:
        """zarr-python reading the array whole, shard by shard."""
        store = zarr.storage.FsspecStore.from_url(self.url, read_only=True)
        array = zarr.open_array(store, path=f"activations/{HOOK}", mode="r")
        for shard in range(self.truth.plan.shards):
            clips = self.truth.plan.shard_range(shard)
            np.asarray(array[clips.start : clips.stop])
        return sum(self.sizes)


def run_threads(work: Callable[[], None]) -> None:
    """`work` in as many threads as there are connections."""
    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(name: str, work: Callable[[], int], scratch: Path) -> Row:
    """Best speed of `work` and its least processor time; files it left are removed."""
    speeds, costs = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        size_bytes = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        speeds.append(1e-6 * size_bytes / wall)
        costs.append(1e9 * cpu / size_bytes)
        for path in scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Row(name, max(speeds), min(costs))


def rows(bench: Readers) -> list[Row]:
    """Every way of reading."""
    ways: list[tuple[str, Callable[[], int]]] = [
        ("raw sockets, into memory", lambda: bench.raw(write=False)),
        ("raw sockets, into files", lambda: bench.raw(write=True)),
        (CACHE, bench.cache("obstore", "crc32c")),
        ("cache over obstore, with SHA-256", bench.cache("obstore", "sha256")),
        ("cache over s3fs", bench.cache("fsspec", "crc32c")),
        ("obstore ranges, into memory", bench.ranges_of("obstore")),
        ("s3fs ranges, into memory", bench.ranges_of("fsspec")),
        ("s3fs get_file, one after another", bench.s3fs_whole),
        ("zarr-python over s3fs, into memory", bench.zarr_python),
    ]
    return [measure(name, work, bench.scratch) for name, work in ways]


def table(title: str, rows: list[Row]) -> str:
    """One table as text."""
    raw, written = rows[0].mb_per_s, rows[1].mb_per_s
    lines = [title, f"{'':<52}{'MB/s':>8}{'x raw':>8}{'x raw to files':>16}{'CPU s/GB':>10}"]
    lines += [
        f"{row.name:<52}{row.mb_per_s:>8.0f}{row.mb_per_s / raw:>8.2f}{row.mb_per_s / written:>16.2f}"
        f"{row.cpu_s_per_gb:>10.2f}"
        for row in rows
    ]
    of = {row.name: row for row in rows}
    obstore_row, s3fs_row = of["obstore ranges, into memory"], of["s3fs ranges, into memory"]
    lines.append(
        f"obstore against s3fs: {obstore_row.mb_per_s / s3fs_row.mb_per_s:.2f} of its speed,"
        f" {obstore_row.cpu_s_per_gb / s3fs_row.cpu_s_per_gb:.2f} of its processor time"
    )
    return "\n".join(lines) + "\n"


def run() -> None:
    """Measure, print, and write to `--out` if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where server and cache keep their files")
    given = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    # s3fs sometimes closes forgotten sessions from another loop than its own, and asyncio tells.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    load = os.getloadavg()[0]
    goals: list[Goal] = []
    texts = [
        f"store of {CLIPS} clips of {GRID.tokens} tokens x {CHANNELS} float16 in shards of {CLIPS_PER_SHARD} clips;"
        f" {CONNECTIONS} connections, parts of 8 MiB, no TLS, best of {REPEATS}",
        f"{os.cpu_count()} cores (server included), load average {load:.1f}, Python {platform.python_version()},"
        f" obstore {obstore.__version__}, s3fs {s3fs.__version__}, zarr {zarr.__version__}\n",
    ]
    with tempfile.TemporaryDirectory(prefix="tubelet-bench-", dir=given.folder) as name:
        folder = Path(name)
        (folder / "bucket").mkdir()
        (folder / "scratch").mkdir()
        hook = Hook(name=HOOK, channels=CHANNELS)
        truth = random_store(folder / "bucket" / "s.zarr", GRID, hook, CLIPS, CLIPS_PER_SHARD)
        for title, limit in [
            (UNLIMITED, None),
            (f"Behind a limit of {LIMIT_MB_PER_S:.0f} MB/s", LIMIT_MB_PER_S),
        ]:
            with range_server(folder, limit) as endpoint:
                os.environ["AWS_ENDPOINT_URL"] = endpoint
                s3fs.S3FileSystem.clear_instance_cache()
                measured = rows(Readers(endpoint, truth, folder / "scratch"))
                texts.append(table(title, measured))
                print(texts[-1])
                of = {row.name: row.mb_per_s for row in measured}
                # Without a limit, writing files is what bounds whatever leaves files.
                raw = measured[1 if limit is None else 0].mb_per_s
                what = "cache-over-raw-to-files" if limit is None else "cache-over-raw-behind-limit"
                goals.append(Goal(f"remote/{what}", of[CACHE] / raw, at_least=0.9))
    texts.append("\n".join(goal_lines(goals)[1:]) + "\n")
    print(texts[-1], end="")
    if given.out is not None:
        given.out.write_text("\n".join(texts))


if __name__ == "__main__":
    run()
