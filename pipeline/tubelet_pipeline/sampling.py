"""Frame sampling as configuration: the rule and a video's length determine the frames, the same on every machine.

    DenseSampling    frames `stride` apart, as VideoMAE on Kinetics (16 x 4)
    UniformSampling  one frame from each of T equal parts, as TSN on SSv2

The formulas are in `tubelet_pipeline.frame_indices`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tubelet.config import Config


class DenseSampling(Config):
    """Consecutive frames at a fixed stride."""

    kind: Literal["dense"] = "dense"
    frames: int = Field(ge=1)
    """Frames per clip."""
    stride: int = Field(default=1, ge=1)
    """Distance between two sampled frames, in frames of the video."""
    clips: int = Field(default=1, ge=1)
    """Temporal views per video: one is centered, several are spread from the first frame to the last."""


class UniformSampling(Config):
    """One frame from each of equal parts of the whole video."""

    kind: Literal["uniform"] = "uniform"
    frames: int = Field(ge=1)
    """Frames per clip, and parts the video is divided into."""
    clips: int = Field(default=1, ge=1)
    """Temporal views per video: view v of V takes the frame at (v + 1/2) / V of each part."""


Sampling = Annotated[DenseSampling | UniformSampling, Field(discriminator="kind")]


_FORMULAS = {
    "dense": {
        "formula": "dense-v1",
        "index": "min(start + i * stride, n - 1)",
        "start": "clips == 1: max(0, n - frames * stride) // 2, else view * max(0, n - frames * stride) // (clips - 1)",
        "padded": "indices past the last frame, which repeat it",
    },
    "uniform": {
        "formula": "uniform-v1",
        "index": "(2 * clips * i + 2 * view + 1) * n // (2 * clips * frames)",
        "padded": "indices equal to their predecessor",
    },
}


def describe(sampling: DenseSampling | UniformSampling) -> dict[str, Any]:
    """What a store records: the fields of `sampling` and its formula (n = frames of the video)."""
    return {**sampling.model_dump(mode="json"), **_FORMULAS[sampling.kind]}
