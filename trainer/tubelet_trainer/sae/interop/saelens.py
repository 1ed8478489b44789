"""SAEs in SAELens's layout: `cfg.json` and `sae_weights.safetensors`, as its version 6 reads and writes them.

    Tubelet                    SAELens
    W_enc [F, D]               W_enc [D, F]
    relu                       standard
    gated                      gated         (b_enc is b_gate)
    topk, abstopk              topk, abstopk
    jumprelu                   jumprelu      (exp(log_threshold) is threshold)
    batchtopk                  jumprelu      (its one threshold for every latent, as SAELens itself saves it)

Normalization is folded in: what is written takes raw tokens. SAELens folds its own at the end of a training and then
sets `normalize_activations` to none; a checkpoint of an unfinished training has it in files next to the weights, and is
folded when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tubelet.durable_files import replace_file
from tubelet.errors import TubeletError
from tubelet_trainer.sae.config import (
    AbsTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    NormalizationConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sparsifiers import BatchTopK, Gated, JumpReLU

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"

# The release whose loader these files were tried with. Without a version of at least 6 it would take them for older.
_SAELENS_VERSION = "6.54.12"

# Files in which a checkpoint of an unfinished training keeps its normalization.
SCALER = "activation_scaler.json"
WHITENING = "activation_whitening.safetensors"

# Normalizations per token, which cannot be folded into weights.
_UNFOLDABLE = ("layer_norm", "constant_norm_rescale")


def save_saelens(folder: Path, sae: SAE, provenance: dict[str, JsonValue]) -> None:
    """Write `sae` into `folder` for `sae_lens.SAE.load_from_disk`."""
    folded = sae.fold()
    sparsifier, config = folded.sparsifier, folded.config
    tensors = {"W_enc": folded.W_enc.T, "b_enc": folded.b_enc, "W_dec": folded.W_dec, "b_dec": folded.b_dec}
    settings: dict[str, Any] = {}
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(config.kind, config.kind)  # type: ignore[attr-defined]
    if isinstance(config, TopKConfig | AbsTopKConfig):
        settings = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(sparsifier, Gated):
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": sparsifier.r_mag, "b_mag": sparsifier.b_mag}
    elif isinstance(sparsifier, JumpReLU):
        tensors["threshold"] = sparsifier.threshold
    elif isinstance(sparsifier, BatchTopK):
        # Here what reaches the threshold is kept, there what exceeds it: the next smaller number says the same.
        threshold = sparsifier.threshold.float().clamp_min(0)
        below = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf)).clamp_min(0)
        tensors["threshold"] = below.expand(folded.latents)
    described = {
        "architecture": architecture,
        "d_in": folded.channels,
        "d_sae": folded.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **settings,
        "metadata": {
            "sae_lens_version": _SAELENS_VERSION,
            "hook_name": provenance.get("hook"),
            "tubelet": {"config": sae.config.model_dump(mode="json"), "provenance": provenance},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, save({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}))
    replace_file(folder / CONFIG, json.dumps(described, indent=2).encode())


def load_saelens(folder: Path) -> tuple[SAE, dict[str, JsonValue]]:
    """The SAE that SAELens left in `folder`, and its `cfg.json`.

    Raises:
        TubeletError: there is none, or one that has no counterpart here.
    """
    described, tensors = _read(folder)
    where = folder / CONFIG
    normalizes = described.get("normalize_activations") or "none"
    if normalizes in _UNFOLDABLE:
        raise TubeletError(
            f"{where}: normalize_activations is '{normalizes}', which depends on each token",
            "Only 'none', 'expected_average_only_in' and 'covariance_whitening' can be imported",
        )
    if described.get("reshape_activations", "none") != "none" or described.get("finetuning_scaling_factor"):
        raise TubeletError(
            f"{where}: reshaped activations and fine-tuned scaling factors have no counterpart here",
            "Import an SAE without them",
        )
    architecture = described.get("architecture", "standard")
    if described.get("activation_fn_str", described.get("activation_fn")) == "topk":
        architecture = "topk"
    channels, latents = int(described["d_in"]), int(described["d_sae"])
    config = _recipe(where, architecture, described, latents)
    try:
        weights = _weights(config, described, tensors)
        sae = with_weights(config, _normalization(folder, normalizes, channels), weights)
    except (KeyError, RuntimeError) as error:
        reason = f"{error.args[0]}".splitlines()[0]
        raise TubeletError(f"{folder / WEIGHTS} does not fit {CONFIG}: {reason}", "Copy both again") from error
    return sae, described


def with_weights(config: SAEConfig, normalization: Normalization, weights: Mapping[str, Tensor]) -> SAE:
    """The SAE with these weights, for inference, with the normalization that it saw folded in.

    Raises:
        RuntimeError: the weights have other shapes.
    """
    sae = SAE(config, normalization)
    sae.load_state_dict({**sae.state_dict(), **weights})
    return sae.eval().fold()


def raw_recipe(latents: int) -> dict[str, Any]:
    """Fields of the recipe of an SAE from elsewhere: its size, and tokens taken as they are."""
    return {"latents": latents, "normalization": NormalizationConfig(center=False, scale=False)}


def without_input_bias(W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor) -> Tensor:
    """Encoder bias [F] of an SAE that does not subtract b_dec first, for one that does: b_enc + W_enc b_dec."""
    return (b_enc_F.double() + W_enc_FD.double() @ b_dec_D.double()).to(b_enc_F.dtype)


def _normalization(folder: Path, kind: str, channels: int) -> Normalization:
    """What SAELens does to raw tokens before the SAE in `folder` sees them: x factor, or (x - mean) matrix.

    Raises:
        TubeletError: its numbers are not there.
    """
    plain = Normalization.identity(channels)
    if kind == "expected_average_only_in":
        factor = _scaling_factor(folder / SCALER)
        return Normalization(plain.mean, torch.tensor(1 / factor))
    if kind == "covariance_whitening":
        path = folder / WHITENING
        if not path.is_file():
            raise _unfolded(folder, kind, f"its {WHITENING} is missing")
        try:
            t = {name: tensor.float() for name, tensor in load_file(path).items()}
            return Normalization(t["mean"], plain.scale, t["matrix"], t["inverse_matrix"])
        except (KeyError, OSError, SafetensorError) as error:
            raise TubeletError(f"{path} cannot be read: {error}", "Copy the checkpoint again") from error
    return plain


def _scaling_factor(path: Path) -> float:
    kind = "expected_average_only_in"
    if not path.is_file():
        raise _unfolded(path.parent, kind, f"its {SCALER} is missing")
    try:
        factor = json.loads(path.read_text())["scaling_factor"]
    except (ValueError, KeyError, TypeError) as error:
        raise TubeletError(f"{path} cannot be read: {error}", "Copy the checkpoint again") from error
    if not isinstance(factor, float | int) or not (math.isfinite(factor) and factor > 0):
        raise _unfolded(path.parent, kind, f"{SCALER} holds no factor (scaling_factor is {factor!r})")
    return float(factor)


def _unfolded(folder: Path, kind: str, why: str) -> TubeletError:
    return TubeletError(
        f"{folder / CONFIG}: normalize_activations is '{kind}', which SAELens has not folded into the weights; {why}",
        "Import the SAE that SAELens saved when its training ended, or a checkpoint with all its files",
    )


def _recipe(where: Path, architecture: str, described: dict[str, Any], latents: int) -> SAEConfig:
    size = raw_recipe(latents)
    match architecture:
        case "standard":
            return ReLUConfig(**size)
        case "gated":
            return GatedConfig(**size)
        case "jumprelu":
            return JumpReLUConfig(**size)
        case "topk" | "abstopk":
            # Before version 6 k stood among the arguments of the activation function.
            k = described.get("k", described.get("activation_fn_kwargs", {}).get("k"))
            if not isinstance(k, int):
                raise TubeletError(f"{where}: a {architecture} SAE without k", "Copy the file again")
            return (TopKConfig if architecture == "topk" else AbsTopKConfig)(**size, k=k)
    raise TubeletError(
        f"{where}: architecture '{architecture}' is not known here",
        "Known are standard, gated, topk, abstopk and jumprelu (SAELens saves batchtopk as jumprelu)",
    )


def _weights(config: SAEConfig, described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    t = {name: tensor.float() for name, tensor in tensors.items()}
    gated = isinstance(config, GatedConfig)
    weights = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["b_gate" if gated else "b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    if gated:
        weights |= {"sparsifier.r_mag": t["r_mag"], "sparsifier.b_mag": t["b_mag"]}
    if isinstance(config, JumpReLUConfig):
        # Nothing below 0 is ever kept, so a threshold of 0 or less is one just above it.
        weights["sparsifier.log_threshold"] = t["threshold"].clamp_min(torch.finfo(torch.float32).tiny).log()
    if described.get("rescale_acts_by_decoder_norm"):
        norm_F = t["W_dec"].norm(dim=1)
        weights["W_enc"] = weights["W_enc"] * norm_F[:, None]
        weights["b_enc"] = weights["b_enc"] * norm_F
        weights["W_dec"] = weights["W_dec"] / norm_F[:, None]
    if not described.get("apply_b_dec_to_input", True):
        before = weights["b_enc"]
        weights["b_enc"] = without_input_bias(weights["W_enc"], before, weights["b_dec"])
        if gated:
            shift = (weights["b_enc"] - before) * weights["sparsifier.r_mag"].exp()
            weights["sparsifier.b_mag"] = weights["sparsifier.b_mag"] + shift
    return weights


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise TubeletError(
                f"No SAELens SAE in {folder}: {name} is missing", f"A folder with {CONFIG} and {WEIGHTS}"
            )
    try:
        described = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise TubeletError(f"The SAE in {folder} cannot be read: {error}", "Copy both files again") from error
    missing = [name for name in ("d_in", "d_sae") if not isinstance(described.get(name), int)]
    if missing:
        raise TubeletError(f"{folder / CONFIG} lacks {' and '.join(missing)}", "Copy the file again")
    return described, tensors
