"""Information scope: when the view shifts, does a latent follow the content, or stay with the frame?

    strongest clips of latent j ─▶ maps M1, M2 of |z_j| on what both views show, each in its own coordinates there
    CDS_j = mean of EMD(N(M1), N(M2)) / D,    N: to sum 1,    D: the largest distance in the overlap

Contextual dependency score after Ro, Choi & Kim 2026 (arXiv 2604.05724), from a summary of the paper. Low: the
latent fires on a content wherever it is in the frame (local). High: it depends on what else is in view (global).
[RECON] Settings and conventions that the summary leaves open:
- the k strongest clips (pairs of views), by the largest |z_j| on the overlap in either view;
- in space the maps are of one latent step, the one where |z_j| is largest; D is the diagonal of the overlap;
- in time the map is the profile of |z_j| over the steps of the overlap, its mean over patches, and D the number of
  steps less one. A backbone that sees one frame at a time has CDS 0 in time, exactly;
- a pair in which the latent fires in one view only has vanished: counted, and left out of the mean or taken as 1;
- null: M1 of one strong clip against M2 of the next one of another video, maps that have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import ot
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.inputs.shifted_pairs import Axis, ShiftedPairs
from tubelet_store.reader import Store


@dataclass(frozen=True, eq=False)
class Scope:
    """CDS of F latents along one axis.

    Attributes:
        axis: In space or in time.
        cds_F: float64, 0 ... 1; NaN where no pair of maps could be compared.
        null_F: float64 The same of maps from different videos; NaN where there are fewer than two.
        pairs_F: int64 Strongest pairs in which the latent fires.
        vanished_F: int64 Those of them in which it fires in one view only.
    """

    axis: Axis
    cds_F: NDArray[np.float64]
    null_F: NDArray[np.float64]
    pairs_F: NDArray[np.int64]
    vanished_F: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A cut between two groups of values.

    Attributes:
        threshold: Halfway between the largest of the low group and the smallest of the high one.
        separation: Share of the variance between the groups, 0 ... 1.
    """

    threshold: float
    separation: float


def measure_scope(
    store: Store,
    hook: str,
    sae: SparseCoder,
    pairs: ShiftedPairs,
    *,
    clips: int,
    vanished: Literal["left_out", "one"],
    device: torch.device,
    progress: Callable[[], None] = lambda: None,
) -> Scope:
    """CDS of every latent of `sae` over `pairs` of `store`.

    Reads the pairs twice: once to find each latent's strongest ones, once for the maps on these. Memory: those maps
    where they are not 0, and one pair's codes.

    Args:
        store: With shifted views.
        hook: Where the SAE reads.
        sae: On `device`.
        pairs: Of `store`.
        clips: Strongest pairs per latent, k.
        vanished: What a pair counts in which the latent fires in one view only.
        device: Where to encode.
        progress: Called after each pair that was read.
    """
    strongest = _Strongest(clips, sae.latents)
    for number in range(len(pairs.pairs)):
        still_TSF, moved_TSF = _sizes(store, hook, sae, pairs, number, device)
        strongest.add(number, torch.maximum(still_TSF.amax(1), moved_TSF.amax(1)))
        progress()
    maps = _Maps(pairs.axis)
    for number, latents, ranks, steps in strongest.by_pair():
        still_TSF, moved_TSF = _sizes(store, hook, sae, pairs, number, device)
        maps.add(pairs.pairs[number].video, latents, ranks, steps, still_TSF, moved_TSF)
        progress()
    return maps.scope(sae.latents, pairs, one_if_vanished=vanished == "one")


