"""A trained SAE on disk: `sae.safetensors` (weights and normalization) and `sae.json` (recipe and provenance).

`sae.json` is written last: where it is, the SAE is whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tubelet.config import Config, validate
from tubelet.durable_files import replace_file
from tubelet.errors import TubeletError
from tubelet_trainer.format_1 import current_record, current_tensor
from tubelet_trainer.sae.config import AnySAEConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

WEIGHTS = "sae.safetensors"
RECORD = "sae.json"


class SAERecord(Config):
    """What `sae.json` holds."""

    format: Literal["tubelet-sae"] = "tubelet-sae"
    format_version: Literal[1] = 1
    channels: int
    config: AnySAEConfig
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """What it was trained on: store identity, hook, order, held-out share and seed, tokens, final metrics, versions."""


def save_sae(folder: Path, sae: SAE, provenance: dict[str, JsonValue]) -> None:
    """Write `sae` into `folder`, each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    record = {
        "format": "tubelet-sae",
        "format_version": 1,
        "channels": sae.channels,
        "config": sae.config.model_dump(mode="json"),
        "provenance": provenance,
    }
    replace_file(folder / WEIGHTS, save(tensors))
    replace_file(folder / RECORD, json.dumps(record, indent=2).encode())


def load_record(folder: str | os.PathLike[str]) -> SAERecord:
    """Recipe and provenance of the SAE in `folder`.

    Raises:
        TubeletError: there is none, or the file is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        if inside := sorted(each.parent.name for each in Path(folder).glob(f"*/{RECORD}")):
            raise TubeletError(f"{folder} holds {len(inside)} SAEs", f"Name the folder of one: {', '.join(inside)}")
        remedy = "Finish the training: run `tubelet train` again" if Path(folder).is_dir() else "Check the path"
        raise TubeletError(f"No SAE in {folder}: {RECORD} is missing", remedy)
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise TubeletError(f"{path} is not valid JSON: {error}", "Copy the SAE again from its source") from error
    return validate(SAERecord, current_record(tree) if isinstance(tree, dict) else tree, str(path))


def load_sae(folder: str | os.PathLike[str], device: str = "cpu") -> SAE:
    """The SAE in `folder`, ready for inference (`eval` mode, no gradients), with its normalization.

    Raises:
        TubeletError: there is none, or its files are damaged or do not belong together.
    """
    record = load_record(folder)
    path = Path(folder) / WEIGHTS
    whitens = record.config.normalization.whitening != "none"
    sae = SAE(record.config, Normalization.identity(record.channels, whitens))
    try:
        sae.load_state_dict({current_tensor(name): tensor for name, tensor in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TubeletError(
            f"{path} does not hold the SAE that {RECORD} describes: {reason}", "Copy both again"
        ) from error
    return sae.to(device).eval().requires_grad_(False)
