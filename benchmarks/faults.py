"""A fault campaign: one extraction to object storage, spoilt more than 200 times, then run once more undisturbed.

    python benchmarks/faults.py [--seed 0] [--videos 120] [--strikes 20] [--share 0.15] [--least 200]

A seed decides what strikes, and after how many committed shards. A proxy before the S3 server spoils a share of all
requests: 500, 503 and 429, bodies cut short in both directions, connections reset, answers lost, late or stalled. The
two workers take two shards at a time each, as docs/clusters.md starts them. An adversary strikes from outside:

    worker killed         SIGKILL of a worker process; its nanny starts another
    worker preempted      SIGTERM of a worker and its nanny, as SLURM ends a job of workers; another one is started
    scheduler lost        SIGKILL of the scheduler that `--scheduler ADDRESS` names, and of its workers; restarted
    network away          every connection is refused for seconds
    S3 server restarted   the server ends, and comes back at the same address with the same objects
    job: SIGTERM, SIGKILL the driver, as SLURM preempts it or the kernel's OOM killer does; the same command runs again
    disk full             the disk of the workers' scratch files and spool fills up while they write; room comes later

A job that ended by a fault is started again by the same command, as its message says. Then the same for a store on a
local disk that fills up. Both stores must equal the undisturbed one: identity, and every byte of every object.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from goals import Goal, goal_lines
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_store.reader import open_store
from tubelet_store.storage import open_root
from tubelet_store.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
faulty_proxy = importlib.import_module("faulty_proxy")
object_server = importlib.import_module("object_server")

URL = "s3://campaign/store.zarr"
_RUNS = 60
_WORKERS = 2
_SHARDS_AT_A_TIME = 2
_READ_KINDS = ("500", "503", "429", "truncate", "stall", "reset")
# How many of 20 strikes are of each kind: what costs a user most is rarest.
_OF_TWENTY = {
    "worker killed": 7,
    "worker preempted": 2,
    "scheduler lost": 2,
    "network away": 2,
    "S3 server restarted": 2,
    "job: SIGTERM": 2,
    "job: SIGKILL": 1,
    "disk full": 2,
}
_DISK_MB = 4


@dataclass
class Job:
    """The driver's process, and what its log says of it."""

    log: Path
    process: subprocess.Popen[str] | None = None

    @property
    def runs(self) -> bool:
        """Whether it lives."""
        return self.process is not None and self.process.poll() is None

    def shards_done(self) -> int:
        """Shards that are committed: those this run found, and those it saw committed since."""
        done = 0
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            if '"event": "start"' in line:
                event = json.loads(line)
                done = event["shards"] - event["pending"]
            done += '"event": "shard"' in line
        return done


class Cluster:
    """A scheduler at a fixed address and two workers, each in a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.address = f"tcp://127.0.0.1:{20_000 + os.getpid() % 20_000}"
        self.restart()

    def restart(self) -> None:
        """Start scheduler and workers."""
        _, _, port = self.address.rpartition(":")
        self.scheduler = self._start("scheduler", "--port", port, "--host", "127.0.0.1", "--no-dashboard")
        self.nannies = [self._start_worker() for _ in range(_WORKERS)]

    def lose_scheduler(self) -> None:
        """Kill it, and the workers with it, as the end of the job that held them; restart all."""
        self.close()
        self.restart()

    def preempt_worker(self, number: int) -> None:
        """SIGTERM of a worker with its nanny; another one is started."""
        nanny = self.nannies[number]
        processes = [nanny.pid, *(child.pid for child in psutil.Process(nanny.pid).children())]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            nanny.wait(30)
        _kill_tree(nanny)
        self.nannies[number] = self._start_worker()

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live, below their nannies."""
        processes = []
        for nanny in self.nannies:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(nanny.pid).children()
                processes += [p for p in children if "spawn_main" in " ".join(p.cmdline())]
        return processes

    def close(self) -> None:
        """End everything."""
        for process in (*self.nannies, self.scheduler):
            _kill_tree(process)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        threads = ("--nthreads", str(_SHARDS_AT_A_TIME))
        return self._start("worker", self.address, *threads, "--no-dashboard", "--death-timeout", "600")

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{kind}.log").open("ab") as log:
            command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *options]
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.folder)


