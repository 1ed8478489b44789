"""The shape of a metric over whole clips: it sees pooled vectors of two sides, fits on one, measures on the other.

    fit side  ─▶ probes and maps are fitted here; what they choose among is chosen on a part of it, by video
    test side ─▶ every figure is measured here

One file per metric. To add one, write the function and put it into `evaluate.CLIP_METRICS`, its name into
`config.Topic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.codes.encoder import Encoder, SparseCoder
from tubelet_lens.codes.pooled import Pooled, Pooling
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.inputs.partition import Parts, partition
from tubelet_lens.inputs.trained_sae import TrainedSae
from tubelet_lens.metrics.metric import Setting
from tubelet_lens.results.effect_table import LatentEffect
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Section, Subject
from tubelet_store.reader import Store


@dataclass(frozen=True, eq=False)
class PooledSplit:
    """N clips with what is known of them.

    Attributes:
        store: Where they lie.
        clips: int64 [N] Their numbers there.
        videos: object [N] Video ids.
        labels: int64 [N] Class, -1 where the store knows none.
        label_names: object [N] Its name, None where unknown.
        captions: object [N] Caption, None where unknown.
        draws: Vectors by subject ("sae", "raw" and the controls), one entry per draw of what is random.
    """

    store: Store
    clips: NDArray[np.int64]
    videos: NDArray[np.object_]
    labels: NDArray[np.int64]
    label_names: NDArray[np.object_]
    captions: NDArray[np.object_]
    draws: Mapping[Subject, tuple[Pooled, ...]]

    @property
    def pooled(self) -> dict[Subject, Pooled]:
        """Vectors by subject, the first draw of each."""
        return {subject: draws[0] for subject, draws in self.draws.items()}


def side(store: Store, pooling: Pooling) -> PooledSplit:
    """The clips that `pooling` has seen, all of `store`."""
    rows = store.clips().take(pooling.clips)
    labels = rows["label"].to_pylist()
    return PooledSplit(
        store=store,
        clips=pooling.clips,
        videos=np.asarray(rows["video_id"].to_pylist(), dtype=object),
        labels=np.asarray([-1 if label is None else label for label in labels], dtype=np.int64),
        label_names=np.asarray(rows["label_name"].to_pylist(), dtype=object),
        captions=np.asarray(rows["caption"].to_pylist(), dtype=object),
        draws=pooling.draws(),
    )


@dataclass(frozen=True, eq=False)
class ClipSetting:
    """What a metric over clips may know."""

    setting: Setting
    config: EvaluateConfig
    sae: SparseCoder
    trained: TrainedSae
    fit: PooledSplit | None
    """None: no clips to fit on; then a metric that must fit something has nothing to say."""
    test: PooledSplit
    encoders: Mapping[Subject, Sequence[Encoder]] = field(default_factory=dict)
    """What made the codes in the draws of both sides, in the order of these."""

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
    """What a metric over clips found."""

    section: Section
    latents: tuple[LatentColumn, ...] = ()
    effects: tuple[LatentEffect, ...] = ()
    """What edits of single latents do."""


class ClipMetric(Protocol):
    """A statistic of pooled vectors."""

    def __call__(self, clips: ClipSetting, /) -> ClipResult | None:
        """The figures; None where the store lacks what the metric needs (labels, captions, ...)."""
