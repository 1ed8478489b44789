"""A session with the backbone of a store: it runs on the videos again, for metrics inside the backbone.

checkpoint ─▶ backbone, readout     test side ─▶ clips to measure on, decoded     fit side ─▶ clips for probes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_lens.config import InBackboneConfig
from tubelet_lens.inputs.clip_selection import stratified_sample
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.metric import ClipSetting
from tubelet_lens.steering.clip_source import Clip, ClipSource
from tubelet_lens.steering.readout import (
    Readout,
    fit_probe,
    in_batches,
    last_tokens,
    match_class_names,
    own_classifier,
)
from tubelet_pipeline.backbones import Backbone, rewriting
from tubelet_pipeline.backbones.rewrite import Rewrite
from tubelet_pipeline.redecode import backbone_of
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sae_files import load_sae


@dataclass(frozen=True, eq=False)
class BackboneSession:
    """A backbone with its SAE, and the clips to run.

    Attributes:
        config: Its settings.
        backbone: On the evaluation's device.
        hook: Hook of the SAE.
        sae: The trained SAE.
        readout: Classes of a clip; None: the checkpoint has no classifier and no clip of the fit side has a label.
        test_source: Reads the test side's videos.
        clips: Clips to measure on.
        rows: int64 [N] Their rows on the test side.
        class_N: int64 [N] Their class in the readout; -1 if unknown.
        fit_source: Reads the fit side's videos; None: there is no fit side.
        fit_rows: int64 Rows of the fit side to fit on.
    """

    config: InBackboneConfig
    backbone: Backbone
    hook: str
    sae: SAE
    readout: Readout | None
    test_source: ClipSource
    clips: tuple[Clip, ...]
    rows: NDArray[np.int64]
    class_N: NDArray[np.int64]
    fit_source: ClipSource | None
    fit_rows: NDArray[np.int64]

    def batches(self) -> Iterator[Tensor]:
        """Pixels [B, T, 3, h, w] of the clips to measure on."""
        return in_batches(clip.pixels for clip in self.clips)

    def logits(self, rewrite: Rewrite | None = None) -> Tensor:
        """float32 [N, C] on the CPU: logits of the clips to measure on, with `rewrite` at the hook.

        Raises:
            ValueError: there is no readout.
        """
        if self.readout is None:
            raise ValueError("no readout")
        with nullcontext() if rewrite is None else rewriting(self.backbone, self.hook, rewrite):
            return torch.cat([self.readout.logits(batch).cpu() for batch in self.batches()])


def start_session(clips: ClipSetting, config: InBackboneConfig) -> BackboneSession:
    """Load the backbone and decode the clips to measure on.

    Raises:
        TubeletError: the checkpoint is not the backbone of the store, or a video cannot be read.
    """
    store, device = clips.test.store, clips.setting.device
    if store.plan.tokens is not None and store.plan.tokens.kind == "pooled":
        raise TubeletError(
            f"{store.url} is pooled: it holds averages of tokens, which the backbone itself does not produce",
            "Leave out `in_backbone`, or use a store of single tokens",
        )
    backbone = backbone_of(store, config.checkpoint, str(device))
    rows = stratified_sample(clips.test.labels, config.test_clips)
    test_source = ClipSource(store, backbone, config.root, config.decode)
    fit_source, fit_rows = None, np.empty(0, dtype=np.int64)
    if clips.fit is not None:
        fit_source = ClipSource(clips.fit.store, backbone, config.root, config.decode)
        fit_rows = stratified_sample(clips.fit.labels, config.fit_clips)
    readout: Readout | None = own_classifier(backbone)
    if readout is None:
        readout = _probe(clips, fit_source, config)
    return BackboneSession(
        config=config,
        backbone=backbone,
        hook=backbone.resolve_hook(clips.setting.hook),
        sae=load_sae(clips.trained.folder, str(device)),
        readout=readout,
        test_source=test_source,
        clips=tuple(test_source.clips([int(clip) for clip in clips.test.clips[rows]])),
        rows=rows,
        class_N=_classes(readout, clips.test, rows),
        fit_source=fit_source,
        fit_rows=fit_rows,
    )


def _probe(clips: ClipSetting, fit_source: ClipSource | None, config: InBackboneConfig) -> Readout | None:
    known = clips.labeled
    if known is None or fit_source is None or clips.fit is None:
        return None
    chosen = stratified_sample(known.fit_class, config.fit_clips)
    rows = known.fit_rows[chosen]
    tokens_ND = last_tokens(clips.fit.store, fit_source, [int(clip) for clip in clips.fit.clips[rows]])
    videos = [str(video) for video in clips.fit.videos[rows]]
    return fit_probe(fit_source.backbone, tokens_ND, known.fit_class[chosen], known.names, videos, clips.config.seed)


def _classes(readout: Readout | None, side: PooledSplit, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    names = [
        str(name if name is not None else label)
        for name, label in zip(side.label_names[rows], side.labels[rows], strict=True)
    ]
    known = {} if readout is None else match_class_names(names, readout.classes)
    return np.array([known.get(name, -1) for name in names], dtype=np.int64)
