"""metrics.jsonl: one JSON object per line, appended as training goes.

A figure that is not defined (the FVU of a batch of one token, say) is null, and `undefined` names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tubelet.durable_files import replace_file
from tubelet_trainer.run.trackers import Tracker


class MetricsLog:
    """Append to the log at `path`.

    Args:
        path: The file.
        step: Steps already done. Lines after it belong to a run that was killed, and are dropped: they come again.
        tracker: Gets every new line too; closed with the log.
    """

    def __init__(self, path: Path, step: int, tracker: Tracker) -> None:
        kept = [line for line in _lines(path) if line["step"] <= step]
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._written = {(line.get("kind"), line["step"]) for line in kept}
        self._file = path.open("a")
        self._tracker = tracker

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append a line, unless the log has it from before a kill; it is in the file when this returns."""
        if (kind, step) in self._written:
            return
        line = {"kind": kind, "step": step, **defined(values)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        self._tracker.write(kind, step, {name: value for name, value in values.items() if math.isfinite(value)})

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        self._tracker.close()


def defined(values: Mapping[str, float]) -> dict[str, Any]:
    """`values` as JSON holds them: what is not a finite number is None, and named in `undefined`."""
    missing = [name for name, value in values.items() if not math.isfinite(value)]
    found = {name: None if name in missing else value for name, value in values.items()}
    return {**found, "undefined": missing} if missing else found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the log; a kill may have cut the last one short."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
