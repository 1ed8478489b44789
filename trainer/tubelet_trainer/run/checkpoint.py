"""Checkpoints of a run: the whole state of its training.

    checkpoints/step-00001000/state.safetensors   tensors: weights, optimizer moments, dead-latent counts
    checkpoints/step-00001000/state.json          step, configuration, store identity, loader state, software
    checkpoints/latest                            name of the newest complete checkpoint

A checkpoint is written under a temporary name, synced and renamed; then `latest` is replaced. If the process is killed
at any point, `latest` names a complete checkpoint or does not exist.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tubelet.durable_files import replace_file, synchronize, write_durably
from tubelet.errors import TubeletError
from tubelet_trainer.format_1 import current_record, current_tensor

_TENSORS = "state.safetensors"
_RECORD = "state.json"
_LATEST = "latest"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    record: dict[str, Any]
    """JSON-able."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `checkpoint` below `folder`, point `latest` at it, delete all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{_PREFIX}{checkpoint.step:08d}"
    temporary = folder / f".{name}.tmp"
    _remove(temporary)
    temporary.mkdir()
    try:
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in checkpoint.tensors.items()}
        write_durably(temporary / _TENSORS, save(tensors))
        record = {**checkpoint.record, "step": checkpoint.step}
        write_durably(temporary / _RECORD, json.dumps(record, indent=2).encode())
        synchronize(temporary)
        # Left by a run that was killed between the rename and `latest`.
        _remove(folder / name)
        os.rename(temporary, folder / name)
    finally:
        _remove(temporary)
    synchronize(folder)
    replace_file(folder / _LATEST, name.encode())
    for outdated in sorted(path for path in folder.glob(f"{_PREFIX}*") if path.name < name)[: -(keep - 1) or None]:
        _remove(outdated)


def latest_name(folder: Path) -> str | None:
    """Name of the newest complete checkpoint below `folder`; None if there is none."""
    pointer = folder / _LATEST
    # Only a name below this folder is accepted.
    return Path(pointer.read_text().strip()).name if pointer.is_file() else None


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint below `folder`; None if there is none.

    Raises:
        TubeletError: the checkpoint that `latest` names is missing or damaged.
    """
    name = latest_name(folder)
    if name is None:
        return None
    path = folder / name
    try:
        record = current_record(json.loads((path / _RECORD).read_text()))
        tensors = {current_tensor(name): tensor for name, tensor in load_file(path / _TENSORS).items()}
        return Checkpoint(int(record["step"]), tensors, record)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        remedy = f"Write the name of another checkpoint into {folder / _LATEST}, or delete {folder} to start again"
        raise TubeletError(f"Checkpoint {path} cannot be read: {error}", remedy) from error


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
