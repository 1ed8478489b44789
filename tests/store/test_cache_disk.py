"""A cache on a real disk: too small, full, without room for a file, started again after a power cut."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from stores import make_plan, make_store, upload
from tubelet.errors import TubeletError
from tubelet.paths import cache_folder
from tubelet_store.cache import CacheConfig
from tubelet_store.reader import Store, open_store

PLAN = make_plan(clips=8, clips_per_shard=4, grid=(2, 2, 3), hooks={"h": 512})
CLIP = 12 * 512 * 2
SHARD = 4 * CLIP + 16 * 4 + 4


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN)


@pytest.fixture
def url(local) -> str:
    return upload(local, f"memory://{uuid.uuid4().hex}/s.zarr")


def shards(folder: Path) -> list[Path]:
    return [path for name in ("objects", "partial") for path in (folder / name).glob("*")]


def test_a_budget_below_one_shard_is_refused_before_anything_is_read(url, tmp_path):
    with pytest.raises(TubeletError, match=rf"may hold {SHARD - 1} bytes, a shard .*at least {SHARD} bytes"):
        open_store(url, cache=CacheConfig(directory=tmp_path / "m", budget=SHARD - 1))
    assert not (tmp_path / "m").exists()
    assert open_store(url, cache=CacheConfig(directory=tmp_path / "m", budget=SHARD)).shard_map("h", 0).shape[0] == 4


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from tubelet.errors import TubeletError
from tubelet_store.reader import open_store
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.cache.partial_file import PartialFile
local, folder, limit, allocates = sys.argv[1:]
store = open_store(local)
# A local store has no cache: this one reads the files as a server would give them.
cache = LocalCache("file://" + local, CacheConfig(directory=Path(folder), client="fsspec"))
if allocates == "no":
    PartialFile.allocate = lambda self, size_bytes: True
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    cache.open(store.shard_object("h", 0))
except TubeletError as error:
    print(error)
"""


@pytest.mark.parametrize("allocates", ["yes", "no"])
def test_where_no_file_may_be_that_long_nothing_half_written_stays(local, tmp_path, allocates):
    # Without room taken ahead, as on file systems that promise and do not keep.
    command = [sys.executable, "-c", UNDER_A_LIMIT, local.url, str(tmp_path / "m"), str(2 * CLIP), allocates]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'm'}: the disk has no room for {SHARD} bytes" in done.stdout, done.stderr
    assert shards(tmp_path / "m") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_is_named_and_nothing_half_written_stays(local, url, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SHARD + (32 << 10)}", "tubelet-test", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        (disk / "others").write_bytes(bytes((32 << 10) + SHARD // 2))
        store = open_store(url, cache=CacheConfig(directory=disk / "m"))
        with pytest.raises(TubeletError, match=rf"the disk has no room for {SHARD} bytes \(\d+ are free\)"):
            store.shard_map("h", 0)
        assert shards(disk / "m") == []
        (disk / "others").unlink()
        for shard in (0, 1):
            assert store.shard_map("h", shard).tobytes() == local.shard_map("h", shard).tobytes()
            gc.collect()
        assert len(shards(disk / "m")) == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class TestAfterThePowerWasCut:
    """Nothing waits for the disk, so what a power cut lost must be found."""

    def test_what_was_lost_is_fetched_again_and_nothing_else(self, url, local, tmp_path, monkeypatch):
        monkeypatch.setattr("tubelet_store.cache.shard_object._PART_BYTES", CLIP)
        config = CacheConfig(directory=tmp_path)
        name = open_store(url, cache=config).shard_object("h", 0).stored.sha256
        open_store(url, cache=config).shard_map("h", 0)
        gc.collect()
        with (tmp_path / "objects" / name).open("r+b") as file:
            file.seek(2 * CLIP)
            file.write(bytes(CLIP))
        (tmp_path / "boots").write_text("an-earlier-start-of-the-machine\n")
        store = open_store(url, cache=config)
        read_range, asked = store.cache.client.read_range, []
        monkeypatch.setattr(
            store.cache.client, "read_range", lambda *args: (asked.append(args[1]), read_range(*args))[1]
        )
        assert store.shard_map("h", 0).tobytes() == local.shard_map("h", 0).tobytes()
        assert asked == [2 * CLIP]
        assert shards(tmp_path) == [tmp_path / "objects" / name]

    def test_within_one_start_nothing_is_checked_twice(self, url, tmp_path, monkeypatch):
        config = CacheConfig(directory=tmp_path)
        open_store(url, cache=config).shard_map("h", 0)
        gc.collect()
        store = open_store(url, cache=config)
        monkeypatch.setattr(store.cache.client, "read_range", None)
        monkeypatch.setattr("tubelet_store.cache.shard_object.google_crc32c", None)
        store.shard_map("h", 0)

    def test_what_is_in_use_stays(self, url, local, tmp_path):
        config = CacheConfig(directory=tmp_path)
        held = open_store(url, cache=config).shard_map("h", 0)
        (tmp_path / "boots").unlink()
        open_store(url, cache=config).shard_map("h", 1)
        assert len(list((tmp_path / "objects").iterdir())) == 2
        assert held.tobytes() == local.shard_map("h", 0).tobytes()


def test_every_cache_is_in_one_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "ours"))
    assert cache_folder("shards") == CacheConfig().folder == tmp_path / "ours" / "shards"
    monkeypatch.delenv("TUBELET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "everybodys"))
    assert cache_folder("shards") == CacheConfig().folder == tmp_path / "everybodys" / "tubelet" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("spool") == Path.home() / ".cache" / "tubelet" / "spool"
