"""CLIP's vision tower: an image model, CLS first."""

from __future__ import annotations

from typing import ClassVar

from tubelet_pipeline.backbones.base import ImageBackbone


class CLIP(ImageBackbone):
    """Radford et al. 2021 (arXiv 2103.00020). Its last norm sees the pooled CLS only, so there is no `final_norm`."""

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
