"""A store's plan carried out again, on its own videos or on others: same backbone, frames, crop and pixels.

    plan ─▶ backbone_of ─▶ Backbone, whose weights have the plan's digest
    plan ─▶ Replay ─▶ of each video what to decode, and its pixels

Needed wherever the running backbone, or a picture of what it saw, stands beside stored activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.decode.decoded_clip import DecodedClip
from tubelet_pipeline.decode.pool import DecodeRequest
from tubelet_pipeline.demo_backbones import NAMES, demo_backbone
from tubelet_pipeline.preprocess import CropBox, Preprocessing
from tubelet_pipeline.sampling import DenseSampling, Sampling, UniformSampling
from tubelet_pipeline.views import CenterView, ShiftedViews, ThreeCrops, Views, clip_request, locate, place
from tubelet_store.plan import Plan


def sampling_of(plan: Plan) -> DenseSampling | UniformSampling:
    """Which frames the plan took.

    Raises:
        TubeletError: a rule that is not known here.
    """
    said = {name: value for name, value in plan.sampling.items() if name != "views"}
    return _parsed(Sampling, said, "sampling")


def views_of(plan: Plan) -> CenterView | ThreeCrops | ShiftedViews:
    """Which views of each video the plan took.

    Raises:
        TubeletError: a rule that is not known here.
    """
    said: Any = plan.sampling.get("views")
    return CenterView() if said is None else _parsed(Views, said, "views")


def backbone_of(plan: Plan, checkpoint: str | None = None, device: str = "auto") -> Backbone:
    """The backbone that made a store, loaded and compared by the digest of its weights; never compiled.

    Args:
        plan: The store's.
        checkpoint: Hub id or folder; None: the plan's id, or the demo backbone of that name.
        device: As in `BackboneConfig`.

    Raises:
        TubeletError: the plan names no checkpoint, it cannot be loaded, or it has other weights.
    """
    said = plan.backbone
    if "weights_digest" not in said:
        raise TubeletError(
            f"The store's backbone ({said.get('id')}) has no digest of its weights",
            "Use a store that `tubelet extract` made",
        )
    named = str(said["id"])
    source = checkpoint or (str(demo_backbone(named)) if named in NAMES and not Path(named).is_dir() else named)
    config = BackboneConfig.model_validate(
        {
            "id": source,
            "revision": said.get("revision") if source == named else None,
            "precision": said["precision"],
            "device": device,
            "preprocessing": Preprocessing.model_validate(plan.preprocessing),
        }
    )
    try:
        backbone = load_backbone(config, frames=sampling_of(plan).frames)
    except TubeletError as error:
        if checkpoint is not None:
            raise
        raise TubeletError(
            f"The backbone '{named}' of the store cannot be loaded: {error.problem}",
            "Give its folder or hub id with --checkpoint",
        ) from error
    if backbone.weights_digest != said["weights_digest"]:
        raise TubeletError(
            f"'{backbone.checkpoint.name}' has other weights than the backbone '{named}' that made the store",
            "Give the checkpoint that the store was extracted with",
        )
    return backbone


class FrameRedecoder:
    """What a plan does with a video.

    Args:
        plan: The store's.
        backbone: See `backbone_of`.
    """

    def __init__(self, plan: Plan, backbone: Backbone) -> None:
        self.backbone = backbone
        self.sampling = sampling_of(plan)
        self.views = views_of(plan)

    def request(self, uri: str, view: int) -> DecodeRequest:
        """What to decode for row `view` of the video at `uri` (a path or URL)."""
        return clip_request(uri, self.sampling, self.views, locate(self.views, view), self.backbone.tubelet_frames)

    def pixels(self, clip: DecodedClip, view: int) -> tuple[torch.Tensor, CropBox]:
        """float32 [T, 3, h, w], and the box of the source frame that they show."""
        at = place(self.views, locate(self.views, view), self.backbone.patch_size)
        return self.backbone.preprocess(clip.frames, at)


def _parsed(union: Any, said: dict[str, Any], what: str) -> Any:
    """The member of `union` that a record describes; what a record says beyond its fields are formulas."""
    members: tuple[type[BaseModel], ...] = get_args(get_args(union)[0])
    kinds = {model.model_fields["kind"].default: model for model in members}
    try:
        model = kinds[said["kind"]]
        return TypeAdapter(model).validate_python({name: said[name] for name in model.model_fields if name in said})
    except (KeyError, ValidationError) as error:
        raise TubeletError(
            f"The store's {what} is not known here: {said.get('kind')!r}",
            "Use the version of Tubelet that made the store",
        ) from error
