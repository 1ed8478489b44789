"""SigLIP and SigLIP 2: image models without special tokens."""

from __future__ import annotations

from typing import ClassVar

import torch

from tubelet_pipeline.backbones.base import ImageBackbone


class SigLIP(ImageBackbone):
    """Zhai et al. 2023 (arXiv 2303.15343); also the SigLIP 2 checkpoints of one fixed size, which say `siglip`."""

    family: ClassVar[str] = "siglip"
    model_types: ClassVar[tuple[str, ...]] = ("siglip", "siglip_vision_model")
    architecture: ClassVar[str] = "SiglipVisionModel"
    final_norm: ClassVar[str | None] = "post_layernorm"
    attention: ClassVar[str | None] = "self_attn"
    mlp: ClassVar[str | None] = "mlp"
    unneeded: ClassVar[tuple[str, ...]] = ("head.",)
    square: ClassVar[bool] = True


class SigLIP2(SigLIP):
    """Tschannen et al. 2025 (arXiv 2502.14786), the NaFlex checkpoints: patches of any grid, given flattened.

    Their processor chooses a grid per picture; a store has one grid, so `backbone.preprocessing` must be set.
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
