"""File systems without hard links hold stores too: what is created is created once, what is copied is copied."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet_store.reader import open_store
from tubelet_store.storage.local import LocalRoot

PLAN = make_plan(clips=8, clips_per_shard=4)


@pytest.fixture(autouse=True, params=[errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def _no_links(request, monkeypatch):
    def link(*_args, **_options):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(os, "link", link)


def test_of_many_that_create_one_wins_and_its_bytes_are_whole(tmp_path):
    root, won = LocalRoot(tmp_path), []
    start = threading.Barrier(16)

    def create(number: int) -> None:
        start.wait()
        if root.create("a/key", bytes([number]) * 10_000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert root.read("a/key") == bytes(won) * 10_000
    root.discard_scratch()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["key"]


def test_stores_are_written_copied_cut_and_repaired(tmp_path, capsys):
    store = make_store(tmp_path / "s.zarr", PLAN)
    assert main(["copy", store.url, str(tmp_path / "t.zarr")]) == 0
    assert main(["copy", store.url, str(tmp_path / "u.zarr"), "--where.first", "4"]) == 0
    key = "activations/blocks.1/c/0/0/0/0"
    (tmp_path / "t.zarr" / key).write_bytes(b"damaged")
    assert main(["verify", str(tmp_path / "t.zarr"), "--from", store.url]) == 0
    assert open_store(str(tmp_path / "t.zarr")).root.read(key) == store.root.read(key)
    assert open_store(str(tmp_path / "u.zarr")).shard_map("blocks.1", 0).tobytes() == store.root.read(key)[: 4 * 960]


def test_another_failure_is_not_taken_for_it(tmp_path, monkeypatch):
    def link(*_args, **_options):
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="dying"):
        LocalRoot(tmp_path).create("key", b"x")
