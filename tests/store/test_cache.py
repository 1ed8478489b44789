"""A cache gives the bytes that were written, within its budget, for many processes that may be killed."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec.config
import numpy as np
import pytest

from object_server import create_bucket, lead_to, s3_server
from stores import make_plan, make_store, upload
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.reader import Store, open_store
from tubelet_store.storage import open_root
from tubelet_store.storage.client import RetryPolicy
from tubelet_store.storage.fsspec_client import FsspecClient
from tubelet_store.storage.obstore_client import ObstoreClient
from tubelet_store.storage.remote import open_client

PLAN = make_plan(clips=38, clips_per_shard=4, grid=(2, 2, 3), hooks={"h": 8, "g": 4})
SHARD = 4 * 12 * 8 * 2 + 16 * 4 + 4
"""Bytes of a whole shard of hook h."""


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN, failed=(5,))


@pytest.fixture
def url(local) -> str:
    return upload(local, f"memory://{uuid.uuid4().hex}/s.zarr")


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        lead_to(endpoint, patch)
        create_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture(scope="module")
def s3_url(local, endpoint) -> str:
    return upload(local, "s3://bucket/deep/s.zarr")


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "boots"))


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_a_cached_shard_is_the_local_one(local, s3_url, tmp_path, client):
    store = open_store(s3_url, cache=CacheConfig(directory=tmp_path / "m", client=client))
    assert store.cache.client.name == client
    for hook in ("h", "g"):
        for shard in range(PLAN.shards):
            mapped = store.shard_map(hook, shard)
            assert same(mapped, local.shard_map(hook, shard))
            assert not mapped.flags.writeable
    assert store.identity == local.identity
    assert store.clips().equals(local.clips())
    assert np.array_equal(store.moments("h").mean, local.moments("h").mean)


def test_what_was_fetched_is_not_fetched_again(url, tmp_path):
    config = CacheConfig(directory=tmp_path)
    first = open_store(url, cache=config).shard_map("h", 0)
    store = open_store(url, cache=config)
    open_root(url)._fs.rm(open_root(url)._path("activations"), recursive=True)
    assert same(store.shard_map("h", 0), first)
    with pytest.raises(TubeletError, match="activations/h/c/1/0/0/0 is missing"):
        store.shard_map("h", 1)


def test_the_budget_is_kept_and_the_longest_unused_goes(url, local, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=3 * SHARD))
    for shard in (0, 1, 2, 0, 3):
        assert same(store.shard_map("h", shard), local.shard_map("h", shard))
        assert store.cache.held_bytes() <= 3 * SHARD
        time.sleep(0.01)
    names = {store.shard_object("h", shard).stored.sha256 for shard in (0, 2, 3)}
    assert {path.name for path in files(tmp_path)} == names


def test_a_map_in_use_is_never_evicted(url, local, tmp_path, monkeypatch):
    monkeypatch.setattr("tubelet_store.cache.shard_files._PATIENCE_S", 0.2)
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=2 * SHARD))
    held = store.shard_map("h", 0)[1:]
    for shard in (1, 2, 3, 4):
        store.shard_map("h", shard)
        assert (tmp_path / "objects" / store.shard_object("h", 0).stored.sha256).exists()
    other = store.shard_map("h", 5)
    with pytest.raises(TubeletError, match="open memory maps leave no evictable space"):
        store.shard_map("h", 6)
    del other
    gc.collect()
    assert same(store.shard_map("h", 6), local.shard_map("h", 6))
    assert same(held, local.shard_map("h", 0)[1:])


def test_an_evicted_file_leaves_its_live_map_right(url, local, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    mapped = store.shard_map("h", 0)
    for path in files(tmp_path):
        path.unlink()
    assert same(mapped, local.shard_map("h", 0))
    assert same(store.shard_map("h", 0), local.shard_map("h", 0))


def test_a_budget_below_one_shard_says_what_is_needed(url, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=SHARD - 1))
    with pytest.raises(TubeletError, match=rf"{SHARD} bytes.*at least {SHARD} bytes"):
        store.shard_map("h", 0)
    assert files(tmp_path) == []


def test_versions_of_a_store_never_mix(local, tmp_path, tmp_path_factory):
    other = make_store(tmp_path_factory.mktemp("other") / "s.zarr", PLAN, seed=1)
    config = CacheConfig(directory=tmp_path)
    url = upload(local, f"memory://{uuid.uuid4().hex}/s.zarr")
    old = open_store(url, cache=config)
    assert same(old.shard_map("h", 0), local.shard_map("h", 0))
    upload(other, url)
    new = open_store(url, cache=config)
    assert same(new.shard_map("h", 0), other.shard_map("h", 0))
    assert same(old.shard_map("h", 0), local.shard_map("h", 0))
    with pytest.raises(TubeletError, match="clip 4 arrives damaged"):
        old.shard_map("h", 1)


class TestDamageAtTheSource:
    """What is wrong there is named, and never mapped."""

    def damage(self, url: str, key: str, place: int) -> None:
        root = open_root(url)
        data = bytearray(root.read(key))
        data[place] ^= 4
        root.replace(key, bytes(data))

    @pytest.mark.parametrize(
        ("place", "words"), [(0, "clip 4 "), (SHARD - 69, "clip 7 "), (-1, "the index"), (-30, "the index")]
    )
    def test_of_a_shard(self, url, tmp_path, place, words):
        self.damage(url, "activations/h/c/1/0/0/0", place)
        store = open_store(url, cache=CacheConfig(directory=tmp_path))
        with pytest.raises(TubeletError, match=f"activations/h/c/1/0/0/0: {words}.*8 attempts"):
            store.shard_map("h", 1)
        assert not list((tmp_path / "objects").iterdir())

    @pytest.mark.parametrize("key", ["clips.parquet", "moments/h/mean/c/0"])
    def test_of_a_small_object(self, url, tmp_path, key):
        self.damage(url, key, 4)
        store = open_store(url, cache=CacheConfig(directory=tmp_path))
        with pytest.raises(TubeletError, match="damaged: its digest is not the manifest's"):
            store.clips() if key == "clips.parquet" else store.moments("h")

    def test_of_the_manifest(self, url, tmp_path):
        self.damage(url, "manifest.parquet", 500)
        with pytest.raises(TubeletError, match=r"manifest\.parquet"):
            open_store(url, cache=CacheConfig(directory=tmp_path)).shard_map("h", 1)

    def test_forged_checksums_are_found_by_the_digest(self, url, local, tmp_path):
        store = open_store(url, cache=CacheConfig(directory=tmp_path, check="sha256"))
        wanted = store.shard_object("h", 0)
        forged = wanted.stored.model_copy(update={"sha256": "0" * 64})
        with pytest.raises(TubeletError, match="changed on purpose"):
            store.cache.open(type(wanted)(forged, wanted.clip_bytes, wanted.first_clip, wanted.tail))
        assert same(store.shard_map("h", 0), local.shard_map("h", 0))


class TestWhatWasCutOff:
    """Parts that came are kept, and checked before they count."""

    def partial(self, url: str, folder: Path, monkeypatch) -> tuple[LocalCache, object]:
        """A download that fails after its first two parts."""
        monkeypatch.setattr("tubelet_store.cache.shard_object._PART_BYTES", 1)
        store = open_store(url, cache=CacheConfig(directory=folder, connections=1))
        wanted = store.shard_object("h", 0)
        read_range, calls = store.cache.client.read_range, []

        def fails_later(key: str, start: int, stop: int):
            calls.append(start)
            if len(calls) > 2:
                raise OSError("cut")
            return read_range(key, start, stop)

        monkeypatch.setattr(store.cache.client, "read_range", fails_later)
        with pytest.raises(OSError, match="cut"):
            store.cache.open(wanted)
        calls.clear()
        monkeypatch.setattr(
            store.cache.client, "read_range", lambda *args: (calls.append(args[1]), read_range(*args))[1]
        )
        return store, calls

    def test_only_the_rest_is_fetched(self, url, local, tmp_path, monkeypatch):
        store, calls = self.partial(url, tmp_path, monkeypatch)
        assert same(store.shard_map("h", 0), local.shard_map("h", 0))
        assert sorted(calls) == [2 * SHARD // 4 // 100 * 0 + 2 * 192, 3 * 192]
        assert [path.parent.name for path in files(tmp_path)] == ["objects"]

    def test_what_a_power_cut_lost_is_fetched_again(self, url, local, tmp_path, monkeypatch):
        store, calls = self.partial(url, tmp_path, monkeypatch)
        partial = tmp_path / "partial" / store.shard_object("h", 0).stored.sha256
        with partial.open("r+b") as file:
            file.write(bytes(192))
        assert same(store.shard_map("h", 0), local.shard_map("h", 0))
        assert sorted(calls) == [0, 2 * 192, 3 * 192]

    def test_it_makes_room_where_room_is_needed(self, url, local, tmp_path, monkeypatch):
        store, _ = self.partial(url, tmp_path, monkeypatch)
        small = open_store(url, cache=CacheConfig(directory=tmp_path, budget=SHARD))
        assert same(small.shard_map("h", 1), local.shard_map("h", 1))
        assert [path.name for path in files(tmp_path)] == [store.shard_object("h", 1).stored.sha256]


def test_a_truncated_file_in_the_directory_is_fetched_again(url, local, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    store.shard_map("h", 0)
    gc.collect()
    os.truncate(files(tmp_path)[0], 10)
    assert same(store.shard_map("h", 0), local.shard_map("h", 0))


def test_what_is_expected_is_there_ahead_and_evicted_last(url, local, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=4 * SHARD))
    store.shard_map("h", 9)
    store.prefetch("h", [3, 1, 4, 2, 5, 6])
    names = {store.shard_object("h", shard).stored.sha256 for shard in (3, 1, 4, 2)}
    deadline = time.monotonic() + 10
    while {path.name for path in files(tmp_path)} != names and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {path.name for path in files(tmp_path)} == names
    store.shard_map("h", 3)
    store.shard_map("h", 7)
    kept = {path.name for path in files(tmp_path)}
    assert kept == {store.shard_object("h", shard).stored.sha256 for shard in (3, 1, 4, 7)}


def threads() -> set[str]:
    return {thread.name.partition("_")[0] for thread in threading.enumerate() if thread.name.startswith("tubelet")}


def test_a_cache_that_is_not_used_any_more_leaves_no_thread(url, tmp_path):
    before = threads()
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    store.prefetch("h", [0, 1, 2])
    deadline = time.monotonic() + 20
    while "tubelet-ahead" in threads() or not store.cache._files.has(store.shard_object("h", 2).stored):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Asked again, it begins again.
    store.prefetch("h", [3])
    while not store.cache._files.has(store.shard_object("h", 3).stored):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    del store
    gc.collect()
    while threads() - before:
        assert time.monotonic() < deadline, threads()
        time.sleep(0.01)


ENDS = """
import sys, time
from test_cache import PLAN, make_store, upload
from tubelet_store.reader import open_store
from tubelet_store.cache import shard_object
from tubelet_store.cache import CacheConfig
from pathlib import Path