class Adversary(threading.Thread):
    """Spoils the running job from outside, one fault after the other, each when its number of shards is committed."""

    def __init__(
        self, job: Job, cluster: Cluster, proxy: Any, server: Any, disk: Disk, schedule: list[tuple[int, str]]
    ):
        super().__init__(daemon=True)
        self.job, self.cluster, self.proxy, self.server, self.disk = job, cluster, proxy, server, disk
        self.schedule = collections.deque(schedule)
        self.random = random.Random(str(schedule))
        self.done: collections.Counter[str] = collections.Counter()
        self.over = threading.Event()

    def run(self) -> None:
        """Strike when it is time."""
        while self.schedule and not self.over.wait(0.1):
            at, kind = self.schedule[0]
            if self.job.runs and self.job.shards_done() >= at and self.strike(kind):
                self.done[kind] += 1
                self.schedule.popleft()

    def strike(self, kind: str) -> bool:
        """Do it; False where there was nothing to strike."""
        if kind == "worker killed":
            workers = self.cluster.workers()
            with contextlib.suppress(psutil.Error):
                self.random.choice(workers or [psutil.Process()]).send_signal(signal.SIGKILL if workers else 0)
            return bool(workers)
        if kind == "worker preempted":
            self.cluster.preempt_worker(self.random.randrange(_WORKERS))
        elif kind == "scheduler lost":
            self.cluster.lose_scheduler()
        elif kind == "network away":
            self.proxy.refuse = True
            time.sleep(self.random.uniform(1.0, 6.0))
            self.proxy.refuse = False
        elif kind == "S3 server restarted":
            self.server.stop()
            time.sleep(self.random.uniform(0.5, 4.0))
            self.server.start()
        elif kind == "disk full":
            with self.disk.full():
                time.sleep(self.random.uniform(1.0, 4.0))
        else:
            assert self.job.process is not None
            self.job.process.send_signal(signal.Signals[kind.removeprefix("job: ")])
        return True


