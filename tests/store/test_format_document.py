"""docs/store-format.md says what the code does: its tables are the code's, and its recipe reads a store."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any, get_args

import google_crc32c
import numpy as np
import pytest
import scripted

from stores import make_plan, make_store
from tubelet_store.clip_table import FINISHED, OUTCOME, PLANNED, ClipOutcome, from_parquet
from tubelet_store.commit import Commit, StoredObject
from tubelet_store.manifest import SCHEMA
from tubelet_store.moments import COVARIANCE_MAX_CHANNELS, NORM_BINS, Moments
from tubelet_store.object_keys import commit_key, commit_moments_key, shard_key
from tubelet_store.plan import DTypeName, Grid, Hook, Plan, TokenSelection
from tubelet_store.reader import open_store
from tubelet_store.store_state import FORMAT_VERSION, StoreState
from tubelet_store.verify import expected_objects

DOCUMENT = (Path(__file__).parents[2] / "docs/store-format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def table(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def json_types(model: Any) -> dict[str, set[str]]:
    """JSON types each field of `model` may have, by pydantic's own schema of what it writes."""
    schema = model.model_json_schema(mode="serialization")

    def resolve(entry: dict[str, Any]) -> set[str]:
        if "$ref" in entry:
            return resolve(schema["$defs"][entry["$ref"].rsplit("/", 1)[1]])
        if "anyOf" in entry:
            return set().union(*(resolve(option) for option in entry["anyOf"]))
        if "const" in entry:
            return {{int: "integer", str: "string"}[type(entry["const"])]}
        return {entry["type"]}

    return {name: resolve(entry) for name, entry in schema["properties"].items()}


@pytest.mark.parametrize(("title", "model"), [("State", StoreState), ("Plan", Plan), ("Commit record", Commit)])
def test_every_json_field_is_documented_with_its_type(title, model):
    documented = {name: {word.split(" of ")[0] for word in kind.split(" or ")} for name, kind, _ in table(title)}
    assert documented == json_types(model)
    assert list(documented) == list(model.model_fields)


def test_the_fields_inside_the_plan_are_named():
    words = {name: set(re.findall(r"\w+", meaning)) for name, _, meaning in table("Plan")}
    assert words["grid"] >= set(Grid.model_fields)
    assert words["hooks"] >= set(Hook.model_fields)
    assert words["tokens"] >= set(TokenSelection.model_fields)
    assert words["dtype"] - {"or"} == set(get_args(DTypeName))


def test_the_version_is_the_codes():
    assert f"format version {FORMAT_VERSION}\n" in DOCUMENT.splitlines(keepends=True)[0]


@pytest.mark.parametrize(("title", "schema"), [("Clip table", FINISHED), ("Manifest", SCHEMA)])
def test_every_column_is_documented_with_its_type(title, schema):
    documented = [
        (name, kind.replace("element: ", "item: "), nullable == "yes") for name, kind, nullable, _ in table(title)
    ]
    assert documented == [
        (field.name, str(field.type).replace("element: ", "item: "), field.nullable) for field in schema
    ]


def test_the_columns_of_outcome_and_plan_are_where_the_text_says():
    names = [row[0] for row in table("Clip table")]
    assert names[: names.index("shift_tubelets") + 1] == PLANNED.names
    assert names[names.index("status") : names.index("corrupt_frames") + 1] == OUTCOME.names
    assert set(OUTCOME.names) == set(ClipOutcome.model_fields)
    assert [row[0] for row in table("Manifest")] == list(StoredObject.model_fields)


@pytest.mark.parametrize("channels", [3, COVARIANCE_MAX_CHANNELS + 1])
def test_every_statistic_is_documented_with_its_type_and_shape(channels):
    spread = "variance" if channels > COVARIANCE_MAX_CHANNELS else "covariance"
    documented = {
        name: (kind, shape) for name, kind, shape, _ in table("Moments") if name == spread or "variance" not in name
    }
    arrays = Moments.empty(channels).arrays()
    found = {
        name: (str(array.dtype), str(list(array.shape)).replace(str(channels), "D")) for name, array in arrays.items()
    }
    assert documented == found
    assert f"D <= {COVARIANCE_MAX_CHANNELS}" in section("Moments")
    assert f"[{NORM_BINS}]" in section("Moments")


@pytest.mark.parametrize("position", [0, 1, 700, NORM_BINS - 1])
def test_the_bins_are_where_the_text_says(position):
    lower, upper = 2.0 ** (-16 + position / 32), 2.0 ** (-16 + (position + 1) / 32)
    for norm in (lower * 1.0001, upper * 0.9999):
        assert Moments.of(np.array([[norm]])).norm_histogram[position] == 1


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("documented") / "s.zarr"
    scripted.write_all(str(path))
    return path


def key_pattern(documented: str) -> re.Pattern[str]:
    pattern = re.escape(documented)
    for name, text in (
        (r"<hook>", r"(?:blocks\.\d)"),
        (re.escape("<shard, six digits>"), r"\d{6}"),
        ("<shard>", r"\d+"),
        ("<statistic>", r"\w+"),
    ):
        pattern = pattern.replace(name, text)
    return re.compile(pattern + (r"(?:/0)*" if documented.endswith("/c") else ""))


