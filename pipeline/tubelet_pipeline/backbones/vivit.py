"""ViViT: CLS, then tubelets in time-major order."""

from __future__ import annotations

from typing import ClassVar

from tubelet_pipeline.backbones.base import VideoBackbone


class ViViT(VideoBackbone):
    """Arnab et al. 2021 (arXiv 2103.15691), model 1: joint attention over space and time."""

    family: ClassVar[str] = "vivit"
    model_types: ClassVar[tuple[str, ...]] = ("vivit",)
    architecture: ClassVar[str] = "VivitModel"
    final_norm: ClassVar[str | None] = "layernorm"
    attention: ClassVar[str | None] = "attention"
    mlp: ClassVar[str | None] = "mlp"
    # Checkpoints with a classifier have no pooler.
    unneeded: ClassVar[tuple[str, ...]] = ("pooler.",)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """CLS."""
        return ("cls",)

    @property
    def tubelet_frames(self) -> int:
        """Frames that one token spans."""
        return int(self.model_config.tubelet_size[0])

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a tubelet."""
        _, height, width = self.model_config.tubelet_size
        return int(height), int(width)
