"""How well the order mixes clips, compared with independent sampling.

Two figures of the clips in a batch: their number (coverage) and the entropy of their shares. Both follow from the order
alone; nothing is read. The reference is a batch of the same size whose clips are sampled independently and uniformly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Independent batches behind the reference: its entropy is then exact to about one part in a thousand.
_DRAWS = 16


class Ordered(Protocol):
    """A stream with a known order: `ActivationLoader`, `Mixture`."""

    @property
    def steps(self) -> int:
        """Batches of the run."""

    @property
    def strata(self) -> list[tuple[int, int]]:
        """Per store: tokens of a batch and the clips they are drawn from."""

    def clips_of(self, step: int) -> NDArray[np.int64]:
        """Clip of each token of a batch."""


@dataclass(frozen=True)
class Mixing:
    """Means over batches."""

    clips: float
    """Distinct clips per batch."""
    clips_iid: float
    """The same of independent draws."""
    entropy: float
    """Entropy of the clips of a batch, in nats."""
    entropy_iid: float
    """The same of independent draws."""

    def __str__(self) -> str:
        return (
            f"a batch mixes {self.clips:.0f} clips ({self.clips / self.clips_iid:.1%} of independent draws), "
            f"entropy {self.entropy:.2f} nats ({self.entropy / self.entropy_iid if self.entropy_iid else 1:.1%})"
        )


def measure_mixing(stream: Ordered, batches: int = 8) -> Mixing:
    """Mixing of the first `batches` full batches of `stream`."""
    counts = [_count(stream.clips_of(step)) for step in range(max(1, min(batches, stream.steps - 1)))]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        parts = [rng.integers(0, clips, tokens) + 2**40 * part for part, (tokens, clips) in enumerate(stream.strata)]
        drawn.append(_count(np.concatenate(parts)))
    (clips, entropy), (clips_iid, entropy_iid) = np.mean(counts, axis=0), np.mean(drawn, axis=0)
    return Mixing(float(clips), float(clips_iid), float(entropy), float(entropy_iid))


def _count(clips: NDArray[np.int64]) -> tuple[float, float]:
    shares = np.unique(clips, return_counts=True)[1] / len(clips)
    return float(len(shares)), float(-(shares * np.log(shares)).sum())
