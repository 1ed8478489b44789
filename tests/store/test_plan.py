"""A plan's digest names what decides the bytes, all of it, and nothing of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stores import make_plan, planned_table
from tubelet.errors import TubeletError
from tubelet_store.plan import Grid, Hook, Plan, TokenSelection, canonical_json, differences, sha256_of_json
from tubelet_store.store_writer import StoreWriter

BASE = make_plan(
    hooks={"blocks.1": 8, "blocks.3": 8}, special_tokens=("cls",), special_time=4, dtype="float16", clips=10
)

# One other value for every field there is.
CHANGES: dict[str, Any] = {
    "dataset": {"kind": "folder", "name": "other"},
    "clip_table": "sha256:other",
    "clips": 11,
    "clips_per_shard": 5,
    "sampling": {"kind": "dense", "frames": 8, "stride": 2},
    "preprocessing": {"size": 224},
    "backbone": {"family": "random", "id": "none", "revision": "2"},
    "grid": Grid(time=4, height=5, width=3),
    "tokens": TokenSelection(kind="pooled", grid=Grid(time=4, height=6, width=10)),
    "hooks": (Hook(name="blocks.3", channels=8), Hook(name="blocks.1", channels=8)),
    "special_tokens": ("register.0",),
    "special_time": 1,
    "dtype": "bfloat16",
}


def test_every_field_is_tried_below():
    assert CHANGES.keys() | {"format_version"} == Plan.model_fields.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_digest_and_is_named_as_the_difference(field):
    other = BASE.model_copy(update={field: CHANGES[field]})
    assert other.digest != BASE.digest
    differences = BASE.differences(other)
    assert differences
    assert all(line.startswith(field) and " -> " in line for line in differences)
    assert BASE.differences(BASE) == []


def test_differences_are_short_lines() -> None:
    before = {"backbone": {"family": "videomae", "layers": 12}, "hooks": [{"name": "blocks.2", "channels": 96}], "x": 1}
    after = {"backbone": {"family": "dinov2", "layers": 12}, "hooks": [{"name": "blocks.3", "channels": 96}]}
    assert differences(before, after) == [
        "backbone.family: videomae -> dinov2",
        "hooks: blocks.2 -> blocks.3",
        "x: 1 -> none",
    ]
    wider = [{"name": "blocks.2", "channels": 97}]
    (line,) = differences({"hooks": before["hooks"]}, {"hooks": wider})
    assert "96" in line
    assert "97" in line
    (line,) = differences({"digest": "sha256:" + "a" * 64}, {"digest": "sha256:" + "b" * 64})
    assert line == f"digest: sha256:{'a' * 12} -> sha256:{'b' * 12}"
    assert differences({"special_tokens": []}, {"special_tokens": ["cls"]}) == ["special_tokens: none -> cls"]
    (line,) = differences({"text": "a" * 1000}, {"text": "b" * 1000})
    assert len(line) < 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_the_digest_ignores_key_order_and_survives_json(sampling):
    shuffled = dict(reversed(sampling.items()))
    plan = BASE.model_copy(update={"sampling": sampling})
    assert BASE.model_copy(update={"sampling": shuffled}).digest == plan.digest
    assert Plan.model_validate_json(json.dumps(plan.model_dump(mode="json"))).digest == plan.digest


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONHASHSEED": "1"}, {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Tokyo"}]
)
def test_the_digest_is_the_same_on_every_machine(tmp_path, environment):
    plan = BASE.model_copy(update={"dataset": {"kind": "folder", "name": "Übung 測試", "ratio": 0.1}})
    program = (
        "import sys; from tubelet_store.plan import Plan; "
        "print(Plan.model_validate_json(sys.stdin.buffer.read()).digest)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=plan.model_dump_json().encode(),
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, **environment, "HOME": str(tmp_path), "USER": "someone"},
    )
    assert found.stdout.decode().strip() == plan.digest


def test_the_digest_of_format_1_never_changes():
    plan = Plan(
        dataset={"name": "a"},
        clip_table="sha256:0",
        clips=3,
        clips_per_shard=2,
        sampling={},
        preprocessing={},
        backbone={},
        grid=Grid(time=1, height=2, width=3),
        hooks=(Hook(name="blocks.0", channels=4),),
    )
    assert canonical_json(plan.model_dump(mode="json")) == (
        b'{"backbone":{},"clip_table":"sha256:0","clips":3,"clips_per_shard":2,"dataset":{"name":"a"},"dtype":"float16",'
        b'"format_version":1,"grid":{"height":2,"time":1,"width":3},"hooks":[{"channels":4,"name":"blocks.0"}],'
        b'"preprocessing":{},"sampling":{},"special_time":1,"special_tokens":[]}'
    )
    assert plan.digest == sha256_of_json(plan.model_dump(mode="json"))


def test_the_hash_depends_on_neither_path_nor_provenance(tmp_path):
    digests = set()
    for folder, provenance in (("a", {"root": "/data/me", "token": "s3cret"}), ("b", {})):
        writer = StoreWriter.begin(str(tmp_path / folder / "s.zarr"), BASE, planned_table(10), provenance)
        text = writer.plan.model_dump_json()
        assert "s3cret" not in text
        assert str(tmp_path) not in text
        assert "/data/me" not in text
        digests.add(writer.state.plan_digest)
    assert digests == {BASE.digest}


@pytest.mark.parametrize(
    "fields",
    [
        {"clips": 0},
        {"clips_per_shard": 0},
        {"hooks": ()},
        {"hooks": (Hook(name="a", channels=1), Hook(name="a", channels=2))},
        {"dtype": "float64"},
        {"unknown": 1},
        {"grid": {"time": 0, "height": 1, "width": 1}},
        {"sampling": {"rate": float("nan")}},
    ],
)
def test_nonsense_is_refused(fields):
    with pytest.raises(ValidationError):
        Plan.model_validate({**BASE.model_dump(), **fields})


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".", "a.", ".a", "a..b", "a b", "ä", "a\n"])
def test_a_hook_name_is_a_safe_path_segment(name):
    with pytest.raises(ValidationError):
        Hook(name=name, channels=1)


@given(st.integers(1, 50), st.integers(1, 12))
def test_the_shards_cut_the_clips_without_gap_or_overlap(clips, clips_per_shard):
    plan = make_plan(clips=clips, clips_per_shard=clips_per_shard)
    assert [clip for shard in range(plan.shards) for clip in plan.shard_range(shard)] == list(range(clips))
    assert all(len(plan.shard_range(shard)) == clips_per_shard for shard in range(plan.shards - 1))
    for outside in (-1, plan.shards):
        with pytest.raises(IndexError):
            plan.shard_range(outside)


def test_an_unknown_hook_lists_those_there_are():
    with pytest.raises(TubeletError, match=r"blocks\.1, blocks\.3"):
        BASE.hook("blocks.2")
