"""Interface of metrics: over tokens, or over pooled clips.

    metric = Reconstruction(setting)
    for window in windows(...): metric.add(window)
    metric.section(), metric.latents()

One file per metric, with a table of its figures (`figure_table`). To add one, write the file, add it to
`evaluate.METRICS` and its name to `config.Topic`; its options go into `config`, which must not import torch. What is
fitted on clips (a probe, a map) is a `ClipMetric`, in `evaluate.CLIP_METRICS`:

    fit side  ─▶ probes and maps are fitted here; what they choose among is chosen on a part of it, by video
    test side ─▶ every figure is measured here
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.codes.sparse_codes import Encoder, SparseCoder
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.inputs.clip_selection import Parts, partition
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.inputs.labeled_clips import Labeled, labeled_clips
from tubelet_lens.inputs.latent_time import LatentTime
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.inputs.trained_sae import TrainedSae
from tubelet_lens.results.latent_table import LatentColumn, LatentEffect
from tubelet_lens.results.section import Section, Subject
from tubelet_store.reader import Store


@dataclass(frozen=True, eq=False)
class Setting:
    """Input of a metric over tokens before the first window."""

    store: Store
    hook: str
    clips: NDArray[np.int64]
    """Clips that will be streamed, ascending."""
    latents: int
    time: LatentTime
    lags: int
    """Largest distance in latent steps."""
    null_draws: int
    """Draws of the shuffled-time null."""
    seed: int
    device: torch.device

    @property
    def channels(self) -> int:
        """Width D of the raw activations."""
        return self.store.plan.hook(self.hook).channels

    @property
    def tokens(self) -> int:
        """Tokens in all clips together."""
        return len(self.clips) * self.store.plan.grid.tokens


class Metric(Protocol):
    """A statistic of (SAE, store), accumulated in float64."""

    def add(self, window: Window) -> None:
        """Add the clips of one window."""

    def section(self) -> Section:
        """The figures over everything added."""

    def latents(self) -> tuple[LatentColumn, ...]:
        """The same by latent; empty if the metric is not per latent."""


@dataclass(frozen=True, eq=False)
class ClipSetting:
    """Input of a metric over clips."""

    setting: Setting
    config: EvaluateConfig
    sae: SparseCoder
    trained: TrainedSae
    fit: PooledSplit | None
    """None: no clips to fit on; then metrics that fit something are not measured."""
    test: PooledSplit
    encoders: Mapping[Subject, Sequence[Encoder]] = field(default_factory=dict)
    """What made the codes in the draws of both sides, in the order of these."""

    @cached_property
    def labeled(self) -> Labeled | None:
        """Clips of known class on both sides; None where no classes can be fitted or tested.

        Raises:
            TubeletError: the two sides give one label two names.
        """
        return labeled_clips(self.fit, self.test)

    @cached_property
    def parts(self) -> Parts | None:
        """The fit side's clips, shared out by video for what is chosen and for what is ranked."""
        if self.fit is None:
            return None
        config = self.config
        return partition(
            list(self.fit.videos), validation=config.fit_validation, ranking=config.fit_ranking, seed=config.seed
        )


@dataclass(frozen=True, eq=False)
class ClipResult:
    """Result of a metric over clips."""

    section: Section
    latents: tuple[LatentColumn, ...] = ()
    effects: tuple[LatentEffect, ...] = ()
    """What edits of single latents do."""


class ClipMetric(Protocol):
    """A statistic of pooled clips."""

    def __call__(self, clips: ClipSetting, /) -> ClipResult | None:
        """The figures; None where the store lacks what the metric needs (labels, captions, ...)."""