shard_object._PART_BYTES = 1
url = upload(make_store(Path(sys.argv[1]) / "s.zarr", PLAN), "memory://ends/s.zarr")
store = open_store(url, cache=CacheConfig(directory=Path(sys.argv[1]) / "m", connections=1))
read = store.cache.client.read_range

def slow(key, start, stop):
    print(key, flush=True)
    time.sleep(0.3)
    return read(key, start, stop)

store.cache.client.read_range = slow
# Nine shards of four parts each, two shards at once through one connection: one part is on its way, one waits.
store.prefetch("h", range(9))
time.sleep(0.1)
"""


def test_a_process_that_ends_waits_for_what_is_on_its_way_only(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert 1 <= len(done.stdout.splitlines()) <= 2


def test_a_full_disk_is_one_clear_line(url, tmp_path, monkeypatch):
    def full(descriptor: int, start: int, size_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    with pytest.raises(TubeletError, match="disk has no room"):
        store.shard_map("h", 0)
    assert files(tmp_path) == []


def test_a_disk_that_fills_before_the_budget_evicts(url, local, tmp_path, monkeypatch):
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    store.shard_map("h", 0)
    store.shard_map("h", 1)
    real = os.posix_fallocate

    def nearly_full(descriptor: int, start: int, size_bytes: int) -> None:
        if len(list((tmp_path / "objects").iterdir())) > 1:
            raise OSError(28, "No space left on device")
        real(descriptor, start, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    assert same(store.shard_map("h", 2), local.shard_map("h", 2))


READER = """
import sys
from pathlib import Path
import numpy as np
from tubelet_store.reader import open_store
from tubelet_store.cache import CacheConfig
remote, local, folder, budget, seed, rounds = sys.argv[1:]
store = open_store(remote, cache=CacheConfig(directory=Path(folder), budget=int(budget)))
truth = open_store(local)
rng = np.random.default_rng(int(seed))
for shard in rng.integers(0, store.plan.shards, int(rounds)):
    store.prefetch("h", [int(s) for s in rng.permutation(store.plan.shards)[:3]])
    mapped = store.shard_map("h", int(shard))
    assert mapped.tobytes() == truth.shard_map("h", int(shard)).tobytes()
    del mapped
