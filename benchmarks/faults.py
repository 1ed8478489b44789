"""A fault campaign: one extraction to object storage, spoilt some 200 times, then run once more undisturbed.

    python benchmarks/faults.py [--faults 200] [--seed 0] [--videos 40] [--minutes 30]

Faults come from a seed, two at a time: a proxy before the S3 server spoils requests (500, 503, bodies cut short in both
directions, lost and late answers), and an adversary kills workers, the scheduler and the job, sends SIGTERM, and takes
the server away for seconds. A disk that is too small ends the campaign. The store must equal the undisturbed one.

The S3 server is moto on loopback. It keeps objects in memory only, so "restarted" means that it refuses connections for
a while.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
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
from pathlib import Path
from typing import Any

import psutil
import yaml

from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.synthetic.config import VideosConfig
from tubelet_pipeline.synthetic.dataset import make_dataset
from tubelet_store import open_store
from tubelet_store.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
faulty_proxy = importlib.import_module("faulty_proxy")
object_server = importlib.import_module("object_server")

URL = "s3://campaign/store.zarr"
# The adversary lets the job come so far between two strikes: starting workers anew takes longer than all the work.
_SHARDS_BETWEEN = (4, 12)
_RUNS = 60


class Adversary(threading.Thread):
    """Spoils the running job from outside, one thing after the other, until it is told to stop."""

    def __init__(self, cluster: Cluster, proxy: Any, seed: int, wanted: int, until: float) -> None:
        super().__init__(daemon=True)
        self.cluster, self.proxy, self.random = cluster, proxy, random.Random(seed)
        self.wanted, self.until = wanted, until
        self.job: subprocess.Popen[str] | None = None
        self.done: collections.Counter[str] = collections.Counter()
        self.over = threading.Event()

    @property
    def enough(self) -> bool:
        """As many faults as were wanted, or no time left for more."""
        return self.faults >= self.wanted or time.monotonic() > self.until

    @property
    def faults(self) -> int:
        """Faults so far, the proxy's included."""
        return sum(self.done.values()) + sum(self.proxy.faults.values())

    def run(self) -> None:
        """Choose, strike, wait."""
        strikes = [self.kill_worker, self.kill_worker, self.outage, self.outage, self.stop_job, self.kill_scheduler]
        next_at = self.random.randint(*_SHARDS_BETWEEN)
        while not self.over.wait(0.2) and not self.enough:
            job = self.job
            if job is not None and job.poll() is None and self.shards_done() >= next_at:
                self.random.choice(strikes)(job)
                next_at = self.shards_done() + self.random.randint(*_SHARDS_BETWEEN)
        self.proxy.share = 0.0

    def shards_done(self) -> int:
        """Shards that were committed so far, by the job's own log."""
        log = self.cluster.folder / "run.jsonl"
        return log.read_text().count('"event": "shard"') if log.exists() else 0

    def kill_worker(self, _job: subprocess.Popen[str]) -> None:
        """SIGKILL of a worker process; its nanny starts another."""
        if workers := self.cluster.workers():
            self.random.choice(workers).kill()
            self.done["worker killed"] += 1

    def kill_scheduler(self, _job: subprocess.Popen[str]) -> None:
        """SIGKILL of the scheduler; a new one comes up at the same address."""
        self.cluster.restart_scheduler()
        self.done["scheduler lost"] += 1

    def outage(self, _job: subprocess.Popen[str]) -> None:
        """The S3 server refuses connections."""
        before, self.proxy.refuse = self.proxy.refuse, True
        time.sleep(self.random.uniform(1.0, 6.0))
        self.proxy.refuse = before
        self.done["S3 server away"] += 1

    def stop_job(self, job: subprocess.Popen[str]) -> None:
        """SIGTERM, as SLURM preempts; sometimes SIGKILL."""
        kind = self.random.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGKILL])
        job.send_signal(kind)
        self.done[f"job: {kind.name}"] += 1


