"""`verify` misses no flipped byte, and names the object and the clip that it hit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stores import make_plan, make_store, planned_table
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.orphans import orphan_keys
from tubelet_store.reader import open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verify import Finding, expected_objects, verify

CLIP_BYTES = 2 * 6 * 4 * 2
PLAN = make_plan(clips=7, clips_per_shard=3, grid=(2, 2, 3), hooks={"blocks.1": 4, "blocks.3": 4})
SHARDS = [f"activations/{hook}/c/{shard}/0/0/0" for hook in ("blocks.1", "blocks.3") for shard in range(3)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "s.zarr"
    make_store(path, PLAN, failed=[1])
    return path


@pytest.fixture
def path(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "s.zarr"))


def findings(path: Path) -> list[Finding]:
    return [finding for _, found in verify(open_store(str(path), allow_unfinished=True)) for finding in found]


def flip(file: Path, position: int, mask: int = 1) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= mask
    file.write_bytes(raw)


def test_an_intact_store_has_no_findings(pristine):
    assert findings(pristine) == []
    assert orphan_keys(open_store(str(pristine))) == []


def test_the_manifest_covers_every_object_that_says_what_the_store_holds(pristine):
    covered = {stored.key for stored in expected_objects(open_store(str(pristine)))}
    files = {file.relative_to(pristine).as_posix() for file in pristine.rglob("*") if file.is_file()}
    commits = {key for key in files if key.startswith("commits/")}
    assert files - covered - commits == {"zarr.json", "plan.parquet", "manifest.parquet"}
    assert not covered - files


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from(SHARDS), st.data())
def test_any_flipped_payload_byte_names_its_object_and_clip(pristine, key, data):
    shard = int(key.split("/")[3])
    clips = PLAN.shard_range(shard)
    position = data.draw(st.integers(0, len(clips) * CLIP_BYTES - 1))
    mask = 1 << data.draw(st.integers(0, 7))
    flip(pristine / key, position, mask)
    try:
        (finding,) = findings(pristine)
    finally:
        flip(pristine / key, position, mask)
    clip = clips[position // CLIP_BYTES]
    assert finding.key == key
    assert finding.clips == (clip,)
    assert f"clip {clip} (video video-{clip:04d})" in finding.problem


@pytest.mark.parametrize("position", [-1, -5, -3 * 16 - 4])
def test_a_flipped_index_byte_is_found(path, position):
    flip(path / SHARDS[0], position)
    (finding,) = findings(path)
    assert finding.key == SHARDS[0]
    assert finding.clips == ()
    assert "outside the clips' bytes" in finding.problem


def test_two_damaged_clips_are_both_named(path):
    flip(path / SHARDS[1], 0)
    flip(path / SHARDS[1], 2 * CLIP_BYTES)
    assert findings(path)[0].clips == (3, 5)


def test_a_truncated_object_is_found(path):
    raw = (path / SHARDS[2]).read_bytes()
    (path / SHARDS[2]).write_bytes(raw[:10])
    (finding,) = findings(path)
    assert finding == Finding(SHARDS[2], f"10 bytes instead of {len(raw)}")


@pytest.mark.parametrize("key", [SHARDS[0], "clips.parquet", "moments/blocks.3/mean/c/0"])
def test_a_missing_object_is_found(path, key):
    (path / key).unlink()
    assert findings(path) == [Finding(key, "missing")]


@pytest.mark.parametrize(
    "key",
    [
        "clips.parquet",
        "moments/blocks.1/covariance/c/0/0",
        "moments/blocks.1/count/c",
        "activations/blocks.1/zarr.json",
    ],
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fraction=st.floats(0, 0.999))
def test_any_flipped_byte_of_any_other_object_is_found(pristine, key, fraction):
    position = int(fraction * (pristine / key).stat().st_size)
    flip(pristine / key, position)
    try:
        (finding,) = findings(pristine)
    finally:
        flip(pristine / key, position)
    assert finding.key == key


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(fraction=st.floats(0, 0.999))
def test_a_damaged_manifest_is_refused_or_still_says_the_same_of_every_object(pristine, fraction):
    file = pristine / "manifest.parquet"
    before = [(o.key, o.size_bytes, o.sha256) for o in expected_objects(open_store(str(pristine)))]
    position = int(fraction * file.stat().st_size)
    flip(file, position)
    try:
        after = [(o.key, o.size_bytes, o.sha256) for o in expected_objects(open_store(str(pristine)))]
    except TubeletError as error:
        after, refusal = before, str(error)
    else:
        refusal = "manifest.parquet"
    finally:
        flip(file, position)
    assert after == before
    assert "manifest.parquet" in refusal


def test_a_swapped_pair_of_objects_is_found(path):
    first, second = path / SHARDS[0], path / SHARDS[3]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    assert {finding.key for finding in findings(path)} == {SHARDS[0], SHARDS[3]}


def test_orphans_are_listed_and_commit_records_are_none(path):
    (path / "activations/blocks.1/c/9/0/0").mkdir(parents=True)
    (path / "activations/blocks.1/c/9/0/0/0").write_bytes(b"x")
    (path / "notes.txt").write_text("mine")
    assert orphan_keys(open_store(str(path))) == ["activations/blocks.1/c/9/0/0/0", "notes.txt"]
    assert findings(path) == []


def test_an_unfinished_store_is_verified_by_its_commit_records(tmp_path):
    writer = StoreWriter.begin(str(tmp_path / "s.zarr"), PLAN, planned_table(7), {})
    with writer.shard(1) as shard:
        for _ in PLAN.shard_range(1):
            shard.append(ClipOutcome.failure("open_failed", "on purpose"))
        shard.commit()
    assert findings(tmp_path / "s.zarr") == []
    flip(tmp_path / "s.zarr" / SHARDS[4], CLIP_BYTES)
    flip(tmp_path / "s.zarr/commits/000001.moments.safetensors", -1)
    assert {(f.key, f.clips) for f in findings(tmp_path / "s.zarr")} == {
        (SHARDS[4], (4,)),
        ("commits/000001.moments.safetensors", ()),
    }


def test_the_verb_says_so_and_exits_with_1(path, capsys):
    assert main(["verify", str(path)]) == 0
    assert "nothing damaged" in capsys.readouterr().out
    flip(path / SHARDS[0], 0)
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{SHARDS[0]}: damaged: clip 0 (video video-0000)" in out
    assert "1 damaged object" in out
