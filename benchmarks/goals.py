"""Goals of the benchmarks: printed by each of them in one form, and collected in one table.

    python benchmarks/goals.py [--out FILE] [NAME ...]

A benchmark ends its output with one line for each of its goals:

    goal NAME VALUE LIMIT met|missed

NAME is `benchmark/what`, LIMIT is `<=X` or `>=X`. Most values are ratios of processor time, or of speeds measured in
the same run, so that they mean something on another machine. `make bench` runs this file: the benchmarks that take a
laptop minutes (LAPTOP), each in a process of its own, then the table of their goals.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The other benchmarks take longer, or need videos, peers or a GPU.
LAPTOP: dict[str, tuple[str, ...]] = {
    "loader": (),
    "train_step": ("--sizes", "8192"),
    "memory": (),
    "lens": (),
    "catalog": (),
    "remote": (),
    "scale": ("--clips", "1000", "10000"),
    "hops": (),
}
_LINE = re.compile(r"^goal (\S+) (\S+) ([<>]=)(\S+) (met|missed)$", re.MULTILINE)


@dataclass(frozen=True)
class Goal:
    """What a benchmark should reach, and what it measured."""

    name: str
    """`benchmark/what`, without spaces."""
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        """Exactly one limit; a name that is one word."""
        if (self.at_most is None) == (self.at_least is None) or not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name):
            raise ValueError(f"not a goal: {self.name!r}, {self.at_most} and {self.at_least}")

    @property
    def is_met(self) -> bool:
        """Whether the value is within its limit. A value that is not a number is not."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is not None and self.value >= self.at_least

    @property
    def limit(self) -> str:
        """The limit as it is printed."""
        return f"<={self.at_most:g}" if self.at_most is not None else f">={self.at_least:g}"

    def __str__(self) -> str:
        """The line that a benchmark prints."""
        return f"goal {self.name} {self.value:.4g} {self.limit} {'met' if self.is_met else 'missed'}"


def goal_lines(goals: Iterable[Goal]) -> list[str]:
    """An empty line, then the lines of `goals`."""
    return ["", *(str(goal) for goal in goals)]


def read_goals(text: str) -> list[Goal]:
    """The goals in the output of a benchmark."""
    goals = []
    for name, value, direction, limit, _ in _LINE.findall(text):
        bound = {"at_most" if direction == "<=" else "at_least": float(limit)}
        goals.append(Goal(name, float(value), **bound))
    return goals


def table(goals: list[Goal]) -> str:
    """The goals as text, one line each."""
    lines = [f"{'goal':<44}{'value':>10}{'limit':>10}"]
    lines += [
        f"{goal.name:<44}{goal.value:>10.4g}{goal.limit:>10}  {'met' if goal.is_met else 'MISSED'}" for goal in goals
    ]
    return "\n".join([*lines, f"{sum(goal.is_met for goal in goals)} of {len(goals)} goals met"])


def main() -> int:
    """Run benchmarks one after the other and print the table; 1 if one of them failed. A missed goal is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(LAPTOP)}; default: all")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    if unknown := set(options.names) - set(LAPTOP):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    goals: list[Goal] = []
    failed = []
    machine = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"
    for name in options.names or LAPTOP:
        print(f"== {name}", flush=True)
        began = time.monotonic()
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *LAPTOP[name]]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(f"{run.stdout}({time.monotonic() - began:.0f} s)\n", flush=True)
        read = read_goals(run.stdout)
        goals += read
        if run.returncode or not read:
            failed.append(name)
    text = f"{machine}, Python {platform.python_version()}\n\n{table(goals)}\n"
    print(text, end="")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if options.out is not None:
        options.out.write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
