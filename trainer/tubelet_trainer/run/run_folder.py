"""The folder of a run while it trains: locked by one process, with configurations and logs."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tubelet.config import dump_yaml
from tubelet.durable_files import locked, replace_file
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.checkpoint import latest_name
from tubelet_trainer.run.trackers import MetricsLog, Prefixed, Tracker, open_tracker
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.sae_files import RECORD, load_record
from tubelet_trainer.specs import OWN_FIELDS, flat

_LOCK = ".lock"


@contextmanager
def writing(run: Run, resumed_from: str | None) -> Iterator[Logs]:
    """The run's logs, while no other process can write into its folder.

    Args:
        run: As its newest checkpoint left it.
        resumed_from: Name of that checkpoint.

    Raises:
        TubeletError: another process writes there, or has written there since the checkpoint was read.
    """
    with ExitStack() as stack:
        if run.ranks.first:
            stack.enter_context(exclusive(run.config.out))
            if latest_name(run.config.out / "checkpoints") != resumed_from:
                raise TubeletError(f"Another process trained into {run.config.out} at the same time", "Run it again")
            _write_configs(run)
        logs = Logs(run, run.loader.step)
        stack.callback(logs.close)
        yield logs


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock the run folder, created if missing, for this process.

    Raises:
        TubeletError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK, wait=False))
        except BlockingIOError as error:
            raise TubeletError(
                f"Another process is training into {folder}", "Wait for it, or choose another --out"
            ) from error
        except OSError as error:
            # A file system without locks cannot tell processes apart.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        yield


def _write_configs(run: Run) -> None:
    """The run's configuration, and that of each SAE as it would be trained alone."""
    tree = run.config.model_dump(mode="json", by_alias=True)
    if run.sae_runs[0].name:
        # Without defaults, which would be set for SAEs of other kinds too when the file is read back.
        tree |= {name: section for name, section in _as_set(run.config).items() if name in OWN_FIELDS}
    replace_file(run.config.out / "config.yaml", yaml.safe_dump(tree, sort_keys=False).encode())
    for sae_run in run.sae_runs:
        if sae_run.name:
            sae_run.out.mkdir(parents=True, exist_ok=True)
            decided = {"block_patches": run.streams.block_patches, "resident_shards": run.config.resident_shards}
            alone = sae_run.spec.config.model_copy(update=decided)
            replace_file(sae_run.out / "config.yaml", dump_yaml(alone).encode())


def _as_set(config: TrainConfig) -> dict[str, Any]:
    defaults: dict[str, Any] = {name: {} for name in ("sae", "objective", "optimizer")}
    return {**defaults, **config.model_dump(mode="json", by_alias=True, exclude_unset=True)}


class Logs:
    """metrics.jsonl of each SAE, and one tracker for all; nothing on ranks but the first."""

    def __init__(self, run: Run, step: int) -> None:
        self._logs: dict[str, MetricsLog] = {}
        self._tracker: Tracker | None = None
        if run.ranks.first:
            config = run.config
            tracker = open_tracker(config.tracker, config.out, step, flat(config.model_dump(mode="json")))
            self._tracker = tracker
            self._logs = {
                sae_run.name: MetricsLog(sae_run.out / "metrics.jsonl", step, Prefixed(tracker, sae_run.name))
                for sae_run in run.sae_runs
            }

    def write(self, kind: str, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """One line for each SAE that has values, by its name."""
        if self._logs:
            for name, line in values.items():
                self._logs[name].write(kind, step, **line)

    def close(self) -> None:
        """Close the files and the tracker."""
        for log in self._logs.values():
            log.close()
        if self._tracker is not None:
            self._tracker.close()


def exported(out: Path, run: Run) -> bool:
    """There is an SAE in `out`, and it was trained on the run's store."""
    return (out / RECORD).is_file() and load_record(out).provenance.get("store_identity") == run.store.identity
