"""The classification head of a fine-tuned checkpoint, on top of the backbone loaded from it.

    pixels ──Backbone.forward──▶ encoder output ──head of ...For(Video|Image)Classification──▶ logits [B, C]

The encoder runs as part of the backbone, so hooks and rewriting act on it; only the head comes from the other class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.backbone import Backbone
from tubelet_pipeline.backbones.pretrained import load_model

_ENDINGS = ("ForVideoClassification", "ForImageClassification")


class _PrecomputedEncoder(nn.Module):
    """Takes the encoder's place in the classifier, and returns the encoder output that was already computed."""

    output: object = None

    def forward(self, *_args: object, **_options: object) -> object:
        return self.output


class Classifier:
    """A classification head on a loaded backbone.

    Args:
        backbone: Loaded from a checkpoint for which `has_classifier` holds.

    Raises:
        TubeletError: the checkpoint has no supported classifier, or lacks weights of it.
    """

    def __init__(self, backbone: Backbone) -> None:
        import transformers

        architecture = _architecture(backbone)
        if architecture is None:
            raise TubeletError(
                f"'{backbone.checkpoint.name}' has no classifier", "Use a fine-tuned checkpoint, or read a linear probe"
            )
        prefix = getattr(transformers, architecture).base_model_prefix
        # The encoder's weights were checked when the backbone was loaded.
        replaced = (f"{prefix}.", "vision_model.")
        self._model: Any = load_model(
            backbone.checkpoint, architecture, backbone.dtype, backbone.device, replaced + backbone.unneeded
        )
        self._backbone = backbone
        self._encoder = _PrecomputedEncoder()
        setattr(self._model, _encoder_name(self._model, backbone), self._encoder)
        names = self._model.config.id2label
        self.classes: tuple[str, ...] = tuple(str(names[i]) for i in range(self._model.config.num_labels))
        """Names of the classes, in the order of the logits."""

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 [B, C] from pixels [B, T, 3, h, w]; for an image model the mean of the frames' logits.

        [RECON] The mean over frames: the papers classify single images.
        """
        pixels = pixels.to(device=self._backbone.device, dtype=self._backbone.dtype)
        with torch.no_grad():
            self._encoder.output = self._backbone.forward(pixels)
            try:
                logits: torch.Tensor = self._model(None).logits.float()
            finally:
                self._encoder.output = None
        return logits.unflatten(0, (len(pixels), -1)).mean(1)


def has_classifier(backbone: Backbone) -> bool:
    """Whether the checkpoint of `backbone` declares a classification head."""
    return _architecture(backbone) is not None


def _architecture(backbone: Backbone) -> str | None:
    import transformers

    named = backbone.checkpoint.fields.get("architectures") or []
    known = (name for name in named if name.endswith(_ENDINGS) and hasattr(transformers, name))
    return next(known, None)


def _encoder_name(model: nn.Module, backbone: Backbone) -> str:
    """Attribute of `model` that holds the encoder."""
    names = [name for name, child in model.named_children() if type(child) is type(backbone.model)]
    if len(names) != 1:
        raise TubeletError(
            f"{type(model).__name__} does not contain exactly one {type(backbone.model).__name__}",
            "This version of transformers structures the model differently; install a supported one",
        )
    return names[0]
