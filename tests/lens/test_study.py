"""Laws of `tubelet study`: every cell of the grid once, work done stays done, tables say what the evaluations say."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stores import make_plan, make_store, planned_table
from tubelet_lens.study.cells import cells
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.derived import common_frames
from tubelet_lens.study.run import StudySummary, run_cell, study
from tubelet_store import TubeletError
from tubelet_store.config import validate


def store_at(path: Path, seed: int, steps: int = 4) -> str:
    rng = np.random.default_rng(seed)
    plan = make_plan(clips=20, grid=(steps, 2, 2), hooks={"blocks.1": 8})
    x = rng.standard_normal((20, 1, 4, 8)) + 0.5 * rng.standard_normal((20, steps, 4, 8))
    # Each store shows videos of its own.
    table = planned_table(20)
    ids = pa.array([f"{path.stem}-{number}" for number in range(20)])
    table = table.set_column(table.column_names.index("video_id"), table.schema.field("video_id"), ids)
    return make_store(path, plan, {"blocks.1": x.astype(np.float32)}, table=table).url


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], StudyConfig]:
    root = tmp_path_factory.mktemp("sources")
    one, two, test = (store_at(root / f"{name}.zarr", seed) for seed, name in enumerate(("one", "two", "test")))

    def make(out: Path, **changes: object) -> StudyConfig:
        tree: dict[str, object] = {
            "out": str(out),
            "sources": {
                "a": {"backbone": "A", "dataset": "D", "train": one, "test": test},
                "b": {"backbone": "B", "dataset": "D", "train": two},
            },
            "variants": {
                "plain": {"settings": {"sae": {"kind": "topk", "k": 2, "expansion": 2}}},
                "contrast": {
                    "settings": {"sae": {"kind": "topk", "k": 2, "expansion": 2}, "objective": {"codes": "pre"}},
                    "weights": {"objective.lambda_t": [0.03, 0.3]},
                },
            },
            "seeds": [0, 1],
            "train": {"steps": 20, "batch_tokens": 32, "pairs": {"anchors": 16}, "device": "cpu"},
            "evaluate": {"null_draws": 1, "device": "cpu"},
            "cluster": {"workers": 2, "threads": 1},
        }
        return validate(StudyConfig, {**tree, **changes}, "the test")

    return make


@pytest.fixture(scope="module")
def ran(
    grid: Callable[[Path], StudyConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[StudyConfig, StudySummary]:
    config = grid(tmp_path_factory.mktemp("study"))
    return config, study(config)


def test_every_combination_is_a_cell_and_every_cell_is_done(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, summary = ran
    names = {cell.name for cell in cells(config)}
    variants = ("plain", "contrast,lambda_t=0.03", "contrast,lambda_t=0.3")
    assert names == {f"{source}/{variant}/seed={seed}" for source in "ab" for variant in variants for seed in (0, 1)}
    assert summary.cells == 12
    assert summary.failures == {}
    assert all(cell.done for cell in cells(config))


def test_a_row_is_the_mean_of_its_seeds(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, _ = ran
    rows = list(csv.DictReader((config.out / "tables" / "reconstruction.csv").open()))
    assert len(rows) == 6
    for row in rows:
        seeds = [
            cell.evaluation().figure("reconstruction.fvu").value
            for cell in cells(config)
            if (cell.source, cell.variant) == (row["source"], row["variant"])
        ]
        assert float(row["reconstruction.fvu"]) == pytest.approx(statistics.fmean(seeds))
        assert float(row["reconstruction.fvu.sd"]) == pytest.approx(statistics.stdev(seeds))
        assert row["reconstruction.fvu.seeds"] == "2"


def test_seeds_differ_and_a_cell_alone_is_the_same(ran: tuple[StudyConfig, StudySummary], tmp_path: Path) -> None:
    config, _ = ran
    first, second = (cell for cell in cells(config) if (cell.source, cell.variant) == ("a", "plain"))
    assert (
        first.evaluation().figure("reconstruction.fvu").value != second.evaluation().figure("reconstruction.fvu").value
    )
    train = {**first.train.model_dump(mode="json"), "out": str(tmp_path / "run")}
    evaluate = {**first.evaluate.model_dump(mode="json"), "run": str(tmp_path / "run"), "out": str(tmp_path / "e")}
    run_cell(train, evaluate, str(tmp_path), first.digest, 1)
    again = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    there = json.loads((first.folder / "evaluation" / "evaluation.json").read_text())
    said = [[section for section in tree["sections"] if section["name"] != "training"] for tree in (again, there)]
    assert said[0] == said[1]


def test_done_cells_are_not_done_again(
    grid: Callable[[Path], StudyConfig], ran: tuple[StudyConfig, StudySummary]
) -> None:
    config, _ = ran
    marks = {cell.name: (cell.folder / "cell.json").stat().st_mtime_ns for cell in cells(config)}
    removed = cells(config)[3]
    (removed.folder / "cell.json").unlink()
    summary = study(config)
    assert summary.done_before == 11
    changed = [
        cell.name for cell in cells(config) if marks[cell.name] != (cell.folder / "cell.json").stat().st_mtime_ns
    ]
    assert changed == [removed.name]


def test_a_cell_that_fails_is_listed_and_the_others_go_on(grid: Callable[[Path], StudyConfig], tmp_path: Path) -> None:
    # 8 channels x 2 = 16 latents: k of 40 cannot be.
    config = grid(
        tmp_path,
        seeds=[0],
        variants={
            "plain": {"settings": {"sae": {"kind": "topk", "k": 2, "expansion": 2}}},
            "broken": {"settings": {"sae": {"kind": "topk", "k": 40, "expansion": 2}}},
        },
    )
    summary = study(config)
    assert sorted(summary.failures) == ["a/broken/seed=0", "b/broken/seed=0"]
    assert all("40" in reason for reason in summary.failures.values())
    assert json.loads((tmp_path / "failures.json").read_text()) == summary.failures
    assert summary.page is not None
    assert "a/broken/seed=0" in summary.page.read_text()
    assert sum(cell.done for cell in cells(config)) == 2


def test_a_folder_of_other_settings_is_refused(
    grid: Callable[[Path], StudyConfig], ran: tuple[StudyConfig, object]
) -> None:
    config, _ = ran
    changed = grid(config.out, train={"steps": 21, "batch_tokens": 32, "device": "cpu"})
    with pytest.raises(TubeletError, match="other settings"):
        study(changed)


def test_a_mistyped_field_stops_the_study_before_anything_runs(
    grid: Callable[[Path], StudyConfig], tmp_path: Path
) -> None:
    config = grid(tmp_path, variants={"plain": {"settings": {"sae": {"kind": "topk", "kk": 2}}}})
    with pytest.raises(TubeletError, match=r"sae\.kk"):
        study(config)
    assert not list(tmp_path.iterdir())


def test_the_page_shows_tables_and_plots_that_exist(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, summary = ran
    assert summary.page is not None
    page = summary.page.read_text()
    for name in ("pareto", "coherence_lags"):
        assert f'src="plots/{name}.png"' in page
        assert (config.out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "contrast,lambda_t=0.03" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "| a | plain |" in (config.out / "study.md").read_text()


def test_two_backbones_are_compared_at_one_distance_in_time() -> None:
    assert common_frames({"videomae": 8.0, "dinov2": 4.0}) == 8.0
    assert common_frames({"one": 6.0, "two": 4.0}) is None
    assert common_frames({}) is None


def test_the_best_is_marked_by_what_is_better(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, _ = ran
    rows = list(csv.DictReader((config.out / "tables" / "reconstruction.csv").open()))
    first = (config.out / "study.md").read_text().split("\n## ")[0]
    lines = [line for line in first.splitlines() if line.startswith("| a |")]
    best = min((row for row in rows if row["source"] == "a"), key=lambda row: float(row["reconstruction.fvu"]))
    marked = [line for line in lines if line.split("|")[3].strip().startswith("**")]
    assert [line.split("|")[2].strip() for line in marked] == [best["variant"]]