def _sizes(
    store: Store, hook: str, sae: SparseCoder, pairs: ShiftedPairs, number: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """|codes| [T', S', F] of both overlaps of pair `number`."""
    pair = pairs.pairs[number]
    views = pairs.overlap(read_clip(store, hook, pair.still).to(device), read_clip(store, hook, pair.moved).to(device))
    with torch.no_grad():
        still, moved = (sae.encode(x_TSD.flatten(0, 1)).abs().view(*x_TSD.shape[:2], -1) for x_TSD in views)
    return still, moved


class _Strongest:
    """The k pairs on which each latent is largest, and the step of the largest value in each; ties go to the first."""

    def __init__(self, clips: int, latents: int) -> None:
        self._value_KF = np.zeros((clips, latents), dtype=np.float32)
        self._pair_KF = np.full((clips, latents), -1, dtype=np.int64)
        self._step_KF = np.zeros((clips, latents), dtype=np.int64)

    def add(self, number: int, largest_TF: Tensor) -> None:
        value_F, step_F = (part.cpu().numpy() for part in largest_TF.max(0))
        latents = np.arange(len(value_F))
        weakest_F = self._value_KF.argmin(0)
        better = np.flatnonzero(value_F > self._value_KF[weakest_F, latents])
        places = weakest_F[better], better
        self._value_KF[places], self._pair_KF[places], self._step_KF[places] = value_F[better], number, step_F[better]

    def by_pair(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Of each pair that is among the strongest of a latent: its number, these latents, their ranks and steps."""
        ranks, latents = np.nonzero(self._pair_KF >= 0)
        numbers = self._pair_KF[ranks, latents]
        order = np.argsort(numbers, kind="stable")
        ranks, latents, numbers = ranks[order], latents[order], numbers[order]
        for number in np.unique(numbers):
            span = slice(*np.searchsorted(numbers, [number, number + 1]))
            yield int(number), latents[span], ranks[span], self._step_KF[ranks[span], latents[span]]


class _Maps:
    """The maps of each latent's strongest pairs, in both views: places and values where they are not 0."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._of_latent: dict[int, list[tuple[int, str, _Sparse, _Sparse]]] = {}

    def add(
        self,
        video: str,
        latents: NDArray[np.int64],
        ranks: NDArray[np.int64],
        steps: NDArray[np.int64],
        still_TSF: Tensor,
        moved_TSF: Tensor,
    ) -> None:
        chosen = torch.from_numpy(latents).to(still_TSF.device)
        if self._axis == "temporal":
            still, moved = (z_TSF[..., chosen].mean(1).T for z_TSF in (still_TSF, moved_TSF))
        else:
            at = torch.from_numpy(steps).to(still_TSF.device)
            still, moved = (z_TSF[at, :, chosen] for z_TSF in (still_TSF, moved_TSF))
        for latent, rank, one, other in zip(
            latents.tolist(), ranks.tolist(), still.cpu().numpy(), moved.cpu().numpy(), strict=True
        ):
            self._of_latent.setdefault(latent, []).append((rank, video, _sparse(one), _sparse(other)))

    def scope(self, latents: int, pairs: ShiftedPairs, *, one_if_vanished: bool) -> Scope:
        places = pairs.grid.time if self._axis == "temporal" else pairs.grid.space
        cds_F, null_F = np.full(latents, np.nan), np.full(latents, np.nan)
        pairs_F, vanished_F = np.zeros(latents, dtype=np.int64), np.zeros(latents, dtype=np.int64)
        for latent, maps in self._of_latent.items():
            strongest = sorted(maps, key=lambda item: item[0])
            both = [(one, other) for _, _, one, other in strongest if one and other]
            pairs_F[latent], vanished_F[latent] = len(maps), len(maps) - len(both)
            still_MP, moved_MP = (_dense([pair[view] for pair in both], places) for view in (0, 1))
            distances = self._distances(still_MP, moved_MP, pairs) / pairs.largest
            if one_if_vanished:
                distances = np.concatenate([distances, np.ones(vanished_F[latent])])
            if len(distances):
                cds_F[latent] = distances.mean()
            partner = next_of_another_video([video for _, video, one, other in strongest if one and other])
            if len(partner):
                null = self._distances(still_MP, moved_MP[partner], pairs)
                null_F[latent] = null.mean() / pairs.largest
        return Scope(self._axis, cds_F, null_F, pairs_F, vanished_F)

    def _distances(
        self, still_MP: NDArray[np.float64], moved_MP: NDArray[np.float64], pairs: ShiftedPairs
    ) -> NDArray[np.float64]:
        if self._axis == "temporal":
            return line_distance(still_MP, moved_MP)
        both = zip(still_MP, moved_MP, strict=True)
        return np.array([plane_distance(one_P, other_P, pairs.grid.width) for one_P, other_P in both])


def next_of_another_video(videos: Sequence[str]) -> NDArray[np.int64]:
    """int64 [M] For each of M pairs the next one, in a circle, that shows another video; empty if all show one."""
    count = len(videos)
    if len(set(videos)) < 2:
        return np.empty(0, dtype=np.int64)
    steps = (range(at + 1, at + count) for at in range(count))
    return np.array(
        [next(to % count for to in ahead if videos[to % count] != videos[at]) for at, ahead in enumerate(steps)]
    )


_Sparse = tuple[NDArray[np.intp], NDArray[np.float32]] | None
"""Places and values of a map where it is not 0; None: it is 0 throughout."""


def _sparse(map_P: NDArray[np.float32]) -> _Sparse:
    places = np.flatnonzero(map_P)
    return (places, map_P[places]) if len(places) else None


def _dense(maps: list[_Sparse], places: int) -> NDArray[np.float64]:
    """float64 [M, P], each row of sum 1."""
    dense_MP = np.zeros((len(maps), places))
    for row_P, sparse in zip(dense_MP, maps, strict=True):
        if sparse is not None:
            row_P[sparse[0]] = sparse[1]
            row_P /= row_P.sum()
    return dense_MP


def otsu(values: NDArray[np.float64]) -> Split | None:
    """The cut of finite `values` that leaves the least variance within its two sides (Otsu 1979), over every possible
    cut, not the edges of a histogram; None where the values do not vary.
    """
    ordered = np.sort(values)
    ordered = ordered[np.isfinite(ordered)]
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return None
    low = np.arange(1, len(ordered))
    high = len(ordered) - low
    sums = np.cumsum(ordered)
    gap = sums[:-1] / low - (sums[-1] - sums[:-1]) / high
    between = low * high * gap**2 / len(ordered) ** 2
    # Equal values are in one group.
    between[ordered[:-1] == ordered[1:]] = -1
    cut = int(between.argmax())
    return Split(float(ordered[cut] + ordered[cut + 1]) / 2, float(between[cut] / ordered.var()))


def plane_distance(from_P: NDArray[np.float64], to_P: NDArray[np.float64], width: int) -> float:
    """Distance in patches (Euclidean) between two maps over a grid of P = height x width places, row-major.

    Args:
        from_P: Map with values of 0 or more, of sum 1.
        to_P: The same.
        width: Of the grid.

    Returns:
        Mean way of a unit of mass; exactly 0 for equal maps.
    """
    excess_P = from_P - to_P
    give, take = np.flatnonzero(excess_P > 0), np.flatnonzero(excess_P < 0)
    if not len(give) or not len(take):
        return 0.0
    supply, demand = excess_P[give], -excess_P[take]
    rows_g, columns_g = np.divmod(give, width)
    rows_t, columns_t = np.divmod(take, width)
    cost = np.hypot(rows_g[:, None] - rows_t, columns_g[:, None] - columns_t)
    # Rounding leaves the two masses apart by an ulp or so; the solver wants them equal.
    mass = supply.sum()
    demand *= mass / demand.sum()
    if len(give) == 1 or len(take) == 1:
        return float((supply[:, None] * demand * cost).sum() / mass)
    return float(ot.emd2(supply, demand, cost))


def line_distance(from_NT: NDArray[np.float64], to_NT: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [N] Distances in steps between profiles over T steps, of sum 1 each: sum_t |F_t - G_t|."""
    return np.abs(np.cumsum(from_NT - to_NT, axis=1)[:, :-1]).sum(axis=1)
