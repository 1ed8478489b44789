"""Which backbone to run, and how."""

from __future__ import annotations

from typing import Literal

from tubelet.config import Config
from tubelet_pipeline.preprocess import Preprocessing


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
