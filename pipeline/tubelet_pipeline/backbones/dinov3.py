"""DINOv3: an image model with rotary positions; CLS, registers, patches."""

from __future__ import annotations

from typing import ClassVar

from tubelet_pipeline.backbones.dinov2 import DINOv2WithRegisters


class DINOv3(DINOv2WithRegisters):
    """Siméoni et al. 2025 (arXiv 2508.10104), the ViT checkpoints. Blocks and tokens are arranged as in DINOv2."""

    family: ClassVar[str] = "dinov3"
    model_types: ClassVar[tuple[str, ...]] = ("dinov3_vit",)
    architecture: ClassVar[str] = "DINOv3ViTModel"
    final_norm: ClassVar[str | None] = "norm"
