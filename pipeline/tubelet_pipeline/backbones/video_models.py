"""Families of video models, which see the whole clip: VideoMAE, V-JEPA 2, TimeSformer, ViViT.

Each states where its blocks are and how its tokens are ordered; `VideoBackbone` does the rest.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.backbone import Captured, VideoBackbone
from tubelet_pipeline.backbones.pretrained import BackboneConfig, Checkpoint


class VideoMAE(VideoBackbone):
    """Tong et al. 2022 (arXiv 2203.12602).

    There is a final norm only if the checkpoint has `use_mean_pooling: false`; fine-tuned checkpoints normalize after
    pooling, in the classifier, so their tokens have none.
    """

    family: ClassVar[str] = "videomae"
    model_types: ClassVar[tuple[str, ...]] = ("videomae",)
    architecture: ClassVar[str] = "VideoMAEModel"
    final_norm: ClassVar[str | None] = "layernorm"
    attention: ClassVar[str | None] = "attention"
    # The module around this layer includes the residual connection.
    mlp: ClassVar[str | None] = "output.dense"


class VJEPA2(VideoBackbone):
    """Assran et al. 2025 (arXiv 2506.09985). Only the encoder is run, not the predictor."""

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


class TimeSformer(VideoBackbone):
    """Bertasius et al. 2021 (arXiv 2102.05095), with divided or joint attention.

    A block has two attentions, over time and over space, with outputs in different layouts, so there is no
    `blocks.I.attn` and no `blocks.I.mlp`.
    """

    family: ClassVar[str] = "timesformer"
    model_types: ClassVar[tuple[str, ...]] = ("timesformer",)
    architecture: ClassVar[str] = "TimesformerModel"
    final_norm: ClassVar[str | None] = "layernorm"

    def __init__(self, checkpoint: Checkpoint, config: BackboneConfig, frames: int | None = None) -> None:
        attention = checkpoint.fields.get("attention_type", "divided_space_time")
        if attention == "space_only":
            raise TubeletError(
                f"'{checkpoint.name}' attends over space only, with time in the batch dimension",
                "Use a checkpoint with divided or joint attention",
            )
        super().__init__(checkpoint, config, frames)

    @property
    def tubelet_frames(self) -> int:
        """A token spans one frame."""
        return 1

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """CLS, one for the clip."""
        return ("cls",)

    def arrange(self, hidden: torch.Tensor) -> Captured:
        """[B, 1 + S T, D], space-major: split off CLS, unflatten, transpose to time-major."""
        tokens = hidden[:, 1:].unflatten(1, (self.grid.space, self.grid.time)).transpose(1, 2)
        return Captured(tokens, hidden[:, None, :1])


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
