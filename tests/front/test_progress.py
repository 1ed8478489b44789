"""Progress lines, which go to stderr."""

from __future__ import annotations

import pytest

from tubelet import progress as module
from tubelet.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_have_amount_rate_and_time_left_and_nothing_goes_to_stdout(clock, capsys) -> None:
    with Progress("reading", total=100, unit="clips") as progress:
        for _ in range(100):
            clock[0] += 0.5
            progress.advance()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "reading: 4 of 100 clips, 2 clips/s, 48 s left"
    assert lines[1] == "reading: 24 of 100 clips, 2 clips/s, 38 s left"
    assert lines[-1] == "reading: 100 of 100 clips, 2 clips/s, in 50 s"
    assert len(lines) == 6


def test_work_of_an_earlier_run_does_not_count_for_the_rate(clock, capsys) -> None:
    with Progress("training", total=1000, unit="steps", done=900) as progress:
        clock[0] += 10
        progress.update(910)
    assert capsys.readouterr().err == "training: 910 of 1,000 steps, 1 steps/s, 90 s left\n"


def test_bytes_have_units(clock, capsys) -> None:
    with Progress("copying", total=3 << 20, unit="bytes") as progress:
        clock[0] += 2
        progress.advance(1 << 20)
    assert capsys.readouterr().err == "copying: 1.0 MiB of 3.0 MiB, 512.0 KiB/s, 4 s left\n"


def test_a_silent_one_says_nothing(clock, capsys) -> None:
    with Progress("x", total=1, is_silent=True) as progress:
        progress.advance()
        progress.note("y")
    assert capsys.readouterr() == ("", "")


def test_what_is_over_at_once_needs_no_line(clock, capsys) -> None:
    with Progress("reading", total=2, unit="clips") as progress:
        clock[0] += 0.05
        progress.advance(2)
    assert capsys.readouterr().err == ""
