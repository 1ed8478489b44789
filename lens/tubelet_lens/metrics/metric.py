"""The shape of a metric: it sees every window once, then says what it found.

    metric = Reconstruction(setting)
    for window in windows(...): metric.add(window)
    metric.section(), metric.latents()

One file per metric. To add one, write the file and put its class into `evaluate.METRICS`, its name into
`config.Topic`. What is fitted on clips (a probe, a map) is a `clip_metric.ClipMetric` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.inputs.latent_time import LatentTime
from tubelet_lens.results.latent_table import LatentColumn
from tubelet_lens.results.section import Section
from tubelet_store.reader import Store


@dataclass(frozen=True, eq=False)
class Setting:
    """What a metric may know before the first window."""

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
        """Take in one window."""

    def section(self) -> Section:
        """The figures over everything added."""

    def latents(self) -> tuple[LatentColumn, ...]:
        """The same by latent; empty if the metric says nothing of single latents."""
