"""Families of image models, run frame by frame: CLIP, DINOv2 (with registers), DINOv3, SigLIP, SigLIP 2.

Each states where its blocks are and which special tokens come first; `ImageBackbone` does the rest.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tubelet_pipeline.backbones.backbone import ImageBackbone


class CLIP(ImageBackbone):
    """Radford et al. 2021 (arXiv 2103.00020). Its last norm is applied to the pooled CLS only: no `final_norm`."""

    family: ClassVar[str] = "clip"
    model_types: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model")
    architecture: ClassVar[str] = "CLIPVisionModel"
    attention: ClassVar[str | None] = "self_attn"
    mlp: ClassVar[str | None] = "mlp"
    unneeded: ClassVar[tuple[str, ...]] = ("post_layernorm.",)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """CLS."""
        return ("cls",)


class DINOv2(ImageBackbone):
    """Oquab et al. 2023 (arXiv 2304.07193). Position embeddings are interpolated to the processor's image size."""

    family: ClassVar[str] = "dinov2"
    model_types: ClassVar[tuple[str, ...]] = ("dinov2",)
    architecture: ClassVar[str] = "Dinov2Model"
    final_norm: ClassVar[str | None] = "layernorm"
    attention: ClassVar[str | None] = "layer_scale1"
    mlp: ClassVar[str | None] = "layer_scale2"
    unneeded: ClassVar[tuple[str, ...]] = ("embeddings.mask_token",)
    fixed_size: ClassVar[bool] = False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """CLS."""
        return ("cls",)


class DINOv2WithRegisters(DINOv2):
    """Darcet et al. 2023 (arXiv 2309.16588): CLS, registers, patches."""

    family: ClassVar[str] = "dinov2_with_registers"
    model_types: ClassVar[tuple[str, ...]] = ("dinov2_with_registers",)
    architecture: ClassVar[str] = "Dinov2WithRegistersModel"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """CLS and the registers."""
        return ("cls", *(f"register.{i}" for i in range(self.model_config.num_register_tokens)))


class DINOv3(DINOv2WithRegisters):
    """Siméoni et al. 2025 (arXiv 2508.10104), the ViT checkpoints. Blocks and tokens are as in DINOv2."""

    family: ClassVar[str] = "dinov3"
    model_types: ClassVar[tuple[str, ...]] = ("dinov3_vit",)
    architecture: ClassVar[str] = "DINOv3ViTModel"
    final_norm: ClassVar[str | None] = "norm"


class SigLIP(ImageBackbone):
    """Zhai et al. 2023 (arXiv 2303.15343); also SigLIP 2 checkpoints of one fixed size (model type `siglip`)."""

    family: ClassVar[str] = "siglip"
    model_types: ClassVar[tuple[str, ...]] = ("siglip", "siglip_vision_model")
    architecture: ClassVar[str] = "SiglipVisionModel"
    final_norm: ClassVar[str | None] = "post_layernorm"
    attention: ClassVar[str | None] = "self_attn"
    mlp: ClassVar[str | None] = "mlp"
    unneeded: ClassVar[tuple[str, ...]] = ("head.",)
    square: ClassVar[bool] = True


class SigLIP2(SigLIP):
    """Tschannen et al. 2025 (arXiv 2502.14786), the NaFlex checkpoints, which take flattened patches of any grid.

    Their processor chooses a grid per image, but a store has one grid, so `backbone.preprocessing` must be set.
    """

    family: ClassVar[str] = "siglip2"
    model_types: ClassVar[tuple[str, ...]] = ("siglip2", "siglip2_vision_model")
    architecture: ClassVar[str] = "Siglip2VisionModel"
    fixed_size: ClassVar[bool] = False

    def forward(self, pixels: torch.Tensor) -> object:
        """Frames as rows of patches, each patch as (row, column, color)."""
        frames = pixels.flatten(0, 1)
        height, width = self.patch_size
        rows, columns = self.grid.height, self.grid.width
        cut = frames[..., : rows * height, : columns * width]
        patches = cut.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))  # [N, 3, rows, h, columns, w]
        flat = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.model(
            pixel_values=flat,
            pixel_attention_mask=torch.ones(flat.shape[:2], dtype=torch.int64, device=flat.device),
            spatial_shapes=torch.tensor([[rows, columns]] * len(flat), device=flat.device),
        )
