"""A shard is the memory-mapped file itself, and nothing else passes for one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from stores import make_plan, make_store, planned_table
from tubelet.errors import TubeletError
from tubelet_store.reader import open_store
from tubelet_store.store_writer import StoreWriter

OBJECT = "activations/blocks.1/c/0/0/0/0"
CLIP_BYTES = 4 * 15 * 8 * 2


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((10, 4, 15, 8), dtype=np.float32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, values) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "s.zarr"
    make_store(path, make_plan(), {"blocks.1": values}, failed=[3])
    return path


@pytest.fixture
def path(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "s.zarr"))


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(TubeletError) as caught:
        store = open_store(str(path), **options)
        store.clips()
        store.moments("blocks.1")
        store.manifest()
        store.shard_map("blocks.1", 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_attributes(path: Path, edit) -> None:
    document = json.loads((path / "zarr.json").read_text())
    edit(document["attributes"]["tubelet"])
    (path / "zarr.json").write_text(json.dumps(document))


def test_it_is_the_file_from_offset_0(pristine, values):
    store = open_store(str(pristine))
    for shard in range(3):
        view = store.shard_map("blocks.1", shard)
        assert isinstance(view, np.memmap)
        assert view.offset == 0
        assert Path(view.filename) == pristine / f"activations/blocks.1/c/{shard}/0/0/0"
        expected = values[store.shard_range(shard).start : store.shard_range(shard).stop].astype(np.float16)
        if shard == 0:
            expected[3] = np.nan
        np.testing.assert_array_equal(view, expected)


def test_it_is_read_only(pristine):
    view = open_store(str(pristine)).shard_map("blocks.1", 0)
    assert not view.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_a_shard_rewritten_in_another_order_is_refused_though_zarr_still_reads_it(path):
    raw = bytearray((path / OBJECT).read_bytes())
    before = zarr.open_array(path / "activations/blocks.1", mode="r")[...]
    clips, index = raw[: 4 * CLIP_BYTES], np.frombuffer(bytes(raw[4 * CLIP_BYTES : -4]), "<u8").reshape(4, 2).copy()
    clips[:CLIP_BYTES], clips[CLIP_BYTES : 2 * CLIP_BYTES] = clips[CLIP_BYTES : 2 * CLIP_BYTES], clips[:CLIP_BYTES]
    index[[0, 1]] = index[[1, 0]]
    body = index.tobytes()
    (path / OBJECT).write_bytes(bytes(clips) + body + google_crc32c.value(body).to_bytes(4, "little"))
    np.testing.assert_array_equal(zarr.open_array(path / "activations/blocks.1", mode="r")[...], before)
    message = refusal(path)
    assert OBJECT in message
    assert "not lie in order" in message


@pytest.mark.parametrize("position", [-1, -4, -5, -20, -68])
def test_a_damaged_index_is_refused(path, position):
    raw = bytearray((path / OBJECT).read_bytes())
    raw[position] ^= 1
    (path / OBJECT).write_bytes(raw)
    message = refusal(path)
    assert OBJECT in message
    assert "index is damaged" in message


def test_a_truncated_shard_is_refused(path):
    raw = (path / OBJECT).read_bytes()
    (path / OBJECT).write_bytes(raw[:-1])
    message = refusal(path)
    assert OBJECT in message
    assert f"{len(raw) - 1} bytes, not {len(raw)}" in message


@pytest.mark.parametrize("key", [OBJECT, "clips.parquet", "manifest.parquet", "moments/blocks.1/mean/zarr.json"])
def test_a_missing_object_is_named(path, key):
    (path / key).unlink()
    assert key.removesuffix("/mean/zarr.json") in refusal(path)


@pytest.mark.parametrize("key", ["clips.parquet", "manifest.parquet"])
@pytest.mark.parametrize("damage", [b"", b"PAR1", b"\x00" * 400])
def test_a_damaged_table_is_named(path, key, damage):
    (path / key).write_bytes(damage)
    message = refusal(path)
    assert key in message
    assert "damaged" in message


def test_an_unfinished_store_is_refused_by_default_and_else_shows_committed_shards_only(tmp_path, values):
    plan = make_plan()
    writer = StoreWriter.begin(str(tmp_path / "s.zarr"), plan, planned_table(10), {})
    store = open_store(str(tmp_path / "s.zarr"), allow_unfinished=True)
    assert store.clips().num_rows == 0
    assert not store.ok().any()
    make_shard(writer, 1, values)
    message = refusal(tmp_path / "s.zarr")
    assert "unfinished: 1 of 3 shards" in message
    assert "tubelet extract" in message
    store = open_store(str(tmp_path / "s.zarr"), allow_unfinished=True)
    assert store.clips()["clip"].to_pylist() == [4, 5, 6, 7]
    assert store.clips()["shard"].to_pylist() == [1, 1, 1, 1]
    assert np.flatnonzero(store.ok()).tolist() == [4, 5, 6, 7]
    assert store.moments("blocks.1").count == 4 * plan.grid.tokens
    np.testing.assert_array_equal(store.shard_map("blocks.1", 1), values[4:8].astype(np.float16))
    with pytest.raises(TubeletError, match="shard 0 is not committed"):
        store.shard_map("blocks.1", 0)


def make_shard(writer: StoreWriter, shard: int, values: np.ndarray) -> None:
    from tubelet_store.clip_table import ClipOutcome

    with writer.shard(shard) as shard_writer:
        for clip in writer.plan.shard_range(shard):
            shard_writer.append(ClipOutcome(status="ok"), {"blocks.1": values[clip]})
        shard_writer.commit()


def test_nothing_there(tmp_path):
    assert "No store at" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "No store at" in refusal(tmp_path / "file")


def test_a_foreign_zarr_is_refused(tmp_path):
    zarr.create_group(tmp_path / "group")
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="f4")
    for name in ("group", "array"):
        assert "without Tubelet's attributes" in refusal(tmp_path / name)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"attributes": 3}', '{"attributes": {"tubelet": 3}}', "\xff"])
def test_a_damaged_group_document_is_refused(path, text):
    (path / "zarr.json").write_text(text, encoding="latin-1")
    assert "zarr.json" in refusal(path)


def test_a_later_format_requires_an_upgrade(path):
    edit_attributes(path, lambda tubelet: tubelet.update(format_version=2, something_new=1))
    message = refusal(path)
    assert "format 2" in message
    assert "Upgrade" in message


def test_an_edited_plan_is_refused(path):
    edit_attributes(path, lambda tubelet: tubelet["plan"]["backbone"].update(id="another"))
    assert "plan was edited" in refusal(path)


def test_a_field_that_does_not_fit_is_named(path):
    edit_attributes(path, lambda tubelet: tubelet["plan"].update(clips="many"))
    assert "'plan.clips'" in refusal(path)


def test_a_manifest_of_another_store_is_refused(path, tmp_path):
    make_store(tmp_path / "other.zarr", make_plan(), seed=1)
    shutil.copy(tmp_path / "other.zarr/manifest.parquet", path / "manifest.parquet")
    assert "has identity" in refusal(path)


def test_an_unknown_hook_lists_those_there_are(pristine):
    with pytest.raises(TubeletError, match=r"no hook 'blocks.2'.*blocks.1"):
        open_store(str(pristine)).shard_map("blocks.2", 0)
