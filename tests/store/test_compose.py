"""Stores out of stores: a part is what a filter gives, a merge is one extraction of both, and the old ones stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scripted

from stores import make_plan, planned_table
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.clip_table import PLANNED, ClipOutcome, clip_table_digest
from tubelet_store.compose import Composition, choose_clips, next_version, whole
from tubelet_store.plan import Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.storage.local import LocalRoot
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verify import verify

PLAN = make_plan(clips_per_shard=4, grid=(2, 2, 3), hooks={"blocks.1": 4, "blocks.3": 6}, special_tokens=("cls",))
FAILED, NONFINITE = (3, 9), (6, 13)


def extract(path: Path, videos: range, clips_per_shard: int = 4) -> Store:
    """As an extraction of these videos would: what is stored depends on the video alone."""
    table = planned_table(videos.stop).slice(videos.start)
    split = pa.array(["train" if video % 3 else "validation" for video in videos], pa.string())
    table = table.set_column(0, PLANNED.field("clip"), pa.array(range(len(videos)), pa.int64()))
    table = table.set_column(6, PLANNED.field("split"), split)
    plan: Plan = PLAN.model_copy(
        update={
            "clips": len(videos),
            "clip_table": clip_table_digest(table),
            "clips_per_shard": clips_per_shard,
        }
    )
    writer = StoreWriter.begin(str(path), plan, table, {"made_by": "tests"})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                video = videos[clip]
                if video in FAILED:
                    shard_writer.append(ClipOutcome.failure("open_failed", "on purpose"))
                    continue
                rng = np.random.default_rng(video)
                tokens = {hook.name: rng.standard_normal(plan.clip_shape(hook)) for hook in plan.hooks}
                special = {hook.name: rng.standard_normal(plan.special_shape(hook)) for hook in plan.hooks}
                if video in NONFINITE:
                    tokens["blocks.3"][0, 0, :2] = np.nan, np.inf
                outcome = ClipOutcome(status="ok", frame_indices=(0, 2), timestamps_s=(0.0, 0.125), crop=(0, 1, 2, 3))
                shard_writer.append(outcome, tokens, special)
            shard_writer.commit()
    writer.finish()
    return open_store(str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return extract(tmp_path_factory.mktemp("whole") / "s.zarr", range(18))


def made(composition: Composition) -> Store:
    for _ in composition.run(threads=2):
        pass
    store = composition.store()
    assert [finding for _, found in verify(store) for finding in found] == []
    return store


@pytest.mark.parametrize("cut", [8, 10])
def test_a_merge_equals_one_extraction_of_both(store, tmp_path, cut):
    first = extract(tmp_path / "a.zarr", range(cut))
    second = extract(tmp_path / "b.zarr", range(cut, 18), clips_per_shard=3)
    merged = made(Composition(str(tmp_path / "m.zarr"), [whole(first), whole(second)]))
    assert merged.plan.digest == store.plan.digest
    assert merged.identity == store.identity
    assert [p["identity"] for p in merged.state.provenance["parents"]] == [first.identity, second.identity]


def test_appending_leaves_the_old_version_readable_and_shares_its_full_shards(store, tmp_path, capsys):
    old = extract(tmp_path / "s.zarr", range(10))
    more = extract(tmp_path / "more.zarr", range(10, 18))
    before = scripted.fingerprint(tmp_path / "s.zarr")
    assert main(["merge", old.url, more.url]) == 0
    new = open_store(str(tmp_path / "s.v2.zarr"))
    assert new.identity == store.identity
    assert scripted.fingerprint(tmp_path / "s.zarr") == before
    assert open_store(old.url).identity == old.identity
    key = "activations/blocks.1/c/{}/0/0/0"
    links = [(Path(new.url) / key.format(shard)).stat().st_nlink for shard in range(new.plan.shards)]
    assert links == [2, 2, 1, 1, 1]
    assert next_version(new.url) == str(tmp_path / "s.v3.zarr")


def test_a_subset_equals_a_filter(store, tmp_path):
    part = choose_clips(store, splits=["train"], labels=["action 1", 2, "3"], first=7)
    subset = made(Composition(str(tmp_path / "sub.zarr"), [part], hooks=["blocks.3"]))
    table = store.clips().to_pylist()
    expected = [row for row in table if row["split"] == "train" and row["label"] in (1, 2, 3)][:7]
    assert [hook.name for hook in subset.plan.hooks] == ["blocks.3"]
    ignored = ("clip", "shard")
    assert [{k: v for k, v in row.items() if k not in ignored} for row in subset.clips().to_pylist()] == [
        {k: v for k, v in row.items() if k not in ignored} for row in expected
    ]
    numbers = [row["clip"] for row in expected]
    np.testing.assert_array_equal(subset["blocks.3"][:], store["blocks.3"][numbers])
    np.testing.assert_array_equal(subset.special_tokens("blocks.3")[:], store.special_tokens("blocks.3")[numbers])
    assert subset.moments("blocks.3").count == sum(row["status"] == "ok" for row in expected) * PLAN.grid.tokens


@pytest.mark.parametrize("hooks", [["blocks.1"], ["blocks.3", "blocks.1"]])
def test_a_subset_of_hooks_takes_shards_over_unread(store, tmp_path, hooks):
    composition = Composition(str(tmp_path / "h.zarr"), [whole(store)], hooks=hooks)
    assert list(composition.run()) == [True] * store.plan.shards
    subset = composition.store()
    for hook in hooks:
        np.testing.assert_array_equal(subset[hook][:], store[hook][:])
        assert subset.moments(hook).arrays().keys() == store.moments(hook).arrays().keys()
        for name, values in store.moments(hook).arrays().items():
            np.testing.assert_array_equal(subset.moments(hook).arrays()[name], values)
    assert subset.identity != store.identity


def test_an_interrupted_composition_goes_on(store, tmp_path):
    def composition() -> Composition:
        return Composition(str(tmp_path / "m.zarr"), [choose_clips(store, first=17)])

    next(composition().run(threads=1))
    with pytest.raises(TubeletError, match="unfinished"):
        open_store(str(tmp_path / "m.zarr"))
    undisturbed = made(Composition(str(tmp_path / "n.zarr"), [choose_clips(store, first=17)]))
    assert made(composition()).identity == undisturbed.identity


def test_a_damaged_clip_does_not_travel_into_a_new_store(store, tmp_path):
    copy = extract(tmp_path / "s.zarr", range(18))
    file = tmp_path / "s.zarr" / "activations/blocks.1/c/1/0/0/0"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(TubeletError, match="clip 4 is damaged"):
        made(Composition(str(tmp_path / "m.zarr"), [choose_clips(copy, splits=["train"])]))


def test_what_was_made_differently_is_not_joined(store, tmp_path):
    other = made(Composition(str(tmp_path / "h.zarr"), [whole(store)], hooks=["blocks.1"]))
    with pytest.raises(TubeletError, match=r"made differently.*hooks"):
        Composition(str(tmp_path / "m.zarr"), [whole(store), whole(other)])
    with pytest.raises(TubeletError, match=r"View 0 of video video-0000 comes twice"):
        Composition(str(tmp_path / "m.zarr"), [whole(store), whole(store)])
    with pytest.raises(TubeletError, match=r"has split 'tran'. Did you mean 'train'"):
        choose_clips(store, splits=["tran"])
    with pytest.raises(TubeletError, match="meets all"):
        choose_clips(store, videos=["video-0000"], splits=["train"])
    assert not (tmp_path / "m.zarr").exists()


def test_a_damaged_record_or_a_stray_name_is_an_error_in_one_line(tmp_path):
    writer = scripted.begin(str(tmp_path / "s.zarr"))
    for shard in writer.pending():
        scripted.write_shard(writer, shard)
    commits = tmp_path / "s.zarr/commits"
    (commits / "notes.json").write_text("{}")
    (commits / "000999.json").write_text("{}")
    moments = commits / "000001.moments.safetensors"
    raw = moments.read_bytes()
    moments.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(TubeletError, match=r"000001.moments.safetensors is damaged"):
        writer.finish()
    moments.write_bytes(raw)
    record = commits / "000002.json"
    whole_record = record.read_bytes()
    record.write_bytes(whole_record[:50])
    with pytest.raises(TubeletError, match=r"000002.json is damaged") as caught:
        writer.finish()
    assert "\n" not in str(caught.value)
    assert main(["info", str(tmp_path / "s.zarr")]) == 2
    record.write_bytes(whole_record)
    assert writer.finish().complete


class TestGc:
    """`gc` removes what belongs to nothing, and nothing else."""

    @pytest.fixture
    def path(self, tmp_path) -> Path:
        extract(tmp_path / "s.zarr", range(6))
        return tmp_path / "s.zarr"

    def litter(self, path: Path) -> list[str]:
        keys = ["activations/blocks.1/c/7/0/0/0", "commits/000007.moments.safetensors", "moments/blocks.1/old/c"]
        for key in keys:
            LocalRoot(path).replace(key, b"left by a dead job")
        (path / "notes.txt").write_text("mine")
        return keys

    def test_a_dry_run_comes_first_and_live_objects_stay(self, path, capsys):
        before = scripted.fingerprint(path)
        keys = self.litter(path)
        assert main(["gc", str(path), "--older-than-h", "0"]) == 0
        out = capsys.readouterr().out
        assert all(key in out for key in keys)
        assert all((path / key).exists() for key in keys)
        assert main(["gc", str(path), "--remove"]) == 0
        assert "only 0.0 h old" in capsys.readouterr().out
        assert all((path / key).exists() for key in keys)
        assert main(["gc", str(path), "--remove", "--older-than-h", "0"]) == 0
        assert "notes.txt" in capsys.readouterr().out
        (path / "notes.txt").unlink()
        assert scripted.fingerprint(path) == before
        assert not (path / "activations/blocks.1/c/7").exists()

    def test_an_unfinished_store_keeps_what_its_records_and_its_plan_name(self, tmp_path):
        url = str(tmp_path / "s.zarr")
        writer = scripted.begin(url)
        scripted.write_shard(writer, 1)
        writer.discard_scratch()
        before = scripted.fingerprint(tmp_path / "s.zarr")
        LocalRoot(tmp_path / "s.zarr").replace("activations/blocks.1/c/0/0/0/0", b"dead")
        assert main(["gc", url, "--remove", "--older-than-h", "0"]) == 0
        assert scripted.fingerprint(tmp_path / "s.zarr") == before
        scripted.write_all(url)
        assert open_store(url).complete
