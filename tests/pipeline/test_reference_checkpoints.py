"""The table of published checkpoints, from which the documentation's pages are generated."""

from __future__ import annotations

import pytest
import yaml

from tubelet_pipeline.backbones import FAMILIES
from tubelet_pipeline.backbones.backbone import ImageBackbone, VideoBackbone
from tubelet_pipeline.backbones.reference import REFERENCE_CHECKPOINTS, ReferenceCheckpoint
from tubelet_pipeline.extract_config import ExtractConfig

REFERENCES = pytest.mark.parametrize("reference", REFERENCE_CHECKPOINTS.values(), ids=REFERENCE_CHECKPOINTS.keys())


def test_every_family_has_a_reference_checkpoint() -> None:
    assert REFERENCE_CHECKPOINTS.keys() == FAMILIES.keys()


@REFERENCES
def test_its_configuration_is_valid(reference: ReferenceCheckpoint) -> None:
    config = ExtractConfig.model_validate(yaml.safe_load(reference.extract_yaml()))
    assert config.backbone.id == reference.checkpoint
    assert config.sampling.frames == reference.frames
    if config.backbone.preprocessing is not None:
        assert config.backbone.preprocessing.size == (reference.image, reference.image)


@REFERENCES
def test_its_entries_agree_with_the_family(reference: ReferenceCheckpoint) -> None:
    family = FAMILIES[reference.family]
    assert reference.block_parts == (family.attention is not None) == (family.mlp is not None)
    assert reference.final_norm == (family.final_norm is not None)
    assert issubclass(family, VideoBackbone if reference.tubelet_frames > 1 else (ImageBackbone, VideoBackbone))
    blocks = [int(hook.removeprefix("blocks.")) for hook in reference.hooks]
    assert blocks == sorted(blocks)
    assert blocks[-1] < reference.layers
    assert reference.frames % reference.tubelet_frames == reference.image % reference.patch == 0