print("right")
"""


def read_in_processes(count: int, rounds: int, *arguments: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", READER, *arguments, str(seed), str(rounds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(count)
    ]


def test_eight_processes_share_a_cache_that_is_too_small_for_them(local, s3_url, tmp_path):
    budget = 9 * SHARD
    readers = read_in_processes(8, 8, s3_url, local.url, str(tmp_path), str(budget))
    watch = open_store(s3_url, cache=CacheConfig(directory=tmp_path, budget=budget)).cache
    most = 0
    while any(reader.poll() is None for reader in readers):
        most = max(most, watch.held_bytes())
        time.sleep(0.005)
    for reader in readers:
        out, err = reader.communicate()
        assert (reader.returncode, out) == (0, "right\n"), err
    assert SHARD < most <= budget


def test_killed_processes_leave_nothing_that_hinders_others(local, s3_url, tmp_path):
    readers = read_in_processes(3, 100_000, s3_url, local.url, str(tmp_path), str(4 * SHARD))
    while not list(tmp_path.glob("objects/*")):
        time.sleep(0.02)
    for reader in readers:
        reader.send_signal(signal.SIGKILL)
        reader.communicate()
    store = open_store(s3_url, cache=CacheConfig(directory=tmp_path, budget=4 * SHARD))
    for shard in range(PLAN.shards):
        assert same(store.shard_map("h", shard), local.shard_map("h", shard))
    assert store.cache.held_bytes() <= 4 * SHARD


class TestAfterAFork:
    """Use in the parent, fork, use in the child: right, or a clear error, and never a wait without end."""

    def in_child(self, work) -> int:
        child = os.fork()
        if child == 0:
            os._exit(0 if work() else 3)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_fsspec_works(self, local, s3_url, tmp_path):
        store = open_store(s3_url, cache=CacheConfig(directory=tmp_path, client="fsspec"))
        store.shard_map("h", 0)
        code = self.in_child(lambda: same(store.shard_map("h", 1), local.shard_map("h", 1)))
        assert code == 0
        assert same(store.shard_map("h", 2), local.shard_map("h", 2))

    def test_after_obstore_a_child_reads_through_fsspec(self, local, s3_url, tmp_path):
        store = open_store(s3_url, cache=CacheConfig(directory=tmp_path))
        assert isinstance(store.cache.client, ObstoreClient)
        store.shard_map("h", 0)

        def child() -> bool:
            fresh = open_store(s3_url, cache=CacheConfig(directory=tmp_path))
            return (
                type(fresh.cache.client) is FsspecClient
                and same(fresh.shard_map("h", 1), local.shard_map("h", 1))
                and same(store.shard_map("h", 2), local.shard_map("h", 2))
            )

        assert self.in_child(child) == 0

    def test_obstore_demanded_is_refused(self, s3_url, tmp_path):
        client = open_client(s3_url, "obstore")
        client.size("zarr.json")

        def child() -> bool:
            try:
                open_client(s3_url, "obstore")
            except TubeletError as error:
                return "spawn" in str(error)
            return False

        assert self.in_child(child) == 0


def test_what_travels_holds_no_credentials(s3_url, tmp_path):
    store = open_store(s3_url, cache=CacheConfig(directory=tmp_path))
    store.shard_map("h", 0)
    for each in (store.cache, store.cache.client, FsspecClient(s3_url), store.root):
        traveled = pickle.dumps(each)
        assert b"a-secret" not in traveled
        assert b"AKIA" not in traveled
        assert b"a-secret" not in repr(each).encode()
    arrived = pickle.loads(pickle.dumps(store.cache))
    assert arrived.open(store.shard_object("h", 1)).read(4)


def test_endpoint_and_credentials_come_from_fsspecs_settings_too(s3_url, endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    settings = {"endpoint_url": endpoint, "key": "AKIAEXAMPLE", "secret": "a-secret"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    for name in ("fsspec", "obstore"):
        assert open_client(s3_url, name, RetryPolicy(attempts=2)).size("zarr.json") > 0


def test_no_other_process_locks_a_kept_file(url, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path))
    mapped = store.shard_map("h", 0)
    with files(tmp_path)[0].open("rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del mapped
        gc.collect()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TestTheVerb:
    """`tubelet cache` fills the directory ahead."""

    def test_it_fetches_the_given_hooks(self, url, local, tmp_path, capsys):
        assert main(["cache", url, "--directory", str(tmp_path), "--hooks", "[g]"]) == 0
        assert "10 of 10 shard objects" in capsys.readouterr().out
        store = open_store(url, cache=CacheConfig(directory=tmp_path))
        names = {store.shard_object("g", shard).stored.sha256 for shard in range(PLAN.shards)}
        assert {path.name for path in files(tmp_path)} == names

    def test_it_stops_at_the_budget_and_says_so(self, url, tmp_path, capsys):
        assert main(["cache", url, "--directory", str(tmp_path), "--budget", str(3 * SHARD), "--hooks", "[h]"]) == 0
        out = capsys.readouterr().out
        assert "3 of 10 shard objects" in out
        assert "budget" in out
        assert len(files(tmp_path)) == 3

    def test_mistakes_are_one_clear_line(self, url, local, tmp_path, capsys):
        for arguments, words in [
            ((local.url,), "is local"),
            ((url, "--hooks", "[q]"), "no hook 'q'"),
            ((url, "--budget", "10"), "Set the cache's budget to at least"),
            ((url, "--client", "obstore"), "cannot be read with obstore"),
        ]:
            assert main(["cache", *arguments, "--directory", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert words in error
            assert len(error.splitlines()) == 1
