"""TimeSformer: a token per patch and frame, CLS first, then *space*-major: all frames of a patch follow each other."""

from __future__ import annotations

from typing import ClassVar

import torch

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.base import Captured, VideoBackbone
from tubelet_pipeline.backbones.checkpoint import Checkpoint
from tubelet_pipeline.backbones.config import BackboneConfig


class TimeSformer(VideoBackbone):
    """Bertasius et al. 2021 (arXiv 2102.05095), with divided or joint attention.

    A block has two attentions, over time and over space, whose outputs are folded by patch and by frame: there is no
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
                f"'{checkpoint.name}' attends over space only, which folds time into the batch",
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
        """[B, 1 + S T, D], space-major: split, fold, and turn."""
        tokens = hidden[:, 1:].unflatten(1, (self.grid.space, self.grid.time)).transpose(1, 2)
        return Captured(tokens, hidden[:, None, :1])
