"""Twenty damaged videos through one extraction: the job ends, every file is stored right, flagged, or refused."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

from in_process import extract_here
from tubelet.config import validate
from tubelet_pipeline.extract_config import ExtractConfig

PARENTS = ("h264", "h264_open_gop", "hevc", "vp9", "mkv", "vfr", "mpeg4_b_avi", "long_gop")


@pytest.fixture(scope="module")
def mutations():
    """`benchmarks/mutations.py`."""
    path = Path(__file__).parents[2] / "benchmarks/mutations.py"
    spec = importlib.util.spec_from_file_location("mutations", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_file_is_lost_and_silence_is_rare(mutations, barcode_clips, tmp_path):
    sound = [barcode_clips[name] for name in PARENTS]
    (broken := tmp_path / "not-a-video.mp4").write_bytes(b"<html>" * 99)
    store, mutants = mutations.run_campaign(
        sound, [broken], 20, tmp_path / "run", lambda job: extract_here(validate(ExtractConfig, job, "the test"))
    )
    rows = {row["video_id"]: row for row in store.clips().to_pylist()}
    assert len(rows) == len(sound) + 1 + 20
    assert all(rows[f"sound/{path.name}"]["status"] == "ok" for path in sound)
    assert rows["broken/not-a-video.mp4"]["error"].startswith("open_failed: ")
    entries = mutations.inspect(store, mutants, others=())
    outcomes = [entry.outcome for entry in entries]
    assert {"right", "differs"} < set(outcomes), "the campaign met every kind of end"
    assert sum(entry.is_silent for entry in entries) <= 3
    assert all(row["error"] for row in rows.values() if row["status"] == "failed")


def test_a_cut_file_is_a_beginning_and_the_seed_decides(mutations, tmp_path):
    content = random.Random(1).randbytes(100_000)
    for kind in mutations.KINDS:
        one, again, other = (mutations.mutate(content, kind, random.Random(seed)) for seed in (5, 5, 6))
        assert one == again != other
        assert (content.startswith(one)) == (kind == "cut short")
        assert kind == "cut short" or (len(one) == len(content) and one != content)
    assert sorted(mutations.mutate(content, "blocks shuffled", random.Random(2))) == sorted(content)
