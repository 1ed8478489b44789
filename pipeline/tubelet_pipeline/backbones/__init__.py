"""Frozen vision backbones of several families, with one interface and one layout of activations.

load_backbone(BackboneConfig(id=...)) ──▶ Backbone
    .preprocess(uint8 [T, H, W, 3])            ──▶ pixels [T, 3, h, w], crop box
    .activations(pixels [B, T, 3, h, w], hooks) ──▶ {hook: Captured [B, T', S, D]}
with rewriting(backbone, hook, function):       ──▶ every pass continues with function(tokens)
"""

from tubelet_pipeline.backbones.backbone import Backbone, Captured
from tubelet_pipeline.backbones.pretrained import BackboneConfig
from tubelet_pipeline.backbones.registry import FAMILIES, load_backbone
from tubelet_pipeline.backbones.rewrite import rewriting

__all__ = ["FAMILIES", "Backbone", "BackboneConfig", "Captured", "load_backbone", "rewriting"]
