"""V-JEPA 2: tubelets of 2 frames with rotary positions, no special token, any even number of frames."""

from __future__ import annotations

from typing import ClassVar

import torch

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.base import VideoBackbone


class VJEPA2(VideoBackbone):
    """Assran et al. 2025 (arXiv 2506.09985). The encoder only; its predictor is not run."""

    family: ClassVar[str] = "vjepa2"
    model_types: ClassVar[tuple[str, ...]] = ("vjepa2",)
    architecture: ClassVar[str] = "VJEPA2Model"
    trunk: ClassVar[str] = "encoder"
    final_norm: ClassVar[str | None] = "encoder.layernorm"
    attention: ClassVar[str | None] = "attention"
    mlp: ClassVar[str | None] = "mlp"
    unneeded: ClassVar[tuple[str, ...]] = ("predictor.",)
    fixed_size: ClassVar[bool] = False

    @property
    def trained_frames(self) -> int:
        """Frames per clip that the checkpoint was made for."""
        return int(self.model_config.frames_per_clip)

    def _choose_frames(self, asked: int | None) -> int:
        if asked is None:
            return self.trained_frames
        if asked < self.tubelet_frames or asked % self.tubelet_frames:
            raise TubeletError(
                f"'{self.checkpoint.name}' takes a multiple of {self.tubelet_frames} frames per clip, not {asked}",
                f"Set sampling.frames: {max(1, asked // self.tubelet_frames) * self.tubelet_frames}",
            )
        return asked

    def forward(self, pixels: torch.Tensor) -> object:
        """One pass of the encoder."""
        return self.model(pixel_values_videos=pixels, skip_predictor=True)
