"""The families, and loading a backbone of one of them."""

from __future__ import annotations

from importlib.metadata import entry_points

from tubelet.errors import TubeletError, nearest
from tubelet_pipeline.backbones.backbone import Backbone
from tubelet_pipeline.backbones.image_models import CLIP, DINOv2, DINOv2WithRegisters, DINOv3, SigLIP, SigLIP2
from tubelet_pipeline.backbones.pretrained import BackboneConfig, find_checkpoint, require_transformers
from tubelet_pipeline.backbones.video_models import VJEPA2, TimeSformer, VideoMAE, ViViT

_CLASSES: tuple[type[Backbone], ...] = (
    VideoMAE,
    VJEPA2,
    TimeSformer,
    ViViT,
    DINOv2,
    DINOv2WithRegisters,
    DINOv3,
    CLIP,
    SigLIP,
    SigLIP2,
)


def _families() -> dict[str, type[Backbone]]:
    """Those above, and classes that other packages register under the entry-point group `tubelet.backbones`."""
    others = (entry.load() for entry in entry_points(group="tubelet.backbones"))
    return {cls.family: cls for cls in (*_CLASSES, *others)}


FAMILIES: dict[str, type[Backbone]] = _families()


def load_backbone(config: BackboneConfig, frames: int | None = None) -> Backbone:
    """Find, load and check the backbone that `config` names.

    Args:
        config: Which checkpoint, in which precision, on which device.
        frames: Frames per clip; None: the number the checkpoint was trained with (image models: 16).

    Raises:
        TubeletError: no such checkpoint, unknown family, weights missing, wrong number of frames, transformers too old.
    """
    require_transformers()
    if config.family is not None and config.family not in FAMILIES:
        raise TubeletError(f"Unknown backbone family '{config.family}'", nearest(config.family, FAMILIES))
    checkpoint = find_checkpoint(config.id, config.revision)
    by_type = {model_type: cls for cls in FAMILIES.values() for model_type in cls.model_types}
    cls = by_type.get(checkpoint.model_type)
    if cls is None:
        raise TubeletError(
            f"'{checkpoint.name}' has the model type '{checkpoint.model_type}', which no supported family has",
            f"Supported: {', '.join(sorted(FAMILIES))}",
        )
    if config.family is not None and config.family != cls.family:
        raise TubeletError(
            f"'{checkpoint.name}' belongs to the family '{cls.family}', not '{config.family}'",
            f"Set family: {cls.family}, or leave it out",
        )
    return cls(checkpoint, config, frames)
