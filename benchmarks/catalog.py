"""How long the verbs of the catalog take over 10,000 entries and a store of 100,000 objects.

    python benchmarks/catalog.py > benchmarks/results/catalog.txt

Each verb runs as a process of its own, as a user runs it: start-up counts. Goal: 2 s of processor time each, memory
bounded. The store is described in full (plan, manifest, clip table, moments); its shard objects, which none
of these verbs reads, are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from goals import Goal, goal_lines
from tubelet_store.catalog.edit_catalog import _items, add_store
from tubelet_store.catalog.entry import HookBlock
from tubelet_store.clip_table import FINISHED, to_parquet
from tubelet_store.commit import StoredObject
from tubelet_store.format import metadata_documents, moments_documents, shard_bytes
from tubelet_store.manifest import Manifest
from tubelet_store.moments import Moments
from tubelet_store.object_keys import ACTIVATIONS, CLIPS, GROUP, MANIFEST, shard_key
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.storage.local import LocalRoot
from tubelet_store.store_state import StoreState, state_document

GOAL_S = 2.0


def write_catalog(path: Path, entries: int, hooks: int, store: str, identity: str, clips: int) -> None:
    """A catalog of `entries` entries, `hooks` to a store; the first store is the one that is there."""
    import yaml

    def blocks(name: str, digest: str) -> tuple[HookBlock, ...]:
        return tuple(
            HookBlock(
                store=name,
                hook=f"blocks.{hook}",
                id=digest,
                shape=(clips, 8, 196, 768),
                dtype="float16",
                grid=(8, 14, 14),
                backbone={"family": "videomae", "id": "MCG-NJU/videomae-base", "revision": "8f4c1d2"},
                dataset={"kind": "kinetics", "name": "k400", "split": "train"},
                sampling={"kind": "dense", "frames": 16, "stride": 4},
                license="CC-BY-4.0",
                owner="team-a",
                created="2026-11-21T00:00:00+00:00",
            )
            for hook in range(hooks)
        )

    add_store(str(path), store, blocks("really", identity))
    data, listed = {}, {}
    for number in range(1, entries // hooks):
        name = f"store-{number}"
        more = _items(f"s3://bucket/{name}.zarr", blocks(name, "sha256:" + hashlib.sha256(name.encode()).hexdigest()))
        data.update(more[0])
        listed.update(more[1])
    head, _, entries_text = path.read_text().partition("\nentries:\n")

    def indented(part: dict[str, object]) -> str:
        text = yaml.dump(part, Dumper=yaml.CSafeDumper, sort_keys=False, width=10_000, default_flow_style=None)
        return "".join(f"  {line}\n" for line in text.splitlines())

    path.write_text(f"{head}\n{indented(data)}entries:\n{entries_text}{indented(listed)}")


def write_store(path: Path, objects: int, hooks: int, clips_per_shard: int) -> str:
    """A store of about `objects` objects; gives its identity."""
    shards = objects // hooks
    plan = Plan(
        dataset={"kind": "kinetics", "name": "k400", "split": "train"},
        clip_table="sha256:none",
        clips=shards * clips_per_shard,
        clips_per_shard=clips_per_shard,
        sampling={"kind": "dense", "frames": 16, "stride": 4},
        preprocessing={},
        backbone={"family": "videomae", "id": "MCG-NJU/videomae-base"},
        grid=Grid(time=8, height=14, width=14),
        hooks=tuple(Hook(name=f"blocks.{hook}", channels=768) for hook in range(hooks)),
    )
    root = LocalRoot(path)
    n = plan.clips
    columns = {
        "clip": np.arange(n),
        "video_id": [f"video-{i:08d}" for i in range(n)],
        "uri": [f"train/{i % 400:03d}/{i:08d}.mp4" for i in range(n)],
        "label": np.arange(n, dtype=np.int32) % 400,
        "view": np.zeros(n, np.int16),
        "status": pa.array(["ok"]).take(pa.array(np.zeros(n, np.int64))),
        "frame_indices": pa.ListArray.from_arrays(
            pa.array(np.arange(n + 1) * 16, pa.int32()), pa.array(np.tile(np.arange(16), n), pa.int32())
        ),
        "shard": (np.arange(n) // clips_per_shard).astype(np.int32),
    }
    table = pa.table(
        [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in FINISHED],
        schema=FINISHED,
    )
    moments = Moments.of(np.random.default_rng(0).standard_normal((64, 768)))
    documents = {
        CLIPS: to_parquet(table),
        **moments_documents({hook.name: moments for hook in plan.hooks}),
        **{key: data for key, data in metadata_documents(plan, {}).items() if key != GROUP},
    }
    for key, data in documents.items():
        root.replace(key, data)
    described = [
        StoredObject(key=key, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for key, data in documents.items()
    ]
    checksums = tuple(range(clips_per_shard))
    for hook in plan.hooks:
        for shard in range(shards):
            key = shard_key(ACTIVATIONS, hook.name, shard)
            size = shard_bytes(plan, ACTIVATIONS, hook, shard)
            digest = hashlib.sha256(key.encode()).hexdigest()
            described.append(StoredObject(key=key, size_bytes=size, sha256=digest, crc32c=checksums))
    manifest = Manifest.of(described, plan)
    root.replace(MANIFEST, manifest.to_parquet())
    state = StoreState(state="complete", plan=plan, plan_digest=plan.digest, identity=manifest.identity, clips_failed=0)
    root.replace(GROUP, state_document(state))
    return manifest.identity


# A process of its own: a child's peak memory counts from before its exec, when it still is its parent.
_RUNNER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
wall_s, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss / 1024]))
"""


