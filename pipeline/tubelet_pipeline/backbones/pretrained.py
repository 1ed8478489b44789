"""A checkpoint: which one, and finding and loading it, or a refusal with the reason.

    BackboneConfig.id ──local folder, or hub snapshot at one commit──▶ folder ──safetensors only──▶ model in eval mode

Only safetensors are read: nothing is unpickled. Missing weights are an error; `from_pretrained` would silently replace
them with random ones.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import nn

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.reference import REFERENCE_CHECKPOINTS
from tubelet_pipeline.demo_backbones import NAMES, demo_backbone
from tubelet_pipeline.preprocess import Preprocessing

# 5.6 to 5.17 load VideoMAE without its query and value biases (transformers PR 48675).
OLDEST_TRANSFORMERS = "5.18"

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
HUB_PATTERNS = (
    CONFIG_FILE,
    "*processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")

# Entries without influence on the computed numbers, or covered elsewhere (precision).
_VOLATILE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in the layout of transformers.

    Args:
        name: Hub id, or the name of the local folder: never a path, because it is hashed and published.
        folder: Where the files are on this machine.
        revision: Commit of the hub repository; None for a local folder.
        fields: Content of config.json.
    """

    name: str
    folder: Path
    revision: str | None
    fields: dict[str, Any]

    @property
    def model_type(self) -> str:
        """`model_type` in config.json."""
        return str(self.fields.get("model_type"))

    @property
    def config_digest(self) -> str:
        """Digest of the entries of config.json that influence the computed numbers."""
        kept = {name: value for name, value in self.fields.items() if name not in _VOLATILE_FIELDS}
        return "sha256:" + hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def require_transformers() -> None:
    """Refuse versions of transformers that lose weights in loading.

    Raises:
        TubeletError: the installed transformers is older than 5.18.
    """
    installed = version("transformers")
    if Version(installed) < Version(OLDEST_TRANSFORMERS):
        raise TubeletError(
            f"transformers {installed} is too old: 5.6 to 5.17 lose the query and value biases of VideoMAE in loading",
            f"pip install 'transformers>={OLDEST_TRANSFORMERS}'",
        )


def find_checkpoint(id: str, revision: str | None) -> Checkpoint:
    """The checkpoint `id`: a local folder if it exists, else a shipped backbone of that name, else a hub repository.

    Hub repositories are downloaded into the hub's cache.

    Raises:
        TubeletError: none exists, the hub cannot be reached, or the files are not a checkpoint in safetensors.
    """
    local = Path(id).expanduser()
    if local.is_dir():
        if revision is not None:
            raise TubeletError(
                f"'{id}' is a local folder and has no revision '{revision}'", "Remove revision, or give a hub id"
            )
        return _read_checkpoint(local.resolve().name, local, None)
    if id in NAMES and revision is None:
        return _read_checkpoint(id, demo_backbone(id), None)
    if not HUB_ID.fullmatch(id):
        raise TubeletError(
            f"There is no folder '{id}'", f"{_suggestion(id)}Check the path; a hub id has the form 'owner/model'"
        )
    folder = _fetch(id, revision)
    # In the hub's cache a snapshot's folder is named after its commit.
    return _read_checkpoint(id, folder, folder.name if COMMIT.fullmatch(folder.name) else revision)


