"""VideoMAE: tubelets of 2 frames, time-major, no special token; takes exactly `num_frames` frames."""

from __future__ import annotations

from typing import ClassVar

from tubelet_pipeline.backbones.base import VideoBackbone


class VideoMAE(VideoBackbone):
    """Tong et al. 2022 (arXiv 2203.12602).

    There is a final norm only where the checkpoint says `use_mean_pooling: false`; fine-tuned ones normalize after
    pooling, in the classifier, and their tokens never pass through it.
    """

    family: ClassVar[str] = "videomae"
    model_types: ClassVar[tuple[str, ...]] = ("videomae",)
    architecture: ClassVar[str] = "VideoMAEModel"
    final_norm: ClassVar[str | None] = "layernorm"
    attention: ClassVar[str | None] = "attention"
    # The module around this layer adds the residual already.
    mlp: ClassVar[str | None] = "output.dense"
