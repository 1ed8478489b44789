"""A tiny checkpoint with random weights of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.backbones.tiny import save_random, write_processor

WIDTH, LAYERS = 32, 3
COMMON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
IMAGE = COMMON | {"image_size": 32, "patch_size": 8}
WIDE = {"intermediate_size": 64}
TEXT = COMMON | WIDE | {"vocab_size": 99}

# Family: class and settings of the checkpoint, frames asked for, T', special tokens, final norm.
CASES: dict[str, tuple[str, dict[str, Any], int | None, int, int, bool]] = {
    "videomae": ("VideoMAEModel", IMAGE | WIDE | {"num_frames": 8, "use_mean_pooling": False}, None, 4, 0, True),
    "vjepa2": (
        "VJEPA2Model",
        # As many predictor blocks as encoder blocks: the encoder's must be found all the same. Rotary positions in
        # three directions need heads of 12 channels.
        {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "patch_size": 8, "crop_size": 32}
        | {"frames_per_clip": 8, "mlp_ratio": 2.0, "pred_hidden_size": 48, "pred_num_attention_heads": 4}
        | {"pred_num_hidden_layers": LAYERS, "pred_mlp_ratio": 2.0},
        6,
        3,
        0,
        True,
    ),
    "timesformer": ("TimesformerModel", IMAGE | WIDE | {"num_frames": 4}, None, 4, 1, True),
    "timesformer-joint": (
        "TimesformerModel",
        IMAGE | WIDE | {"num_frames": 4, "attention_type": "joint_space_time"},
        4,
        4,
        1,
        True,
    ),
    "vivit": (
        "VivitModel",
        COMMON | WIDE | {"image_size": 32, "num_frames": 8, "tubelet_size": [2, 8, 8]},
        None,
        4,
        1,
        True,
    ),
    "dinov2": ("Dinov2Model", IMAGE, 3, 3, 1, True),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGE | {"num_register_tokens": 4}, 3, 3, 5, True),
    "dinov3": ("DINOv3ViTModel", IMAGE | WIDE | {"num_register_tokens": 4}, 3, 3, 5, True),
    "clip": ("CLIPVisionModel", IMAGE | WIDE, 3, 3, 1, False),
    "clip-whole": ("CLIPModel", {"vision_config": IMAGE | WIDE, "text_config": TEXT}, 3, 3, 1, False),
    "siglip": ("SiglipVisionModel", IMAGE | WIDE, 3, 3, 0, True),
    "siglip-whole": ("SiglipModel", {"vision_config": IMAGE | WIDE, "text_config": TEXT}, 3, 3, 0, True),
    "siglip2": ("Siglip2VisionModel", COMMON | WIDE | {"patch_size": 8, "num_patches": 16}, 3, 3, 0, True),
}


def write_case(case: str, root: Path) -> Path:
    """Write the checkpoint `case` into a folder of `root`, and return it."""
    import transformers

    name, settings, *_ = CASES[case]
    return write_checkpoint(getattr(transformers, name), settings, root / case)


def write_checkpoint(architecture: Any, settings: dict[str, Any], folder: Path) -> Path:
    """Write a model of class `architecture` with random weights into `folder`, and return it."""
    save_random(architecture, architecture.config_class(**settings), folder, seed=3)
    write_processor(folder, "x", shortest_edge=32, crop=32, resample=2)
    return folder


def backbone_for(case: str, root: Path) -> Backbone:
    """The backbone `case`, written into a folder of `root`."""
    return load_backbone(BackboneConfig(id=str(write_case(case, root)), device="cpu"), CASES[case][2])


def pixels_for(backbone: Backbone, clips: int = 2) -> torch.Tensor:
    """Random pixels, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(clips, backbone.frames, 3, *backbone.preprocessing.size, generator=generator)
