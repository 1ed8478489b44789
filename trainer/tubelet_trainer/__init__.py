"""Training sparse autoencoders on an activation store: loader, SAEs, losses, training runs.

    sae = tubelet_trainer.load_sae("runs/a")
    values, indices = sae.encode_sparse(tokens)    # raw tokens [N, D] -> k active latents each

Names are imported when first used: the command line reads configurations without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tubelet_trainer.config import TrainConfig
    from tubelet_trainer.data.holdout import held_out
    from tubelet_trainer.data.loader import ActivationLoader
    from tubelet_trainer.data.source import Source
    from tubelet_trainer.run.loop import train
    from tubelet_trainer.sae.model import SAE
    from tubelet_trainer.sae.sae_files import load_record, load_sae

__all__ = ["SAE", "ActivationLoader", "Source", "TrainConfig", "held_out", "load_record", "load_sae", "train"]

_HOMES = {
    "SAE": "sae.model",
    "Source": "data.source",
    "TrainConfig": "config",
    "ActivationLoader": "data.loader",
    "held_out": "data.holdout",
    "load_record": "sae.sae_files",
    "load_sae": "sae.sae_files",
    "train": "run.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"tubelet_trainer.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tubelet_trainer' has no attribute '{name}'")