def test_the_layout_lists_exactly_the_keys_of_a_store(path):
    keys = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    listed = {stored.key for stored in expected_objects(open_store(str(path)))}
    matched = set()
    for documented, _, in_manifest in table("Layout"):
        found = {key for key in keys if key_pattern(documented).fullmatch(key)}
        assert found, documented
        assert all((key in listed) == (in_manifest == "yes") for key in found), documented
        matched |= found
    assert matched == keys


def test_the_key_functions_are_in_the_layout():
    layout = [row[0] for row in table("Layout")]
    assert shard_key("activations", "<hook>", 7).replace("7", "<shard>") in layout
    assert shard_key("special_tokens", "<hook>", 7).replace("7", "<shard>") in layout
    assert commit_key(123456).replace("123456", "<shard, six digits>") in layout
    assert commit_moments_key(123456).replace("123456", "<shard, six digits>") in layout


def read_by_the_document(path: Path, hook: str) -> np.ndarray:
    """The recipe, with nothing of Tubelet: float32 [clip, time, space, channel]."""
    tubelet = json.loads((path / "zarr.json").read_bytes())["attributes"]["tubelet"]
    assert tubelet["format_version"] == 1
    assert tubelet["state"] == "complete"
    plan = tubelet["plan"]
    canonical = json.dumps(plan, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert tubelet["plan_digest"] == "sha256:" + hashlib.sha256(canonical).hexdigest()
    clips, each, grid = plan["clips"], plan["clips_per_shard"], plan["grid"]
    (channels,) = (h["channels"] for h in plan["hooks"] if h["name"] == hook)
    shape = (grid["time"], grid["height"] * grid["width"], channels)
    width = {"float16": 2, "bfloat16": 2, "float32": 4}[plan["dtype"]]
    clip_bytes = shape[0] * shape[1] * shape[2] * width
    parts = []
    for shard in range(-(-clips // each)):
        n = min((shard + 1) * each, clips) - shard * each
        raw = (path / f"activations/{hook}/c/{shard}/0/0/0").read_bytes()
        assert len(raw) == n * clip_bytes + 16 * each + 4
        index = raw[n * clip_bytes : -4]
        assert struct.unpack("<I", raw[-4:])[0] == google_crc32c.value(index)
        absent = 2**64 - 1
        entries = [(i * clip_bytes, clip_bytes) if i < n else (absent, absent) for i in range(each)]
        assert list(struct.iter_unpack("<QQ", index)) == entries
        payload = raw[: n * clip_bytes]
        if plan["dtype"] == "bfloat16":
            values = (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(payload, {"float16": "<f2", "float32": "<f4"}[plan["dtype"]]).astype(np.float32)
        parts.append(values.reshape(n, *shape))
    return np.concatenate(parts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_recipe_reads_a_store(tmp_path, dtype):
    plan = make_plan(dtype=dtype, hooks={"blocks.1": 8, "blocks.3": 5})
    values = np.random.default_rng(0).standard_normal((10, 4, 15, 5), dtype=np.float32)
    other = np.zeros((10, 4, 15, 8), np.float32)
    make_store(tmp_path / "s.zarr", plan, {"blocks.1": other, "blocks.3": values}, failed=[7])
    expected = values.astype(plan.numpy_dtype).astype(np.float32)
    expected[7] = np.nan
    np.testing.assert_array_equal(read_by_the_document(tmp_path / "s.zarr", "blocks.3"), expected)


def test_the_identity_is_computed_as_the_text_says(path):
    tubelet = json.loads((path / "zarr.json").read_bytes())["attributes"]["tubelet"]
    rows = from_parquet((path / "manifest.parquet").read_bytes()).to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    lines = [tubelet["plan_digest"]] + [f"{row['key']} {row['size_bytes']} {row['sha256']}" for row in rows]
    assert tubelet["identity"] == "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
    for row in rows:
        raw = (path / row["key"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (row["size_bytes"], row["sha256"])
        clips = len(row["crc32c"])
        if clips:
            size = (len(raw) - 16 * tubelet["plan"]["clips_per_shard"] - 4) // clips
            found = [google_crc32c.value(raw[i * size : (i + 1) * size]) for i in range(clips)]
            assert found == row["crc32c"]


def test_the_array_metadata_is_what_the_text_says(path):
    document = json.loads((path / "activations/blocks.1/zarr.json").read_bytes())
    (codec,) = document["codecs"]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    assert codec["name"] == "sharding_indexed"
    assert codec["configuration"]["chunk_shape"][0] == 1
    assert codec["configuration"]["codecs"] == [little]
    assert [c["name"] for c in codec["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
    assert codec["configuration"]["index_location"] == "end"
    assert document["fill_value"] == "NaN"
    assert document["dimension_names"] == ["clip", "time", "space", "channel"]
