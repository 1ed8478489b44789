"""A store is the same bytes whichever process wrote its shards, in any order, any number of times."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import scripted

from stores import make_plan, make_store, planned_table
from tubelet.errors import TubeletError
from tubelet_store.clip_table import FINISHED, PLANNED, ClipOutcome, from_parquet, to_parquet
from tubelet_store.orphans import orphan_keys
from tubelet_store.reader import open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verify import verify


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, str]:
    """Of a store written by one writer, in order."""
    path = tmp_path_factory.mktemp("reference") / "s.zarr"
    scripted.write_all(str(path))
    return scripted.fingerprint(path)


def attach_and_write(url: str, shard: int) -> int:
    scripted.write_shard(StoreWriter.attach(url, scripted.PLAN.digest), shard)
    return shard


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_any_order_gives_the_same_bytes(tmp_path, reference, order):
    writer = scripted.begin(str(tmp_path / "s.zarr"))
    for shard in order:
        scripted.write_shard(writer, shard)
    writer.finish()
    assert scripted.fingerprint(tmp_path / "s.zarr") == reference


def test_several_processes_and_duplicates_of_the_same_shard_give_the_same_bytes(tmp_path, reference):
    url = str(tmp_path / "s.zarr")
    writer = scripted.begin(url)
    shards = [2, 2, 1, 1, 0, 0, 1, 2]
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert sorted(pool.map(attach_and_write, [url] * len(shards), shards)) == sorted(shards)
    writer.finish()
    assert scripted.fingerprint(tmp_path / "s.zarr") == reference


def test_a_slow_duplicate_harms_nothing_after_the_store_is_finished(tmp_path, reference):
    url = str(tmp_path / "s.zarr")
    writer = scripted.begin(url)
    late = StoreWriter.attach(url, scripted.PLAN.digest).shard(2)
    with late:
        for _ in scripted.PLAN.shard_range(2):
            late.append(ClipOutcome.failure("other", "a writer that fares worse"))
        for shard in range(3):
            scripted.write_shard(writer, shard)
        writer.finish()
        assert late.commit() == writer.committed(2)
    StoreWriter.attach(url, scripted.PLAN.digest).discard_scratch()
    assert scripted.fingerprint(tmp_path / "s.zarr") == reference


def test_finishing_twice_changes_nothing(tmp_path, reference):
    scripted.write_all(str(tmp_path / "s.zarr"))
    stale = scripted.begin(str(tmp_path / "s.zarr"))
    stale.state = stale.state.model_copy(update={"state": "writing", "identity": None, "clips_failed": None})
    stale.finish()
    assert scripted.fingerprint(tmp_path / "s.zarr") == reference


def test_finishing_too_early_names_the_shard(tmp_path):
    writer = scripted.begin(str(tmp_path / "s.zarr"))
    scripted.write_shard(writer, 0)
    with pytest.raises(TubeletError, match="shard 1 of 3 is not committed"):
        writer.finish()
    assert not open_store(str(tmp_path / "s.zarr"), allow_unfinished=True).complete


def test_finishing_over_a_lost_object_names_it(tmp_path):
    writer = scripted.begin(str(tmp_path / "s.zarr"))
    for shard in range(3):
        scripted.write_shard(writer, shard)
    (tmp_path / "s.zarr/activations/blocks.3/c/1/0/0/0").unlink()
    with pytest.raises(TubeletError, match=r"activations/blocks.3/c/1/0/0/0 .* is missing"):
        writer.finish()


def test_resuming_with_another_plan_is_refused_and_lists_the_fields(tmp_path):
    scripted.begin(str(tmp_path / "s.zarr"))
    grid = scripted.PLAN.grid.model_copy(update={"width": 5})
    other = scripted.PLAN.model_copy(update={"grid": grid, "dtype": "float32"})
    with pytest.raises(TubeletError) as caught:
        StoreWriter.begin(str(tmp_path / "s.zarr"), other, planned_table(10), {})
    assert "dtype: float16 -> float32" in str(caught.value)
    assert "grid.width: 3 -> 5" in str(caught.value)
    assert "backbone" not in str(caught.value)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(TubeletError, match="not empty and not a Tubelet store"):
        scripted.begin(str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_worker_that_sees_another_store_says_so(tmp_path):
    with pytest.raises(TubeletError, match="does not see the store"):
        StoreWriter.attach(str(tmp_path / "s.zarr"), scripted.PLAN.digest)
    scripted.begin(str(tmp_path / "s.zarr"))
    with pytest.raises(TubeletError, match="does not see the store"):
        StoreWriter.attach(str(tmp_path / "s.zarr"), "sha256:other")


def test_a_shard_is_invisible_before_its_commit(tmp_path):
    writer = scripted.begin(str(tmp_path / "s.zarr"))
    before = scripted.fingerprint(tmp_path / "s.zarr")
    with pytest.raises(ValueError, match="shard 0 has 1 of 4 clips"), writer.shard(0) as shard:
        shard.append(ClipOutcome.failure("open_failed", "on purpose"))
        shard.commit()
    assert scripted.fingerprint(tmp_path / "s.zarr") == before
    assert writer.pending() == [0, 1, 2]


class TestAppend:
    def shard(self, tmp_path: Path, **plan):
        made = make_plan(clips=2, clips_per_shard=2, grid=(1, 1, 2), hooks={"blocks.1": 3}, **plan)
        self.writer = StoreWriter.begin(str(tmp_path / "s.zarr"), made, planned_table(2), {})
        return self.writer.shard(0)

    def finish(self, shard) -> None:
        shard.append(ClipOutcome.failure("open_failed", "on purpose"))
        shard.commit()
        self.writer.finish()

    def test_too_large_for_float16_names_the_clip_and_the_remedy(self, tmp_path):
        values = np.zeros((1, 2, 3), np.float32)
        with self.shard(tmp_path) as shard:
            values[0, 1, 2] = 65504
            shard.append(ClipOutcome(status="ok"), {"blocks.1": values})
            values[0, 1, 2] = -65505
            with pytest.raises(TubeletError, match=r"Clip 1, activations/blocks.1: .*6.55e\+04.*dtype: bfloat16"):
                shard.append(ClipOutcome(status="ok"), {"blocks.1": values})

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_what_float16_refuses_fits_the_others(self, tmp_path, dtype):
        values = np.full((1, 2, 3), -1e30, np.float32)
        with self.shard(tmp_path, dtype=dtype) as shard:
            assert shard.append(ClipOutcome(status="ok"), {"blocks.1": values}).status == "ok"
            self.finish(shard)
        stored = open_store(str(tmp_path / "s.zarr")).shard_map("blocks.1", 0)[0]
        np.testing.assert_allclose(stored.astype(np.float64), -1e30, rtol=2**-8)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("given", [np.float32, np.float64, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("kind", ["activations", "special_tokens"])
    def test_nonfinite_values_fail_the_clip_and_are_counted(self, tmp_path, dtype, given, kind):
        arrays = {"activations": np.ones((1, 2, 3), given), "special_tokens": np.ones((1, 1, 3), given)}
        arrays[kind][0, 0] = np.nan, np.inf, -np.inf
        with self.shard(tmp_path, dtype=dtype, special_tokens=("cls",)) as shard:
            outcome = shard.append(
                ClipOutcome(status="ok", fps=25.0),
                {"blocks.1": arrays["activations"]},
                {"blocks.1": arrays["special_tokens"]},
            )
            assert outcome.status == "failed"
            assert outcome.error.startswith(f"nonfinite: 3 values of {kind}/blocks.1")
            self.finish(shard)
        store = open_store(str(tmp_path / "s.zarr"))
        assert store.moments("blocks.1").nonfinite == 3
        assert store.moments("blocks.1").count == 0
        assert np.isnan(store.shard_map("blocks.1", 0).astype(np.float32)).all()
        assert np.isnan(store.shard_map("blocks.1", 0, "special_tokens").astype(np.float32)).all()
        row = store.clips().to_pylist()[0]
        assert row["status"] == "failed"
        assert row["error"] == outcome.error
        assert row["fps"] == 25.0
        assert store.state.clips_failed == 2

    def test_a_wrong_shape_names_both(self, tmp_path):
        with (
            self.shard(tmp_path) as shard,
            pytest.raises(ValueError, match=r"blocks.1.*\(2, 1, 3\), expected \(1, 2, 3\)"),
        ):
            shard.append(ClipOutcome(status="ok"), {"blocks.1": np.zeros((2, 1, 3), np.float32)})

    def test_one_clip_too_many(self, tmp_path):
        with self.shard(tmp_path) as shard:
            self.finish_twice(shard)
            with pytest.raises(ValueError, match="holds 2 clips"):
                shard.append(ClipOutcome.failure("open_failed", "one more"))

    def finish_twice(self, shard) -> None:
        for _ in range(2):
            shard.append(ClipOutcome.failure("open_failed", "on purpose"))

    def test_rounding_is_to_nearest_even(self, tmp_path):
        # bfloat16 keeps 8 bits: the step at 1 is 2^-7, so the first two are ties.
        values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32).reshape(1, 1, 3).repeat(2, 1)
        with self.shard(tmp_path, dtype="bfloat16") as shard:
            shard.append(ClipOutcome(status="ok"), {"blocks.1": values})
            self.finish(shard)
        stored = open_store(str(tmp_path / "s.zarr")).shard_map("blocks.1", 0)[0, 0, 0]
        assert stored.astype(np.float32).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_a_finished_store_is_intact_and_nothing_is_left_over(tmp_path):
    scripted.write_all(str(tmp_path / "s.zarr"))
    store = open_store(str(tmp_path / "s.zarr"))
    assert [finding for _, found in verify(store) for finding in found] == []
    assert orphan_keys(store) == []
    assert not (tmp_path / "s.zarr/.tmp").exists()
    assert np.flatnonzero(~store.ok()).tolist() == [scripted.FAILED, scripted.NONFINITE]
    assert store.moments("blocks.3").nonfinite == 2


def test_the_identity_names_the_content(tmp_path):
    identities = {make_store(tmp_path / f"{seed}-{copy}", seed=seed).identity for seed in (0, 1) for copy in "ab"}
    assert len(identities) == 2


def test_tables_of_an_older_tubelet_lack_columns_and_still_read(tmp_path):
    """Columns that may be null may be absent, in finished stores and in begun ones."""
    added = ["temporal_view", "spatial_view", "shift_patches", "shift_tubelets", "patches"]
    path = tmp_path / "s.zarr"
    make_store(path)
    for name in ("clips.parquet", "plan.parquet"):
        table = from_parquet((path / name).read_bytes())
        older = table.drop_columns([column for column in added if column in table.column_names])
        (path / name).write_bytes(to_parquet(older))
    store = open_store(str(path))
    assert store.clips().schema.equals(FINISHED)
    assert all(store.clips()[name].null_count == store.plan.clips for name in added)
    assert store.kept_patches is None
    planned = StoreWriter.attach(str(path), store.plan.digest).planned_clips()
    assert planned.schema.equals(PLANNED)


PARQUET = """
import psutil
from stores import planned_table
from tubelet_store.clip_table import from_parquet, to_parquet

from_parquet(to_parquet(planned_table(10)))
table = planned_table(100_000)
before = psutil.Process().memory_info().rss
to_parquet(table)
print((psutil.Process().memory_info().rss - before) / table.nbytes)
"""


def test_a_table_that_was_written_leaves_no_memory_behind():
    folder = str(Path(__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", PARQUET],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": folder},
    )
    assert float(ran.stdout) < 0.5
