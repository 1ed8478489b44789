"""SAEs that saev saved: one line of JSON, then a torch file with the weights.

The torch file is read with `weights_only=True`, which builds tensors and nothing else; a file that needs more is
refused. saev may center and scale tokens outside of its SAE, (x - mean) / scale, and notes neither number in the file:
its loader finds them in a sample of its own tokens. Given here, they are folded into the weights.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_trainer.sae.config import BatchTopKConfig, ReLUConfig, SAEConfig, TopKConfig
from tubelet_trainer.sae.interop.saelens import raw_recipe, with_weights, without_input_bias
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

InputBias = Literal["auto", "subtracted", "kept"]

_THRESHOLD = "activation.threshold"


def load_saev(
    path: Path, input_bias: InputBias = "auto", mean: Path | None = None, scale: float = 1.0
) -> tuple[SAE, dict[str, JsonValue]]:
    """The SAE in the file that saev's `dump` wrote, and its header.

    Args:
        path: The file, often `sae.pt`.
        input_bias: Whether the encoder takes x - b_dec (`subtracted`) or x (`kept`). [RECON] saev changed from the one
            to the other and does not record which; auto: subtracted for files without a schema number (the February
            2025 preprint), kept for later ones.
        mean: File with what was subtracted from its tokens, [D]: .npy, or a torch file. None: nothing.
        scale: What they were divided by then.

    Raises:
        TubeletError: the file is none of saev's, unsafe, or holds an activation that is not known here; the mean does
            not fit.
    """
    header, tensors = _read(path)
    try:
        W_enc, b_enc = tensors["W_enc"].float().T.contiguous(), tensors["b_enc"].float()
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"].float(), "b_dec": tensors["b_dec"].float()}
        config = _recipe(path, header, len(W_enc), _THRESHOLD in tensors)
        if input_bias == "kept" or (input_bias == "auto" and "schema" in header):
            weights["b_enc"] = without_input_bias(W_enc, b_enc, weights["b_dec"])
        if isinstance(config, BatchTopKConfig):
            # There what exceeds the threshold is kept, here what reaches it; 0 means "not learned yet".
            threshold = tensors[_THRESHOLD].float()
            weights["sparsifier.threshold"] = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
        plain = Normalization.identity(W_enc.shape[1])
        subtracted = plain.mean if mean is None else _vector(mean, W_enc.shape[1])
        sae = with_weights(config, Normalization(subtracted, torch.tensor(scale)), weights)
    except (KeyError, RuntimeError) as error:
        reason = f"{error.args[0]}".splitlines()[0]
        raise TubeletError(f"{path} does not hold the weights of a saev SAE: {reason}", "Copy it again") from error
    return sae, header


def _vector(path: Path, channels: int) -> Tensor:
    remedy = "Give the mean that saev subtracted: numpy.save, or torch.save of a vector"
    if not path.is_file():
        raise TubeletError(f"No file at {path}", remedy)
    try:
        if path.suffix == ".npy":
            vector = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            vector = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError, EOFError) as error:
        raise TubeletError(
            f"{path} cannot be read as a vector: it holds something else, or is damaged", remedy
        ) from error
    if not isinstance(vector, Tensor) or vector.numel() != channels or not vector.isfinite().all():
        what = f"numbers of shape {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise TubeletError(f"{path} holds {what}, not {channels} finite numbers", remedy)
    return vector.reshape(channels).float()


def _recipe(path: Path, header: dict[str, Any], latents: int, has_threshold: bool) -> SAEConfig:
    cfg = header.get("cfg", header)
    activation = cfg.get("activation", {})
    name = activation.get("cls") or header.get("cls") or "Relu"
    params = {**cfg, **activation.get("params", {})}
    size = raw_recipe(latents)
    match name:
        case "Relu" | "SparseAutoencoderConfig":
            return ReLUConfig(**size)
        case "BatchTopK" if has_threshold:
            return BatchTopKConfig(**size, k=int(params.get("top_k", 32)))
        # Before it learned a threshold, saev's BatchTopK kept the k largest of each token.
        case "TopK" | "BatchTopK":
            return TopKConfig(**size, k=int(params.get("top_k", 32)))
    raise TubeletError(f"{path}: activation '{name}' is not known here", "Known are Relu, TopK and BatchTopK")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise TubeletError(f"No file at {path}", "Give the file that saev wrote, often sae.pt")
    remedy = "Give the file that saev wrote, often sae.pt: a line of JSON, then weights"
    with path.open("rb") as file:
        try:
            # A header is short: more than this is another kind of file.
            header = json.loads(file.readline(1 << 20))
        except ValueError as error:
            raise TubeletError(f"{path} does not begin with a line of JSON", remedy) from error
        rest = io.BytesIO(file.read())
    if not isinstance(header, dict):
        raise TubeletError(f"{path} does not begin with a JSON object", remedy)
    try:
        tensors = torch.load(rest, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise TubeletError(
            f"{path} holds more than tensors, or is damaged; it was not unpickled, which could run its code",
            "Load it with saev where you trust it, and save `state_dict()` again with saev's `dump`",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TubeletError(f"{path} does not hold named tensors", remedy)
    return header, tensors