class Disk:
    """A small tmpfs that can be filled to the last byte."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            raise SystemExit("a disk that fills up needs the right to mount a tmpfs (root)")

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Nothing can be written inside the context."""
        ballast = self.folder / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        try:
            yield
        finally:
            ballast.unlink()

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def tubelet(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """`tubelet ARGUMENTS` as a process."""
    command = [sys.executable, "-c", "import sys; from tubelet.cli.main import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def make_schedule(seed: int, strikes: int, shards: int) -> list[tuple[int, str]]:
    """(committed shards, kind) of each strike, in order: kinds in their shares, within the first 95 % of the job."""
    order = random.Random(seed)
    kinds = [kind for kind, share in _OF_TWENTY.items() for _ in range(-(-share * strikes // 20))]
    order.shuffle(kinds)
    return list(zip(sorted(order.sample(range(1, int(0.95 * shards)), len(kinds))), kinds, strict=True))


def campaign(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run it; counts and verdicts."""
    videos, seed = options.videos, options.seed
    make_dataset(
        VideosConfig(out=folder / "videos", videos=videos, frames=20, height=64, width=64, validation_share=0.0)
    )
    for number, path in enumerate(sorted((folder / "videos").rglob("*.webm"))[::20]):
        path.write_bytes(path.read_bytes()[: 300 + number])
    model = write_tiny_videomae(folder / "model", image_size=32, patch_size=8, frames=8, hidden=32, layers=2)
    settings = {
        "dataset": {"kind": "ssv2", "root": str(folder / "videos"), "split": "train"},
        "sampling": {"kind": "dense", "frames": 8, "stride": 2},
        "backbone": {"id": str(model)},
        "hooks": ["blocks.0", "blocks.1"],
        "clips_per_shard": 1,
        "decode": {"processes": 1},
        "upload": {"spool_dir": str(folder / "scratch" / "spool"), "patience_s": 60},
        "log": str(folder / "run.jsonl"),
    }
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    alone = str(folder / "undisturbed.zarr")
    local = {"cluster": {"workers": _WORKERS, "threads": 1}}
    _run_to_end(folder, "undisturbed", {**settings, "store": alone, "log": str(folder / "alone.jsonl"), **local}, quiet)
    undisturbed = _bytes(alone)

    began = time.monotonic()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = object_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, server._port = server.get_host_and_port()  # where it comes back
    upstream = f"http://{host}:{server._port}"
    disk = Disk(folder / "scratch", _DISK_MB)
    with faulty_proxy.faulty_proxy(upstream, seed, stall_s=1.0) as (proxy, endpoint):
        object_server.create_bucket(upstream, "campaign")
        environment = {**quiet, **object_server.s3_environment(endpoint), "TMPDIR": str(disk.folder)}
        proxy.kinds, proxy.write_kinds = _READ_KINDS, faulty_proxy.WRITE_KINDS
        cluster = Cluster(folder, environment)
        settings["cluster"] = {"threads": 1}
        (folder / "job.yaml").write_text(yaml.safe_dump({**settings, "store": URL}))
        command = ("extract", str(folder / "job.yaml"), "--scheduler", cluster.address)
        job = Job(folder / "run.jsonl")
        adversary = Adversary(job, cluster, proxy, server, disk, make_schedule(seed, options.strikes, videos))
        proxy.share = options.share
        adversary.start()
        ends: collections.Counter[str] = collections.Counter()
        try:
            for _ in range(_RUNS):
                job.process = tubelet(environment, *command)
                _, err = job.process.communicate(timeout=1800)
                with (folder / "job.err").open("a") as file:
                    file.write(err)
                ends[_ending(job.process.returncode, err)] += 1
                if job.process.returncode == 0:
                    break
            adversary.over.set()
            adversary.join()
            proxy.share = 0.0
            rerun = tubelet(environment, *command)
            _, err = rerun.communicate(timeout=900)
        finally:
            cluster.close()
            disk.close()
        os.environ.update(object_server.s3_environment(upstream))
        store = open_store(URL)
        rows = store.clips().to_pylist()
        events = [json.loads(line) for line in job.log.open()]
        result = {
            "faults": {**adversary.done, **{f"request: {k}": v for k, v in proxy.faults.items()}},
            "missed": len(adversary.schedule),
            "ends": dict(ends),
            "rerun": rerun.returncode,
            "identity": store.identity == open_store(alone).identity,
            "bytes": _bytes(URL) == undisturbed,
            "clips_once": [row["clip"] for row in rows] == list(range(videos)),
            "failed_listed": sum(row["status"] == "failed" and bool(row["error"]) for row in rows),
            "damaged": sum(len(findings) for _, findings in verify(store)),
            "spooled": sum(event["event"] == "spooled" for event in events),
            "reconnected": sum(event["event"] == "lost" for event in events),
            "left_in_spool": sum(1 for _ in (folder / "scratch" / "spool").rglob("commit.json")),
        }
    server.stop()
    result["local"] = local_disk_full(folder, {**settings, **local}, quiet, undisturbed)
    result["seconds"] = round(time.monotonic() - began)
    return result


def local_disk_full(
    folder: Path, settings: dict[str, Any], environment: dict[str, str], undisturbed: dict[str, str]
) -> dict[str, Any]:
    """Extract to a local disk that fills up after 1/4, 1/2 and 3/4 of the shards; how the runs ended, the verdict."""
    disk = Disk(folder / "disk", 64)
    log, path = folder / "full.jsonl", folder / "full.yaml"
    store = str(disk.folder / "s.zarr")
    path.write_text(yaml.safe_dump({**settings, "store": store, "log": str(log)}))
    job, ends = Job(log), []
    try:
        for part in (1, 2, 3, 4):
            job.process = tubelet(environment, "extract", str(path))
            while part < 4 and job.runs and job.shards_done() < part * len(undisturbed) // 8:
                time.sleep(0.05)
            with disk.full() if part < 4 else contextlib.nullcontext():
                _, err = job.process.communicate(timeout=600)
            ends.append(_ending(job.process.returncode, err, 14))
        return {"ends": ends, "bytes": job.process is not None and _bytes(store) == undisturbed}
    finally:
        disk.close()


def _bytes(url: str) -> dict[str, str]:
    """SHA-256 of every object that the store's identity covers, and of the manifest, by key."""
    root = open_root(url)
    keys = [key for key in root.list_keys() if key != "zarr.json" and not key.startswith("commits/")]
    return {key: hashlib.sha256(root.read(key)).hexdigest() for key in keys}


def _ending(status: int, err: str, words: int = 6) -> str:
    if status == 0:
        return "exit 0"
    line = next((line for line in reversed(err.splitlines()) if line.startswith("tubelet:")), "")
    message = " ".join(line.removeprefix("tubelet: ").removeprefix("error: ").split()[:words])
    traceback = " TRACEBACK" if "Traceback (most recent call last)" in err and status != -signal.SIGKILL else ""
    return f"exit {status}: {message}{traceback}"


def _run_to_end(folder: Path, name: str, settings: dict[str, Any], environment: dict[str, str]) -> None:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    process = tubelet(environment, "extract", str(path))
    _, err = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed: {err}")


def main() -> int:
    """Print the table; exit status 1 where the store is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--strikes", type=int, default=20, help="faults of processes, servers and disks")
    parser.add_argument("--share", type=float, default=0.15, help="of requests that are spoilt")
    parser.add_argument("--least", type=int, default=200, help="faults below which the campaign proves too little")
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="tubelet-extract-faults-"))
    try:
        result = campaign(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"seed {options.seed}, {options.videos} clips in as many shards, {_WORKERS} workers that take "
        f"{_SHARDS_AT_A_TIME} at a time, {result['seconds']} s"
    )
    print(f"{'fault':32}{'times':>6}")
    for name, times in sorted(result["faults"].items()):
        print(f"{name:32}{times:6}")
    total = sum(result["faults"].values())
    print(f"{'all':32}{total:6}")
    if result["missed"]:
        print(f"{result['missed']} strikes were not reached: the job was done")
    print("\nhow the runs of the job ended")
    for name, times in sorted(result["ends"].items()):
        print(f"{times:6}  {name}")
    print(f"\nscheduler found again within a run       {result['reconnected']} times")
    print(f"finished shards that waited in a spool   {result['spooled']} ({result['left_in_spool']} left there)")
    print(f"rerun, undisturbed                       exit {result['rerun']}")
    print(f"store equals the undisturbed one         identity {result['identity']}, bytes {result['bytes']}")
    print(
        f"every clip accounted for exactly once    {result['clips_once']}, {result['failed_listed']} failed with reason"
    )
    print(f"damaged objects found by verify          {result['damaged']}")
    print("\na local disk that fills up three times while the store is written")
    for end in result["local"]["ends"]:
        print(f"        {end}")
    print(f"store equals the undisturbed one         bytes {result['local']['bytes']}")
    tracebacks = sum("TRACEBACK" in end for end in (*result["ends"], *result["local"]["ends"]))
    stores_equal = (result["identity"] and result["bytes"]) + result["local"]["bytes"]
    goals = [
        Goal("faults/faults", total, at_least=options.least),
        Goal("faults/strikes-missed", result["missed"], at_most=0),
        Goal("faults/stores-equal-undisturbed", stores_equal, at_least=2),
        Goal("faults/clips-once", int(result["clips_once"]), at_least=1),
        Goal("faults/damaged-objects", result["damaged"], at_most=0),
        Goal("faults/rerun-exit-status", result["rerun"], at_most=0),
        Goal("faults/tracebacks", tracebacks, at_most=0),
    ]
    print("\n".join(goal_lines(goals)))
    return 0 if all(goal.is_met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
