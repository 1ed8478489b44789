"""Decoding videos again as a store's plan recorded it: the same backbone, frames, crop and pixels, on any videos.

    store ─▶ backbone_of ─▶ Backbone, whose weights have the recorded digest
    plan ─▶ FrameRedecoder ─▶ the decode request of each video, and its pixels

Used to run the backbone on, or to show, the frames of stored activations.
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
from tubelet_store.reader import Store

BACKBONE_FOLDER = "backbone_folder"
"""Entry of a store's provenance: absolute path of a backbone given as a local folder."""


def sampling_of(plan: Plan) -> DenseSampling | UniformSampling:
    """The plan's frame sampling.

    Raises:
        TubeletError: this version does not support the rule.
    """
    recorded = {name: value for name, value in plan.sampling.items() if name != "views"}
    return _parsed(Sampling, recorded, "sampling")


def views_of(plan: Plan) -> CenterView | ThreeCrops | ShiftedViews:
    """The plan's views of each video.

    Raises:
        TubeletError: this version does not support the rule.
    """
    recorded: Any = plan.sampling.get("views")
    return CenterView() if recorded is None else _parsed(Views, recorded, "views")


def backbone_of(store: Store, checkpoint: str | None = None, device: str = "auto") -> Backbone:
    """The backbone that made `store`, loaded and compared by the digest of its weights; never compiled.

    Args:
        store: It records the backbone's id, revision, digest and, if it was a local folder, that folder.
        checkpoint: Hub id or folder. None: a shipped backbone of the recorded name, the recorded folder, or the
            recorded hub id, in this order.
        device: As in `BackboneConfig`.

    Raises:
        TubeletError: the store records no checkpoint, the folder has moved, it cannot be loaded, or its weights differ.
    """
    recorded = store.plan.backbone
    if "weights_digest" not in recorded:
        raise TubeletError(
            f"The store's backbone ({recorded.get('id')}) has no digest of its weights",
            "Use a store that `tubelet extract` made",
        )
    name = str(recorded["id"])
    source = checkpoint or _recorded_source(store, name)
    config = BackboneConfig.model_validate(
        {
            "id": source,
            "revision": recorded.get("revision") if source == name else None,
            "precision": recorded["precision"],
            "device": device,
            "preprocessing": Preprocessing.model_validate(store.plan.preprocessing),
        }
    )
    try:
        backbone = load_backbone(config, frames=sampling_of(store.plan).frames)
    except TubeletError as error:
        if checkpoint is not None:
            raise
        raise TubeletError(
            f"The backbone '{name}' of the store cannot be loaded: {error.problem}",
            "Give its folder or hub id as checkpoint",
        ) from error
    if backbone.weights_digest != recorded["weights_digest"]:
        raise TubeletError(
            f"The weights of '{backbone.checkpoint.name}' differ from those of the backbone '{name}' that made the "
            "store",
            "Give the checkpoint that the store was extracted with",
        )
    return backbone


def _recorded_source(store: Store, name: str) -> str:
    """Where the backbone `name` of `store` should be, by what the store records."""
    folder = store.state.provenance.get(BACKBONE_FOLDER)
    if folder is not None and Path(str(folder)).is_dir():
        return str(folder)
    if name in NAMES and not Path(name).is_dir():
        return str(demo_backbone(name))
    if folder is not None:
        raise TubeletError(
            f"The backbone '{name}' of the store was in the folder {folder}, which no longer exists",
            "Give its present folder as checkpoint",
        )
    return name


class FrameRedecoder:
    """Decodes and preprocesses videos again as a plan recorded it.

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
        crop_place = place(self.views, locate(self.views, view), self.backbone.patch_size)
        return self.backbone.preprocess(clip.frames, crop_place)


def _parsed(union: Any, recorded: dict[str, Any], what: str) -> Any:
    """The model of `union` that a record describes; further entries of a record are formulas."""
    models: tuple[type[BaseModel], ...] = get_args(get_args(union)[0])
    kinds = {model.model_fields["kind"].default: model for model in models}
    try:
        model = kinds[recorded["kind"]]
        return TypeAdapter(model).validate_python(
            {name: recorded[name] for name in model.model_fields if name in recorded}
        )
    except (KeyError, ValidationError) as error:
        raise TubeletError(
            f"This version of Tubelet does not support the store's {what}: {recorded.get('kind')!r}",
            "Use the version of Tubelet that made the store",
        ) from error
