"""Goals of benchmarks: one line each, read back as they were printed; every benchmark can be imported."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from goals import LAPTOP, Goal, goal_lines, read_goals, table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("goal", "line"),
    [
        (Goal("loader/staging", 0.97, at_least=0.85), "goal loader/staging 0.97 >=0.85 met"),
        (Goal("loader/staging", 0.85, at_least=0.85), "goal loader/staging 0.85 >=0.85 met"),
        (Goal("loader/staging", 0.8449, at_least=0.85), "goal loader/staging 0.8449 >=0.85 missed"),
        (Goal("scale/cost", 1.2, at_most=1.2), "goal scale/cost 1.2 <=1.2 met"),
        (Goal("scale/cost", 1.21, at_most=1.2), "goal scale/cost 1.21 <=1.2 missed"),
        (Goal("faults/damaged", math.nan, at_most=0), "goal faults/damaged nan <=0 missed"),
    ],
)
def test_a_goal_is_one_line(goal, line):
    assert str(goal) == line


def test_goals_are_read_among_other_output():
    goals = [Goal("a/b", 1.5, at_most=2), Goal("a/c-d_e.f", 3, at_least=4)]
    text = "\n".join(["a table", "goal: none", *goal_lines(goals), "the end"])
    assert read_goals(text) == goals
    assert table(goals).endswith("1 of 2 goals met")


@pytest.mark.parametrize(
    ("name", "limits"), [("a/b", {}), ("a/b", {"at_most": 1, "at_least": 0}), ("a", {"at_most": 1}), ("a b/c", {})]
)
def test_what_is_no_goal_is_refused(name, limits):
    with pytest.raises(ValueError, match="not a goal"):
        Goal(name, 1.0, **limits)


def test_the_laptops_benchmarks_have_goals():
    for name in LAPTOP:
        assert "goal_lines(" in (BENCHMARKS / f"{name}.py").read_text()


def test_a_benchmark_that_fails_is_reported(monkeypatch, capsys, tmp_path):
    (tmp_path / "breaks.py").write_text("raise SystemExit(3)")
    (tmp_path / "silent.py").write_text("print('no goal')")
    (tmp_path / "good.py").write_text("print('goal good/x 1 <=2 met')")
    goals = importlib.import_module("goals")
    monkeypatch.setattr(goals, "LAPTOP", {"breaks": (), "silent": (), "good": ()})
    monkeypatch.setattr(goals, "__file__", str(tmp_path / "goals.py"))
    monkeypatch.setattr(sys, "argv", ["goals.py"])
    assert goals.main() == 1
    out = capsys.readouterr().out
    assert "1 of 1 goals met" in out
    assert out.splitlines()[-1] == "failed: breaks, silent"


def test_every_benchmark_can_be_imported():
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nimport {', '.join(names)}"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
