"""`tubelet info` says which tokens and which views a store holds, in words and in JSON."""

from __future__ import annotations

import json

import pytest

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet_store.plan import Grid, TokenSelection

WHOLE = Grid(time=4, height=4, width=6)


@pytest.mark.parametrize(
    ("grid", "tokens", "words", "record"),
    [
        ((4, 3, 5), None, "all 60 of the backbone's grid", {"kind": "all", "stored": 60}),
        (
            (4, 1, 7),
            TokenSelection(kind="patches", grid=WHOLE, seed=3),
            "7 of 24 patches, drawn for each clip (seed 3), at every time step",
            {"kind": "patches", "seed": 3, "stored": 28, "of": 96},
        ),
        (
            (2, 2, 2),
            TokenSelection(kind="pooled", grid=WHOLE),
            "averages over 2 x 2 x 3 (time x height x width) of the backbone's grid 4 x 4 x 6",
            {"kind": "pooled", "stored": 8, "of": 96},
        ),
    ],
)
def test_the_selection_of_tokens_and_the_views(tmp_path, capsys, grid, tokens, words, record):
    store = make_store(tmp_path / "s.zarr", make_plan(clips=9, grid=grid, tokens=tokens), clips_per_video=3)
    assert main(["info", store.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"tokens        {words}" in lines
    assert "views         3 per video, 3 clips each" in lines
    assert main(["info", store.url, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert record.items() <= found["tokens"].items()
    assert found["views"] == {"number": 3, "clips": {"0": 3, "1": 3, "2": 3}}


def test_a_broken_video_is_listed_once(tmp_path, capsys):
    store = make_store(tmp_path / "s.zarr", make_plan(clips=9), clips_per_video=3, failed=(1, 3, 4, 5))
    assert main(["info", store.url]) == 0
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  failed ")]
    assert len(failures) == 2
    assert "clip 1 " in failures[0]
    assert "clip 3 and 2 more " in failures[1]
