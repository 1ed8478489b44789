"""What happened in an extraction, for programs: one JSON object a line, appended run after run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tubelet.errors import TubeletError


class RunLog:
    """Writes events to `path`; with None they go nowhere. Use as a context manager.

    Every line has `time` (UNIX seconds) and `event`:

        start   plan, store, shards, pending, clips, workers, dashboard, versions
        shard   shard, clips (by `ok` or failure code), size_bytes, seconds (by stage)
        spooled shard
        retry   shard, reason
        failed  shard, reason
        lost    scheduler connection lost; reason
        end     status (`complete` or the error), shards_this_run, seconds, identity

    Raises:
        TubeletError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise TubeletError(
                    f"The run log {path} cannot be written: {error.strerror}", "Set log to another path"
                ) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, event: str, **fields: Any) -> None:
        """Append one event."""
        if self._file is not None:
            line = {"time": round(time.time(), 3), "event": event, **fields}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