class Cluster:
    """A scheduler and two workers as processes of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.file = folder / "scheduler.json"
        self.port = 20_000 + os.getpid() % 20_000
        self.scheduler = self._start_scheduler()
        self.nannies = [self._start("worker", "--nthreads", "1", "--death-timeout", "600") for _ in range(2)]

    def restart_scheduler(self) -> None:
        """Kill it, and the workers with it, as the end of the job that held them; start both anew."""
        self.scheduler.kill()
        self.scheduler.wait()
        for nanny in self.nannies:
            _kill_tree(nanny)
        self.scheduler = self._start_scheduler()
        self.nannies = [self._start("worker", "--nthreads", "1", "--death-timeout", "600") for _ in range(2)]

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live, below their nannies."""
        found = []
        for nanny in self.nannies:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(nanny.pid).children()
                found += [p for p in children if "spawn_main" in " ".join(p.cmdline())]
        return found

    def close(self) -> None:
        """End everything."""
        for process in (*self.nannies, self.scheduler):
            _kill_tree(process)

    def _start_scheduler(self) -> subprocess.Popen[bytes]:
        self.file.unlink(missing_ok=True)
        return self._start("scheduler", "--port", str(self.port), "--host", "127.0.0.1", "--dashboard-address", ":0")

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(self.file), *options]
        with (self.folder / f"{kind}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=self.folder)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


def tubelet(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """`tubelet ARGUMENTS` as a process."""
    command = [sys.executable, "-c", "import sys; from tubelet_store.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def campaign(folder: Path, faults: int, seed: int, videos: int, minutes: float) -> dict[str, Any]:
    """Run it; counts and verdicts."""
    make_dataset(
        VideosConfig(out=folder / "videos", videos=videos, frames=20, height=64, width=64, validation_share=0.0)
    )
    for number, path in enumerate(sorted((folder / "videos").rglob("*.webm"))[::10]):
        path.write_bytes(path.read_bytes()[: 300 + number])
    model = write_tiny_videomae(folder / "model", image_size=32, patch_size=8, frames=8, hidden=32, layers=2)
    settings = {
        "dataset": {"kind": "ssv2", "root": str(folder / "videos"), "split": "train"},
        "sampling": {"kind": "dense", "frames": 8, "stride": 2},
        "backbone": {"id": str(model)},
        "hooks": ["blocks.0", "blocks.1"],
        "clips_per_shard": 1,
        "decode": {"processes": 1},
        "upload": {"spool_dir": str(folder / "spool"), "patience_s": 60},
        "log": str(folder / "run.jsonl"),
    }
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    alone = str(folder / "undisturbed.zarr")
    _run_to_end(folder, "undisturbed", {**settings, "store": alone, "cluster": {"workers": 2, "threads": 1}}, quiet)
    undisturbed = open_store(alone)

    began = time.monotonic()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with object_server.s3_server() as server, faulty_proxy.faulty_proxy(server, seed, stall_s=1.0) as (proxy, endpoint):
        object_server.create_bucket(server, "campaign")
        environment = {**quiet, **object_server.s3_environment(endpoint)}
        proxy.kinds = ("500", "503", "429", "truncate", "stall", "reset")
        proxy.write_kinds = faulty_proxy.WRITE_KINDS
        cluster = Cluster(folder, environment)
        job = {**settings, "store": URL, "cluster": {"scheduler_file": str(cluster.file), "threads": 1}}
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        adversary = Adversary(cluster, proxy, seed, faults, time.monotonic() + 60 * minutes)
        proxy.share = 0.3
        adversary.start()
        ends: collections.Counter[str] = collections.Counter()
        try:
            for _ in range(_RUNS):
                process = adversary.job = tubelet(environment, "extract", str(folder / "job.yaml"))
                _, err = process.communicate(timeout=900)
                ends[_ending(process.returncode, err)] += 1
                if process.returncode == 0 and adversary.enough:
                    break
                if process.returncode == 0:
                    # Done too early: all shards but the first again; their objects stay, and are found and adopted.
                    _forget(server, range(1, videos))
            adversary.over.set()
            adversary.join()
            proxy.share, proxy.refuse = 0.0, False
            rerun = tubelet(environment, "extract", str(folder / "job.yaml"))
            _, err = rerun.communicate(timeout=900)
        finally:
            cluster.close()
        os.environ.update(object_server.s3_environment(server))
        found = open_store(URL)
        rows = found.clips().to_pylist()
        result = {
            "faults": {**adversary.done, **{f"request: {k}": v for k, v in proxy.faults.items()}},
            "ends": dict(ends),
            "rerun": rerun.returncode,
            "equal": found.identity == undisturbed.identity,
            "clips_once": [row["clip"] for row in rows] == list(range(videos)),
            "failed_listed": sum(row["status"] == "failed" and bool(row["error"]) for row in rows),
            "damaged": sum(len(findings) for _, findings in verify(found)),
            "spooled": sum(json.loads(line)["event"] == "spooled" for line in (folder / "run.jsonl").open()),
            "left_in_spool": sum(1 for _ in (folder / "spool").rglob("commit.json")),
        }
    result["disk_full"] = disk_full(folder, settings, quiet, undisturbed.identity)
    result["seconds"] = round(time.monotonic() - began)
    return result


def _forget(server: str, shards: range) -> None:
    """Take commit records and the completion away, so that the job has something to do again."""
    import boto3

    s3 = boto3.client("s3", endpoint_url=server, aws_access_key_id="x", aws_secret_access_key="x")
    for shard in shards:
        s3.delete_object(Bucket="campaign", Key=f"store.zarr/commits/{shard:06d}.json")
    document = json.loads(s3.get_object(Bucket="campaign", Key="store.zarr/zarr.json")["Body"].read())
    document["attributes"]["tubelet"] |= {"state": "writing", "identity": None, "clips_failed": None}
    s3.put_object(Bucket="campaign", Key="store.zarr/zarr.json", Body=json.dumps(document).encode())


def disk_full(folder: Path, settings: dict[str, Any], environment: dict[str, str], identity: str) -> str:
    """Write to a disk that is too small, give it room, run again."""
    with _small_disk(folder / "disk") as (disk, grow):
        job = {**settings, "store": str(disk / "s.zarr"), "cluster": {"workers": 2, "threads": 1}}
        job["log"] = str(folder / "full.jsonl")
        path = folder / "full.yaml"
        path.write_text(yaml.safe_dump(job))
        first = tubelet(environment, "extract", str(path))
        _, err = first.communicate(timeout=600)
        said = err.strip().splitlines()[-1][:120] if err.strip() else ""
        grow()
        again = tubelet(environment, "extract", str(path))
        _, err = again.communicate(timeout=600)
        same = again.returncode == 0 and open_store(job["store"]).identity == identity
    return f"exit {first.returncode} ({said}); with room: exit {again.returncode}, {'equal' if same else 'DIFFERENT'}"


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[tuple[Path, Any]]:
    """A tmpfs that is too small, and what makes it large enough."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        raise SystemExit("the disk-full part needs the right to mount a tmpfs (root)")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def _ending(status: int, err: str) -> str:
    if status == 0:
        return "exit 0"
    line = next((line for line in reversed(err.splitlines()) if line.startswith("tubelet:")), "")
    words = " ".join(line.removeprefix("tubelet: ").removeprefix("error: ").split()[:6])
    traceback = " TRACEBACK" if "Traceback (most recent call last)" in err and status not in (-9,) else ""
    return f"exit {status}: {words}{traceback}"


def _run_to_end(folder: Path, name: str, settings: dict[str, Any], environment: dict[str, str]) -> None:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    process = tubelet(environment, "extract", str(path))
    _, err = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"the undisturbed run failed: {err}")


def main() -> int:
    """Print the table; exit status 1 where the store is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=30, help="inject no faults after so long")
    parser.add_argument("--keep", action="store_true", help="keep the working folder")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="tubelet-extract-faults-"))
    try:
        result = campaign(folder, options.faults, options.seed, options.videos, options.minutes)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"seed {options.seed}, {options.videos} clips in as many shards, {result['seconds']} s")
    print(f"{'fault':32}{'times':>6}")
    for name, times in sorted(result["faults"].items()):
        print(f"{name:32}{times:6}")
    print(f"{'all':32}{sum(result['faults'].values()):6}")
    print("\nhow the runs of the job ended")
    for name, times in sorted(result["ends"].items()):
        print(f"{times:6}  {name}")
    print(f"\nfinished shards that waited in a spool   {result['spooled']} ({result['left_in_spool']} left there)")
    print(f"rerun, undisturbed                       exit {result['rerun']}")
    print(f"store equals the undisturbed one         {result['equal']}")
    print(
        f"every clip accounted for exactly once    {result['clips_once']}, {result['failed_listed']} failed with reason"
    )
    print(f"damaged objects found by verify          {result['damaged']}")
    print(f"disk full                                {result['disk_full']}")
    good = result["equal"] and result["clips_once"] and not result["damaged"] and not result["rerun"]
    return 0 if good and "equal" in result["disk_full"] else 1


if __name__ == "__main__":
    sys.exit(main())
