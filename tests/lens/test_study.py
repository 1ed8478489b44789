"""Laws of `tubelet study`: every cell of the grid once, work done stays done, tables say what the evaluations say."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure as Canvas

from stores import make_plan, make_store, planned_table
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_lens.results.evaluation import Evaluation
from tubelet_lens.results.section import Curve, Figure, Line, Section
from tubelet_lens.study.cells import Cell, cells
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.questions import Column, Question
from tubelet_lens.study.run_study import StudySummary, run_cell, study
from tubelet_lens.study.shared_figures import common_frames, equal_time_figures
from tubelet_lens.study.study_plots import _draw
from tubelet_lens.study.study_tables import StudyTable, figure_frame, study_table


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
    config, summary = ran
    rows = list(csv.DictReader((config.out / "tables" / "reconstruction.csv").open()))
    assert len(rows) == 6
    assert summary.tables["reconstruction"].to_csv(index=False).splitlines() == (
        (config.out / "tables" / "reconstruction.csv").read_text().splitlines()
    )
    for row in rows:
        seeds = [
            cell.evaluation().figure("reconstruction.fvu").value
            for cell in cells(config)
            if (cell.source, cell.variant) == (row["source"], row["variant"])
        ]
        assert float(row["reconstruction.fvu"]) == pytest.approx(statistics.fmean(seeds))
        assert float(row["reconstruction.fvu.sd"]) == pytest.approx(statistics.stdev(seeds))
        assert [float(row["reconstruction.fvu.low"]), float(row["reconstruction.fvu.high"])] == sorted(seeds)
        assert row["reconstruction.fvu.seeds"] == "2"


def figure(name: str, value: float | None, definition: str = "d", **fields: Any) -> Figure:
    return Figure(name=name, title="t", value=value, n=1, n_of="things", definition=definition, **fields)


def table_of(
    config: StudyConfig, derived: dict[str, list[Figure]], of_seeds: dict[tuple[str, str], list[Figure]]
) -> StudyTable:
    done = cells(config)
    question = Question("made", "T", "L", (Column("made.own", "own"), Column("seeds.cosine", "matched")))
    figures = figure_frame(done, {cell.name: cell.evaluation() for cell in done}, derived, of_seeds)
    table = study_table(question, figures, config.sources)
    assert table is not None
    return table


def test_a_figure_over_all_seeds_keeps_its_lowest_and_highest(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, _ = ran
    together = figure("seeds.cosine", 0.4, low=0.2, high=0.625)
    found = table_of(
        config, {}, {("a", "plain"): [together], ("b", "plain"): [together.model_copy(update={"low": 0.4})]}
    )
    (row,) = (
        row for row in csv.DictReader(io.StringIO(found.csv())) if (row["source"], row["variant"]) == ("a", "plain")
    )
    wanted = {"": "0.4", ".sd": "", ".low": "0.2", ".high": "0.625", ".seeds": "2"}
    assert {part: row[f"seeds.cosine{part}"] for part in wanted} == wanted
    assert "| a | plain | 0.400 (0.200 … 0.625) |" in found.markdown()
    assert (config.out / "study.md").read_text().count("## Stability between seeds") == 1
    real = next(csv.DictReader((config.out / "tables" / "seeds.csv").open()))
    # Two seeds are one pair.
    assert real["seeds.cosine"] == real["seeds.cosine.low"] == real["seeds.cosine.high"]


def test_definitions_are_those_of_every_cell(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, _ = ran
    said = "Share of clips of which the probe (penalty {}) is right, on {} clips."
    derived = {
        cell.name: [
            figure("made.own", 1.0, said.format(0.1 if cell.seed else 0.01, 20 if cell.source == "a" else "3,000.5"))
        ]
        for cell in cells(config)
    }
    wanted = said.format("{0.01 | 0.1}", "{20 | 3,000.5}")
    assert table_of(config, derived, {}).definitions == ((wanted,),)
    derived["b/plain/seed=1"] = [figure("made.own", 1.0, "Something else.")]
    alike, other = table_of(config, derived, {}).definitions[0]
    assert other == "b/plain/seed=1: Something else."
    assert alike.endswith(f": {wanted}")
    assert "a/plain/seed=0" in alike
    assert "b/plain/seed=1" not in alike


def test_curves_of_seeds_are_joined_where_all_have_a_value() -> None:
    axes = Canvas().subplots()
    one = Curve(name="a.b", title="t", x_label="x", y_label="y", x=(1, 2, 4), lines=(), definition="d")
    seeds = [
        one.model_copy(update={"lines": (Line(label="SAE", y=(1.0, 2.0, 4.0)),)}),
        one.model_copy(update={"x": (1.0, 2.0), "lines": (Line(label="SAE", y=(3.0, 6.0)),)}),
        one.model_copy(update={"lines": (Line(label="SAE", y=(5.0, 7.0, None)),)}),
    ]
    _draw(axes, seeds, seeds[0].lines[0], "#000000", "v")
    assert axes.lines[0].get_xydata().tolist() == [[1.0, 3.0], [2.0, 5.0]]


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


def test_the_figures_at_one_distance_are_each_backbones_own_lag(ran: tuple[StudyConfig, StudySummary]) -> None:
    """Source a steps 2 frames, source b 4: at 4 frames stand a's lag 2 and b's lag 1."""
    config, _ = ran
    done = [cell for cell in cells(config) if cell.variant == "plain"]
    values = {"a": (0.9, 0.7, 0.5), "b": (0.8, 0.6, 0.4)}

    def said(cell: Cell, lags: int = 3) -> Evaluation:
        y = tuple(value + cell.seed / 100 for value in values[cell.source])[:lags]
        lines = (Line(label="SAE", y=y), Line(label="raw", subject="raw", y=tuple(-value for value in y)))
        x = tuple(float(lag) for lag in range(1, lags + 1))
        curve = Curve(name="coherence.lags", title="t", x_label="x", y_label="y", x=x, lines=lines, definition="d")
        step = figure("coherence.step_frames", {"a": 2.0, "b": 4.0}[cell.source])
        section = Section(name="coherence", title="t", lead="l", figures=(step,), curves=(curve,))
        return cell.evaluation().model_copy(update={"sections": (section,)})

    found = equal_time_figures(done, {cell.name: said(cell) for cell in done})
    told = {name: {each.subject: each.value for each in figures} for name, figures in found.items()}
    assert told == {
        "a/plain/seed=0": {"sae": 0.7, "raw": -0.7},
        "a/plain/seed=1": {"sae": 0.71, "raw": -0.71},
        "b/plain/seed=0": {"sae": 0.8, "raw": -0.8},
        "b/plain/seed=1": {"sae": 0.81, "raw": -0.81},
    }
    definition = found["a/plain/seed=0"][0].definition
    assert "4 frames apart, which are 2 latent steps here" in definition
    # A curve that ends before that distance says nothing of it; the others still do.
    short = equal_time_figures(done, {cell.name: said(cell, 1 if cell.source == "a" else 3) for cell in done})
    assert [bool(short[cell.name]) for cell in done] == [cell.source == "b" for cell in done]
    # One source has nothing to be compared with.
    alone = [cell for cell in done if cell.source == "a"]
    assert equal_time_figures(alone, {cell.name: said(cell) for cell in alone}) == {}


def test_the_best_is_marked_by_what_is_better(ran: tuple[StudyConfig, StudySummary]) -> None:
    config, _ = ran
    rows = list(csv.DictReader((config.out / "tables" / "reconstruction.csv").open()))
    first = (config.out / "study.md").read_text().split("\n## ")[0]
    lines = [line for line in first.splitlines() if line.startswith("| a |")]
    best = min((row for row in rows if row["source"] == "a"), key=lambda row: float(row["reconstruction.fvu"]))
    marked = [line for line in lines if line.split("|")[3].strip().startswith("**")]
    assert [line.split("|")[2].strip() for line in marked] == [best["variant"]]
