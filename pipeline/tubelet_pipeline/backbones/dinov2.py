"""DINOv2: an image model, CLS first; with registers, these follow CLS."""

from __future__ import annotations

from typing import ClassVar

from tubelet_pipeline.backbones.base import ImageBackbone


class DINOv2(ImageBackbone):
    """Oquab et al. 2023 (arXiv 2304.07193). Interpolates its positions, so the picture's size is the processor's."""

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
