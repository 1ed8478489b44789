"""Tiny checkpoints with random weights in transformers' format, for tests and as the start of the demo's backbones.

Every parameter is random, biases and norms included, so that tests notice a loader that loses one of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tubelet_pipeline.backbones.pretrained import quiet_transformers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def write_tiny_videomae(
    folder: Path,
    seed: int = 0,
    *,
    image_size: int = 64,
    patch_size: int = 8,
    frames: int = 16,
    hidden: int = 96,
    layers: int = 4,
    heads: int = 4,
    use_mean_pooling: bool = True,
) -> Path:
    """Write a VideoMAE encoder (grid frames/2 x side/patch x side/patch) into `folder` and return it."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=image_size,
        patch_size=patch_size,
        num_frames=frames,
        tubelet_size=2,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        use_mean_pooling=use_mean_pooling,
    )
    save_random(VideoMAEModel, config, folder, seed)
    write_processor(folder, "VideoMAEImageProcessor", shortest_edge=image_size, crop=image_size, resample=2)
    return folder


def write_tiny_dinov2(
    folder: Path,
    seed: int = 0,
    *,
    image_size: int = 64,
    patch_size: int = 8,
    hidden: int = 96,
    layers: int = 4,
    heads: int = 4,
) -> Path:
    """Write a DINOv2 encoder (CLS and side/patch x side/patch patches per frame) into `folder` and return it."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    save_random(Dinov2Model, config, folder, seed)
    write_processor(folder, "BitImageProcessor", shortest_edge=image_size, crop=image_size, resample=3)
    return folder


def save_random(architecture: Any, config: Any, folder: Path, seed: int) -> None:
    """Save `architecture(config)` with all parameters drawn from `seed`; torch's random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        with quiet_transformers():
            model.save_pretrained(folder)


def write_processor(folder: Path, kind: str, *, shortest_edge: int, crop: int, resample: int) -> None:
    """Write a preprocessor_config.json with ImageNet's mean and deviation."""
    fields = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": shortest_edge},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
