"""One published checkpoint per family, with the extraction settings that suit it.

The documentation's page per family and its ready configuration are generated from this table. Sizes are those of the
published config.json; they are not used to load a model, which reads its own file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """A published checkpoint and an extraction with it."""

    family: str
    """A key of `registry.FAMILIES`."""
    title: str
    """Name of the family in running text."""
    paper: str
    """Authors, year and arXiv number."""
    checkpoint: str
    """Hub id."""
    layers: int
    """Transformer blocks."""
    width: int
    """Channels of the activations."""
    image: int
    """Side of the square input, in pixels."""
    patch: int
    """Side of a patch, in pixels."""
    frames: int
    """Frames per clip."""
    tubelet_frames: int
    """Frames that one token spans; 1 for image models."""
    sampling: dict[str, Any]
    """The `sampling` section without `frames`."""
    hooks: tuple[str, ...]
    """A middle block and a late one: where motion and classes are usually read."""
    special_tokens: int = 0
    """Tokens before the grid (CLS, registers), stored next to it."""
    final_norm: bool = True
    """Whether there is a hook `final_norm`."""
    block_parts: bool = True
    """Whether there are hooks `blocks.I.attn` and `blocks.I.mlp`."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """The `backbone.preprocessing` section, where the checkpoint's processor file does not fix one size."""
    note: str = ""
    """What a user must know before the first run."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Time steps, rows and columns of the token grid."""
        return self.frames // self.tubelet_frames, self.image // self.patch, self.image // self.patch

    def extract_yaml(self, root: str = "/data/kinetics400", store: str | None = None) -> str:
        """A complete configuration of `tubelet extract` for Kinetics-400 below `root`."""
        backbone: dict[str, Any] = {"id": self.checkpoint, "precision": "float16"}
        if self.preprocessing:
            backbone["preprocessing"] = self.preprocessing
        return yaml.safe_dump(
            {
                "dataset": {"kind": "kinetics", "root": root, "split": "val"},
                "sampling": {**self.sampling, "frames": self.frames},
                "backbone": backbone,
                "hooks": list(self.hooks),
                "store": store or f"stores/k400-val-{self.family.replace('_', '-')}.zarr",
                "batch_size": "auto",
            },
            sort_keys=False,
        )


REFERENCE_CHECKPOINTS: dict[str, ReferenceCheckpoint] = {
    reference.family: reference
    for reference in (
        ReferenceCheckpoint(
            family="videomae",
            title="VideoMAE",
            paper="Tong et al. 2022, arXiv 2203.12602",
            checkpoint="MCG-NJU/videomae-base",
            layers=12,
            width=768,
            image=224,
            patch=16,
            frames=16,
            tubelet_frames=2,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            note="Fine-tuned checkpoints normalize after pooling and have no hook `final_norm`.",
        ),
        ReferenceCheckpoint(
            family="vjepa2",
            title="V-JEPA 2",
            paper="Assran et al. 2025, arXiv 2506.09985",
            checkpoint="facebook/vjepa2-vitl-fpc64-256",
            layers=24,
            width=1024,
            image=256,
            patch=16,
            frames=64,
            tubelet_frames=2,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.12", "blocks.23"),
            note="Takes any even number of frames; fewer frames make a smaller store.",
        ),
        ReferenceCheckpoint(
            family="timesformer",
            title="TimeSformer",
            paper="Bertasius et al. 2021, arXiv 2102.05095",
            checkpoint="facebook/timesformer-base-finetuned-k400",
            layers=12,
            width=768,
            image=224,
            patch=16,
            frames=8,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 32},
            hooks=("blocks.6", "blocks.11"),
            special_tokens=1,
            block_parts=False,
        ),
        ReferenceCheckpoint(
            family="vivit",
            title="ViViT",
            paper="Arnab et al. 2021, arXiv 2103.15691",
            checkpoint="google/vivit-b-16x2-kinetics400",
            layers=12,
            width=768,
            image=224,
            patch=16,
            frames=32,
            tubelet_frames=2,
            sampling={"kind": "dense", "stride": 2},
            hooks=("blocks.6", "blocks.11"),
            special_tokens=1,
        ),
        ReferenceCheckpoint(
            family="dinov2",
            title="DINOv2",
            paper="Oquab et al. 2023, arXiv 2304.07193",
            checkpoint="facebook/dinov2-base",
            layers=12,
            width=768,
            image=224,
            patch=14,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            special_tokens=1,
        ),
        ReferenceCheckpoint(
            family="dinov2_with_registers",
            title="DINOv2 with registers",
            paper="Darcet et al. 2023, arXiv 2309.16588",
            checkpoint="facebook/dinov2-with-registers-base",
            layers=12,
            width=768,
            image=224,
            patch=14,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            special_tokens=5,
        ),
        ReferenceCheckpoint(
            family="dinov3",
            title="DINOv3",
            paper="Siméoni et al. 2025, arXiv 2508.10104",
            checkpoint="facebook/dinov3-vitb16-pretrain-lvd1689m",
            layers=12,
            width=768,
            image=224,
            patch=16,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            special_tokens=5,
            note="Gated: accept the terms on the model's page, then run `hf auth login`.",
        ),
        ReferenceCheckpoint(
            family="clip",
            title="CLIP",
            paper="Radford et al. 2021, arXiv 2103.00020",
            checkpoint="openai/clip-vit-large-patch14",
            layers=24,
            width=1024,
            image=224,
            patch=14,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.12", "blocks.22"),
            special_tokens=1,
            final_norm=False,
        ),
        ReferenceCheckpoint(
            family="siglip",
            title="SigLIP",
            paper="Zhai et al. 2023, arXiv 2303.15343",
            checkpoint="google/siglip-base-patch16-224",
            layers=12,
            width=768,
            image=224,
            patch=16,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            note="SigLIP 2 checkpoints of one fixed size belong to this family too.",
        ),
        ReferenceCheckpoint(
            family="siglip2",
            title="SigLIP 2 NaFlex",
            paper="Tschannen et al. 2025, arXiv 2502.14786",
            checkpoint="google/siglip2-base-patch16-naflex",
            layers=12,
            width=768,
            image=256,
            patch=16,
            frames=16,
            tubelet_frames=1,
            sampling={"kind": "dense", "stride": 4},
            hooks=("blocks.6", "blocks.11"),
            preprocessing={"resize_to": [256, 256], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
            note="Its processor chooses a grid per frame, but a store has one grid, so the size is set here.",
        ),
    )
}
"""By family, in the order of the documentation: video models first."""