def _fetch(id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"'{id}'" if revision is None else f"'{id}' at revision '{revision}'"
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError as error:
        raise TubeletError(
            f"{what} is gated: the hub requires accepting its terms",
            f"Accept them on https://huggingface.co/{id}, then run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise TubeletError(f"The hub's '{id}' has no revision '{revision}'", "Give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise TubeletError(
            f"There is neither a folder nor a public hub model {what}",
            f"{_suggestion(id)}Check the spelling; for a private model run `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise TubeletError(
            f"There is no folder {what}, and the hub cannot be reached for a model of that name",
            f"{_suggestion(id)}Check the spelling and the network, or fetch it on a machine that has one "
            f"(`hf download {id}`) and copy it here",
        ) from error


def _suggestion(id: str) -> str:
    """A sentence that names the shipped or published checkpoint most like `id`, or like its last part; else empty."""
    published = [reference.checkpoint for reference in REFERENCE_CHECKPOINTS.values()]
    for wrong in (id, id.rpartition("/")[2]):
        if hint := difflib.get_close_matches(wrong, [*NAMES, *published], n=1, cutoff=0.75):
            shipped = ", which comes with Tubelet" if hint[0] in NAMES else ""
            return f"Did you mean '{hint[0]}'{shipped}? "
    return ""


def _read_checkpoint(name: str, folder: Path, revision: str | None) -> Checkpoint:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise TubeletError(f"'{name}' has no {CONFIG_FILE}", "Give a checkpoint in the layout of transformers")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TubeletError(f"{CONFIG_FILE} of '{name}' is not JSON: {error}", "Fetch the file again") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise TubeletError(f"{CONFIG_FILE} of '{name}' states no model_type", "Give a checkpoint of transformers")
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        raise TubeletError(
            f"'{name}' holds no {WEIGHT_FILES[0]}; weights in pickle files (.bin, .pt) are not read",
            "Convert them once, if you trust them: "
            f"`AutoModel.from_pretrained('{name}').save_pretrained('NEW_FOLDER')`, and copy {CONFIG_FILE}'s "
            "neighbor preprocessor_config.json along",
        )
    return Checkpoint(name, folder, revision, fields)


def load_model(
    checkpoint: Checkpoint, architecture: str, dtype: torch.dtype, device: torch.device, unneeded: tuple[str, ...]
) -> Any:
    """The model of `checkpoint` as transformers' class `architecture`, in eval mode, without gradients, on `device`.

    Args:
        checkpoint: Found by `find_checkpoint`.
        architecture: Class name in transformers. Heads and decoders outside of it are not loaded.
        dtype: Number format of the weights, whatever the format of the file.
        device: Where to put it.
        unneeded: Prefixes of parameters that no hook depends on; only these may be missing.

    Raises:
        TubeletError: weights are missing or do not fit the configuration, or a file is damaged.
    """
    import transformers

    with quiet_transformers():
        try:
            model, info = getattr(transformers, architecture).from_pretrained(
                checkpoint.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # safetensors, huggingface_hub and transformers each raise their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TubeletError(
                f"'{checkpoint.name}' does not load as {architecture}: {reason}",
                "Fetch its files again; the weights may be damaged or belong to another config.json",
            ) from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(unneeded))
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise TubeletError(
            f"'{checkpoint.name}' lacks {len(missing)} of the weights of {architecture}: {shown}",
            "transformers would use random numbers for them. Use a complete checkpoint; if query and value biases are "
            f"named, transformers 5.6 to 5.17 lost them in saving or loading: use >={OLDEST_TRANSFORMERS}",
        )
    model.requires_grad_(False)
    return model.eval().to(device)


def digest_of_weights(model: nn.Module, unneeded: tuple[str, ...]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor that the hooks depend on, ordered by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(unneeded):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return "sha256:" + digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and load report; their faults are raised as errors instead."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


class BackboneConfig(Config):
    """A frozen vision backbone from the Hugging Face hub or from a local folder."""

    id: str
    """Hub id (`MCG-NJU/videomae-base`), local folder that holds config.json and model.safetensors, or a backbone that
    comes with Tubelet (`videomae-tiny`, `dinov2-tiny`)."""
    revision: str | None = None
    """Commit of the hub repository. None: the newest; the commit that was loaded is recorded in the store."""
    family: str | None = None
    """Family of the architecture. None: by the checkpoint's `model_type`."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of weights and activations in the forward pass."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start of each worker, faster passes on a GPU."""
    device: str = "auto"
    """`auto` (CUDA where there is one, else CPU), `cpu`, `cuda`, `cuda:1`, ..."""
    preprocessing: Preprocessing | None = None
    """How frames become pixels. None: as the checkpoint's own processor file says."""
