"""Where metrics go: metrics.jsonl, and by choice TensorBoard, Weights & Biases or MLflow.

metrics.jsonl is the record: one JSON object per line, appended as training goes. A figure that is not defined (the FVU
of a batch of one token, say) is null, and `undefined` names it.

A tracker is a view of the record. Its library is imported when a run starts, and only then. A resumed run logs to the
same place (W&B, MLflow: `tracker.json` keeps the run's id); what was logged between the last checkpoint and a kill then
appears there twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tubelet.durable_files import replace_file
from tubelet.errors import TubeletError
from tubelet_trainer.config import AnyTracker, MLflowConfig, TensorBoardConfig, WandbConfig

_RECORD = "tracker.json"


class Tracker(Protocol):
    """Receives metrics as they are logged."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """`values` of step `step`, of `kind` train or eval."""
        ...

    def close(self) -> None:
        """Flush and close; everything is written when this returns."""
        ...


class MetricsLog:
    """Append to the log at `path`.

    Args:
        path: The file.
        step: Steps already done. Later lines belong to a run that was killed: they are dropped, and written again.
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
    """`values` for JSON: what is not finite is None, and listed under `undefined`."""
    missing = [name for name, value in values.items() if not math.isfinite(value)]
    known = {name: None if name in missing else value for name, value in values.items()}
    return {**known, "undefined": missing} if missing else known


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


class Prefixed:
    """A tracker shared by several SAEs: each writes under its own name.

    Args:
        tracker: Stays open: its owner closes it.
        name: Of the SAE; empty where it is the only one.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """`values` of step `step`, of `kind` train or eval."""
        self._tracker.write(f"{self._name}/{kind}" if self._name else kind, step, values)

    def close(self) -> None:
        """Nothing to close."""


class _Nowhere:
    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, out: Path, step: int) -> None:
        writer = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter
        # Events after `step` belong to a run that was killed: they are logged again, and replace the old ones.
        self._writer = writer(log_dir=str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: WandbConfig, out: Path, settings: Mapping[str, Any]) -> None:
        known = _recorded(out)
        self._run = _library("wandb", "wandb").init(
            project=config.project,
            name=config.name or out.name,
            mode=config.mode,
            dir=str(out),
            config=dict(settings),
            id=known,
            resume="allow",
        )
        _record(out, self._run.id)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        # Not `step=`: W&B drops what comes at a step it has passed, and evaluations share theirs with training.
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, config: MLflowConfig, out: Path, settings: Mapping[str, Any]) -> None:
        self._mlflow = _library("mlflow", "mlflow")
        if config.uri is not None:
            self._mlflow.set_tracking_uri(config.uri)
        self._mlflow.set_experiment(config.experiment)
        known = _recorded(out)
        run = self._mlflow.start_run(run_id=known, run_name=None if known else config.name or out.name)
        if known is None:
            # The server takes texts of 6000 characters at most.
            self._mlflow.log_params({name: str(value)[:6000] for name, value in settings.items()})
        _record(out, run.info.run_id)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def open_tracker(config: AnyTracker, out: Path, step: int, settings: Mapping[str, Any]) -> Tracker:
    """The tracker that `config` names.

    Args:
        config: Which.
        out: Folder of the run.
        step: Steps already done.
        settings: The run's configuration, flat.

    Raises:
        TubeletError: its library is not installed, or it cannot be set up.
    """
    try:
        match config:
            case TensorBoardConfig():
                return _TensorBoard(out, step)
            case WandbConfig():
                return _Wandb(config, out, settings)
            case MLflowConfig():
                return _MLflow(config, out, settings)
    except TubeletError:
        raise
    # Any error of the library: no key, no server, an incompatible version.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = {"wandb": "Run `wandb login`, or set --tracker.mode offline", "mlflow": "Check --tracker.uri"}
        raise TubeletError(
            f"The tracker {config.kind} cannot be opened: {reason}", remedy.get(config.kind, "Check its installation")
        ) from error
    return _Nowhere()


def _library(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise TubeletError(f"The tracker needs {package}, which is not installed", f"pip install {package}") from error


def _recorded(out: Path) -> str | None:
    path = out / _RECORD
    return str(json.loads(path.read_text())["id"]) if path.is_file() else None


def _record(out: Path, run_id: str) -> None:
    replace_file(out / _RECORD, json.dumps({"id": run_id}).encode())