def measure(arguments: list[str], folder: Path) -> tuple[float, float, float]:
    """Processor seconds, wall seconds and MiB of resident memory of one command."""
    runner = [sys.executable, "-c", _RUNNER, *arguments]
    answer = subprocess.run(runner, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout
    status, cpu_s, wall_s, mib = json.loads(answer)
    if status != 0:
        raise SystemExit(f"{' '.join(arguments[3:])} ended with {status}")
    return cpu_s, wall_s, mib


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--objects", type=int, default=100_000)
    parser.add_argument("--hooks", type=int, default=4)
    parser.add_argument("--clips-per-shard", type=int, default=16)
    settings = parser.parse_args()
    program = [sys.executable, "-c", "import sys; from tubelet.cli.main import main; sys.exit(main())"]
    manifest = (
        "from tubelet_store.reader import open_store; m = open_store('store.zarr').manifest(); "
        "print(m.identity, sum(1 for _ in m))"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clips = settings.objects // settings.hooks * settings.clips_per_shard
        identity = write_store(folder / "store.zarr", settings.objects, settings.hooks, settings.clips_per_shard)
        write_catalog(
            folder / "catalog.yaml", settings.entries, settings.hooks, str(folder / "store.zarr"), identity, clips
        )
        size_mb = (folder / "catalog.yaml").stat().st_size / 1e6
        print(f"catalog: {settings.entries} entries, {size_mb:.1f} MB")
        print(f"store: {settings.objects} shard objects, {clips} clips")
        print(f"\n{'command':<58}{'cpu s':>8}{'wall s':>8}{'MiB':>7}")
        commands = {
            "version": "--version",
            "list": "catalog list",
            "search": "catalog list --text store-77 --format json",
            "show": f"catalog show store-{settings.entries // settings.hooks - 1}",
            "check": "catalog check really",
            "add": "catalog add another store.zarr",
            "remove": "catalog remove another",
            "info": "info store.zarr",
            "gc": "gc store.zarr",
        }
        goals = []
        for name, words in commands.items():
            cpu_s = report(f"tubelet {words}", [*program, *words.split()], folder)
            goals.append(Goal(f"catalog/{name}-cpu-s", cpu_s, at_most=GOAL_S))
        report("(python) read and check the manifest, walk its objects", [sys.executable, "-c", manifest], folder)
        print("\n".join(goal_lines(goals)))


def report(name: str, command: list[str], folder: Path) -> float:
    """Measure a command and print its row; its processor seconds."""
    cpu_s, wall_s, mib = measure(command, folder)
    print(f"{name:<58}{cpu_s:>8.2f}{wall_s:>8.2f}{mib:>7.0f}", flush=True)
    return cpu_s


if __name__ == "__main__":
    main()
