"""A copy has the bytes of its source or it is an error: interrupted, flipped on the way, flipped on arrival."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scripted

from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.catalog.catalog import Catalog
from tubelet_store.catalog.edit_catalog import add_store, describe
from tubelet_store.manifest import Manifest
from tubelet_store.reader import Store, open_store
from tubelet_store.storage.local import LocalRoot
from tubelet_store.transfer import ATTEMPTS, StoreCopy
from tubelet_store.verify import VerifiedObjects, verify

SHARD = "activations/blocks.1/c/1/0/0/0"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("source") / "s.zarr"
    scripted.write_all(str(path))
    return open_store(str(path))


def run(copy: StoreCopy) -> int:
    """How many objects traveled."""
    return sum(moved for _, moved in copy.run(threads=3))


def sound(url: str) -> bool:
    return not [finding for _, found in verify(open_store(url)) for finding in found]


def flip(file: Path, position: int = 40) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)


class Faulty(LocalRoot):
    """A disk that flips a bit of the objects it is told to, so often, when they are read or when they are written."""

    def __init__(
        self, directory: Path, read: dict[str, int] | None = None, write: dict[str, int] | None = None
    ) -> None:
        super().__init__(directory)
        self._read, self._write = read or {}, write or {}

    def chunks(self, key: str) -> Iterator[bytes]:
        for chunk in super().chunks(key):
            if self._read.get(key, 0) > 0:
                self._read[key] -= 1
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            yield chunk

    def publish(self, key: str, finished: Path) -> None:
        if self._write.get(key, 0) > 0:
            self._write[key] -= 1
            data = bytearray(finished.read_bytes())
            data[-1] ^= 1
            finished.unlink()
            finished.write_bytes(data)
        super().publish(key, finished)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_copy_is_the_same_store(store, tmp_path, scheme):
    url = str(tmp_path / "c.zarr") if scheme == "local" else f"memory://{uuid.uuid4().hex}/c.zarr"
    assert run(StoreCopy(store, url)) == len(store.manifest())
    assert sound(url)
    copy = open_store(url)
    assert copy.identity == store.identity
    assert copy.root.list_keys() == store.root.list_keys()
    assert all(copy.root.read(key) == store.root.read(key) for key in store.root.list_keys())
    assert run(StoreCopy(store, url)) == 0
    back = str(tmp_path / "back.zarr")
    assert run(StoreCopy(copy, back)) == len(store.manifest())
    assert sound(back)


def test_an_interrupted_copy_is_no_store_and_goes_on(store, tmp_path):
    url = str(tmp_path / "c.zarr")
    running = StoreCopy(store, url).run(threads=1)
    for _ in range(3):
        next(running)
    running.close()
    with pytest.raises(TubeletError, match="No store at"):
        open_store(url)
    already = sum((tmp_path / "c.zarr" / key).exists() for key in store.manifest().keys)
    assert 3 <= already < len(store.manifest())
    # A bit flips while the copy rests.
    first = tmp_path / "c.zarr" / store.manifest().keys[0]
    flip(first)
    assert run(StoreCopy(store, url)) == len(store.manifest()) - already + 1
    assert sound(url)


def test_a_bit_that_flips_once_on_the_way_is_healed(store, tmp_path, monkeypatch):
    faulty = Store(Faulty(Path(store.url), read={SHARD: 1, "clips.parquet": ATTEMPTS - 1}), store.state)
    run(StoreCopy(faulty, str(tmp_path / "c.zarr")))
    assert sound(str(tmp_path / "c.zarr"))


def test_an_object_that_is_damaged_at_its_source_is_named_and_never_arrives(store, tmp_path):
    faulty = Store(Faulty(Path(store.url), read={SHARD: 10**6}), store.state)
    with pytest.raises(TubeletError, match=f"{SHARD} is damaged"):
        run(StoreCopy(faulty, str(tmp_path / "c.zarr")))
    assert not (tmp_path / "c.zarr" / SHARD).exists()
    assert not (tmp_path / "c.zarr/zarr.json").exists()


@pytest.mark.parametrize("times", [1, ATTEMPTS - 1, ATTEMPTS])
def test_a_bit_that_flips_on_arrival_is_healed_or_named(store, tmp_path, times):
    copy = StoreCopy(store, str(tmp_path / "c.zarr"))
    copy._target = Faulty(tmp_path / "c.zarr", write={SHARD: times})
    if times < ATTEMPTS:
        run(copy)
        assert sound(str(tmp_path / "c.zarr"))
        return
    with pytest.raises(TubeletError, match=f"{SHARD} was written {ATTEMPTS} times"):
        run(copy)
    assert not (tmp_path / "c.zarr/zarr.json").exists()


def test_nothing_is_overwritten_that_is_not_the_same_store(store, tmp_path):
    url = str(tmp_path / "c.zarr")
    scripted.begin(url)
    with pytest.raises(TubeletError, match="holds another store"):
        StoreCopy(store, url)
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr/mine.txt").write_text("x")
    with pytest.raises(TubeletError, match=r"not empty: mine\.txt"):
        StoreCopy(store, str(tmp_path / "d.zarr"))
    with pytest.raises(TubeletError, match="unfinished"):
        StoreCopy(open_store(url, allow_unfinished=True), str(tmp_path / "e.zarr"))


@pytest.mark.parametrize("key", ["../outside", "/etc/passwd", "a/../../b", "a//b", ".tmp/x", "a/."])
def test_a_manifest_cannot_make_a_copy_write_elsewhere(store, key):
    objects = [store.manifest()[0].model_copy(update={"key": key})]
    data = Manifest.of(objects, store.plan).to_parquet()
    with pytest.raises(ValueError, match="leaves the store"):
        Manifest.from_parquet(data, store.plan.digest)


def test_pull_and_push_take_names(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(store.url, tmp_path / "there/s.zarr")
    add_store("there/catalog.yaml", "there/s.zarr", describe(store.state, "demo"))
    assert main(["pull", "there/catalog.yaml#demo"]) == 0
    assert open_store("demo.zarr").identity == store.identity
    shutil.rmtree("there/s.zarr")
    assert main(["push", "demo.zarr", "there/catalog.yaml#demo"]) == 0
    assert sound("there/s.zarr")
    words = ["there/catalog.yaml#demo", "part.zarr", "--hooks", "blocks.3", "--where.first", "3"]
    assert main(["pull", *words]) == 0
    part = open_store("part.zarr")
    assert (part.plan.clips, [hook.name for hook in part.plan.hooks]) == (3, ["blocks.3"])
    capsys.readouterr()
    assert main(["push", "part.zarr", "there/catalog.yaml#demo"]) == 2
    assert "not what would be pushed" in capsys.readouterr().err


class TestPush:
    """`push` lists what it copied in the catalog at the destination, and never changes what a name means."""

    def pushed(self, catalog: Path) -> dict[str, tuple[str, str | None]]:
        return {entry.name: (entry.url, entry.identity) for entry in Catalog.read(str(catalog)).stores}

    def test_to_a_url(self, store, tmp_path):
        there = tmp_path / "there"
        assert main(["push", store.url, str(there / "k400.zarr")]) == 0
        assert self.pushed(there / "catalog.yaml") == {"k400": (str(there / "k400.zarr"), store.identity)}
        assert open_store(f"{there}/catalog.yaml#k400").identity == store.identity
        text = (there / "catalog.yaml").read_text()
        assert main(["push", store.url, str(there / "k400.zarr")]) == 0
        assert (there / "catalog.yaml").read_text() == text

    def test_to_a_name_that_is_new(self, store, tmp_path):
        there = tmp_path / "there"
        assert main(["push", store.url, f"{there}/catalog.yaml#k400"]) == 0
        assert self.pushed(there / "catalog.yaml") == {"k400": (str(there / "k400.zarr"), store.identity)}

    def test_a_part_pins_its_own_identity(self, store, tmp_path):
        there = tmp_path / "there"
        assert main(["push", store.url, str(there / "few.zarr"), "--where.first", "3"]) == 0
        identity = self.pushed(there / "catalog.yaml")["few"][1]
        assert identity == open_store(str(there / "few.zarr")).identity != store.identity

    def test_an_entry_that_pins_nothing_is_completed_and_keeps_its_fields(self, store, tmp_path):
        there = tmp_path / "there"
        there.mkdir()
        said = {"license": "CC-BY-4.0", "owner": "team", "description": "Ten clips."}
        add_store(f"{there}/catalog.yaml", f"{there}/s.zarr", describe(store.state, "demo", pin=False, **said))
        assert main(["push", store.url, f"{there}/catalog.yaml#demo"]) == 0
        (entry,) = Catalog.read(f"{there}/catalog.yaml").stores
        assert (entry.url, entry.identity) == (f"{there}/s.zarr", store.identity)
        assert {key: getattr(entry.about, key) for key in said} == said
        assert main(["push", store.url, f"{there}/catalog.yaml#demo", "--owner", "another team"]) == 0
        (entry,) = Catalog.read(f"{there}/catalog.yaml").stores
        assert {key: getattr(entry.about, key) for key in said} == {**said, "owner": "another team"}

    def test_a_name_that_means_another_place_is_refused_before_anything_is_copied(self, store, tmp_path, capsys):
        there = tmp_path / "there"
        there.mkdir()
        add_store(f"{there}/catalog.yaml", f"{there}/elsewhere.zarr", describe(store.state, "k400"))
        assert main(["push", store.url, str(there / "k400.zarr")]) == 2
        assert "already has a store 'k400'" in capsys.readouterr().err
        assert not (there / "k400.zarr").exists()


class TestRepair:
    """`verify --from` puts back what was written."""

    @pytest.fixture
    def path(self, store, tmp_path) -> Path:
        return Path(shutil.copytree(store.url, tmp_path / "s.zarr"))

    @pytest.mark.parametrize("key", [SHARD, "clips.parquet", "moments/blocks.1/mean/c/0", "manifest.parquet"])
    @pytest.mark.parametrize("damage", ["flip", "remove", "truncate"])
    def test_any_object(self, store, path, key, damage, capsys):
        file = path / key
        if damage == "flip":
            flip(file, len(file.read_bytes()) // 2)
        elif damage == "remove":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-3])
        mapped = store.shard_map("blocks.1", 1)
        assert main(["verify", str(path), "--from", store.url]) == 0
        assert main(["verify", str(path)]) == 0
        assert (path / key).read_bytes() == (Path(store.url) / key).read_bytes()
        assert np.array_equal(mapped, open_store(str(path)).shard_map("blocks.1", 1), equal_nan=True)

    def test_a_map_of_the_damaged_file_lives_on(self, store, path):
        mapped = open_store(str(path)).shard_map("blocks.1", 1)
        flip(path / SHARD, 3)
        inode = (path / SHARD).stat().st_ino
        assert main(["verify", str(path), "--from", store.url]) == 0
        assert (path / SHARD).stat().st_ino != inode
        assert mapped.shape[0] == 4

    def test_only_a_copy_of_the_same_store_may_repair_it(self, store, path, tmp_path, capsys):
        other = tmp_path / "other.zarr"
        assert main(["copy", store.url, str(other), "--where.first", "5"]) == 0
        flip(path / SHARD)
        assert main(["verify", str(path), "--from", str(other)]) == 2
        assert "is not a copy of" in capsys.readouterr().err
        shutil.copytree(path, tmp_path / "as-bad.zarr")
        assert main(["verify", str(path), "--from", str(tmp_path / "as-bad.zarr")]) == 2
        assert "is damaged" in capsys.readouterr().err

    def test_changed_clip_checksums_in_the_manifest_are_found(self, store, path, capsys):
        objects = [
            o.model_copy(update={"crc32c": tuple(c ^ 1 for c in o.crc32c)}) if o.key == SHARD else o
            for o in store.manifest()
        ]
        (path / "manifest.parquet").write_bytes(Manifest.of(objects, store.plan).to_parquet())
        assert open_store(str(path)).manifest().identity == store.identity
        assert main(["verify", str(path)]) == 1
        assert f"clip checksums of {SHARD}" in capsys.readouterr().out
        assert main(["verify", str(path), "--from", store.url]) == 0
        assert main(["verify", str(path)]) == 0


def test_an_interrupted_verification_goes_on_where_it_was(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verified = VerifiedObjects(store)
    checked = list(store.manifest())[:5]
    for stored in checked:
        verified.add(stored)
    assert main(["verify", store.url]) == 0
    assert "5 objects were verified" in capsys.readouterr().out
    assert main(["verify", store.url]) == 0
    assert "interrupted" not in capsys.readouterr().out
    assert list((tmp_path / "tubelet/verify").iterdir()) == []


def test_verification_skips_only_what_it_verified(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verified = VerifiedObjects(store)
    verified.add(store.manifest()[0])
    again = VerifiedObjects(store)
    assert [stored.key for stored in store.manifest() if stored in again] == [store.manifest().keys[0]]
    assert len(VerifiedObjects(store, fresh=True)) == 0


def test_everything_two_lines_give_is_read_only(store):
    import torch

    opened = open_store(store.url)
    array = opened["blocks.1"]
    for view in (array[0], array[1:3], array.shard(1)):
        assert not view.flags.writeable
    tensor = array.torch(1)
    before = np.array(array.shard(1))
    tensor.zero_()
    assert np.array_equal(before, array.shard(1), equal_nan=True)
    assert torch.equal(array.torch(0).nan_to_num(), torch.from_numpy(np.array(array.shard(0))).nan_to_num())
