"""Accuracy against the number of latents set to 0, in the order of a ranking, against matched random sets.

    importance I_jc = |w_cj| E[z_j | c]  ─▶ ranking ─▶ sets: top m, bottom m, m at random with the same mean activation
    measure(set) = accuracy with the set's latents at 0  ─▶ Ablation: curves over m, area, m_50

What "at 0" means is the caller's: in the code that a probe reads (`code_ablation`), or in the running backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.results.section import Line

Measure = Callable[[NDArray[np.int64]], float]
"""Accuracy with these latents at 0."""

# A random latent is drawn among this many whose mean activation is nearest to that of the latent it replaces.
_NEAREST = 8


def matched_set(
    targets: NDArray[np.int64],
    mean_F: NDArray[np.float64],
    alive_F: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """As many alive latents as `targets`, none of them among these, drawn to have the same mean activations.

    Each target in turn, in random order, is replaced by one of the 8 unused latents of nearest log mean activation.
    [RECON] The paper does not define the matching.

    Args:
        targets: At most half of the alive latents.
        mean_F: Mean size of each latent's activation.
        alive_F: bool, those with a mean above 0.
        rng: Draws the order and the latents.
    """
    free = np.setdiff1d(np.flatnonzero(alive_F), targets)
    log_free = np.log(mean_F[free])
    order = np.argsort(log_free, kind="stable")
    free, log_free = free[order], log_free[order]
    chosen = []
    for target in rng.permutation(targets):
        at = int(np.searchsorted(log_free, np.log(mean_F[target])))
        # The nearest are around the sorted position of the target itself.
        low, high = max(0, at - _NEAREST), min(len(free), at + _NEAREST)
        distance = np.abs(log_free[low:high] - np.log(mean_F[target]))
        near = np.argsort(distance, kind="stable")[:_NEAREST]
        pick = low + int(rng.choice(near))
        chosen.append(free[pick])
        free, log_free = np.delete(free, pick), np.delete(log_free, pick)
    return np.asarray(chosen, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Ablation:
    """Accuracies after latents were set to 0.

    Attributes:
        sizes: m = 1, 2, 4, ...
        top: [sizes] With the m most important at 0.
        bottom: [sizes] With the m least important at 0.
        random: [draws, sizes] With m matched random ones at 0.
        before: With nothing at 0.
        chance: What guessing would score.
        m_50: Smallest m whose loss of accuracy is half of `before - chance`; None: no m up to the largest size.
        mismatch: Mean activation of the random latents over that of the top ones, at the largest size.
    """

    sizes: tuple[int, ...]
    top: NDArray[np.float64]
    bottom: NDArray[np.float64]
    random: NDArray[np.float64]
    before: float
    chance: float
    m_50: int | None
    mismatch: float | None

    def area(self, accuracies: NDArray[np.float64]) -> float | None:
        """Mean over the sizes of the share of (before - chance) that is lost; None where `before` is at chance."""
        if self.before <= self.chance:
            return None
        return float(np.mean(self.before - accuracies) / (self.before - self.chance))

    @property
    def random_areas(self) -> list[float]:
        """The area of every random draw; empty where accuracy is at chance already."""
        return [lost for draw in self.random if (lost := self.area(draw)) is not None]


def accuracy_lines(whole: Ablation) -> tuple[Line, ...]:
    """Accuracy against the number of latents taken away: the most important, matched random ones, the least."""
    return (
        Line(label="most important", y=tuple(map(float, whole.top))),
        Line(
            label="matched random",
            subject="random",
            y=tuple(map(float, whole.random.mean(axis=0))),
            low=tuple(map(float, whole.random.min(axis=0))),
            high=tuple(map(float, whole.random.max(axis=0))),
        ),
        Line(label="least important", subject="permuted", y=tuple(map(float, whole.bottom))),
    )


def set_sizes(alive: int, largest: int) -> tuple[int, ...]:
    """m = 1, 2, 4, ... up to `largest` and to half of the `alive` latents, so that as many are left to draw from."""
    most = min(largest, alive // 2)
    return tuple(2**power for power in range(most.bit_length()) if most)


def ablate(
    measure: Measure,
    ranking: NDArray[np.int64],
    mean_F: NDArray[np.float64],
    *,
    sizes: Sequence[int],
    draws: int,
    chance: float,
    rng: np.random.Generator,
) -> Ablation:
    """Take latents away in the order of `ranking` and in reverse, and `draws` matched random sets of each size.

    Args:
        measure: Accuracy with a set of latents at 0, on data that took no part in the ranking.
        ranking: Alive latents, the most important first.
        mean_F: Mean size of each latent's activation, for the matching.
        sizes: Ascending, see `set_sizes`.
        draws: Random sets per size.
        chance: Accuracy of guessing.
        rng: Draws the sets.
    """
    alive_F = np.zeros(len(mean_F), dtype=bool)
    alive_F[ranking] = mean_F[ranking] > 0
    before = measure(np.empty(0, dtype=np.int64))
    top = np.array([measure(ranking[:size]) for size in sizes])
    bottom = np.array([measure(ranking[len(ranking) - size :]) for size in sizes])
    random, mismatch = np.empty((draws, len(sizes))), None
    for column, size in enumerate(sizes):
        targets = ranking[:size][alive_F[ranking[:size]]]
        sets = [matched_set(targets, mean_F, alive_F, rng) for _ in range(draws)]
        random[:, column] = [measure(chosen) for chosen in sets]
        wanted = float(mean_F[targets].mean()) if len(targets) else 0.0
        mismatch = float(np.mean([mean_F[chosen].mean() for chosen in sets])) / wanted if wanted and sets else None
    half = before - (before - chance) / 2
    half_at = m_50(lambda size: measure(ranking[:size]) <= half, sizes, top <= half) if before > chance else None
    return Ablation(tuple(sizes), top, bottom, random, before, chance, half_at, mismatch)


def m_50(lost: Callable[[int], bool], sizes: Sequence[int], lost_at: NDArray[np.bool_]) -> int | None:
    """Smallest number of latents that costs half: the first of `sizes` at which it is lost, refined by bisection.

    Between the last size that keeps more than half and the first that does not, losing is taken to be monotone.
    """
    if not lost_at.any():
        return None
    place = int(np.argmax(lost_at))
    low, high = (0 if place == 0 else sizes[place - 1]), sizes[place]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) else (middle, high)
    return high


def gini(effects: NDArray[np.float64]) -> float | None:
    """Gini coefficient of sizes >= 0: 0 if all are equal, toward 1 if one has all; None if they sum to 0."""
    ordered = np.sort(effects)
    total = ordered.sum()
    if not total > 0:
        return None
    count = len(ordered)
    return float((2 * np.arange(1, count + 1) - count - 1) @ ordered / (count * total))
