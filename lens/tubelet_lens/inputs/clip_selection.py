"""Which clips are evaluated: those that hold activations, of one side of the trainer's split, up to a limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_store.reader import Store
from tubelet_trainer.config import HoldoutConfig
from tubelet_trainer.data.holdout import held_out


def choose_clips(
    store: Store, split: Literal["held_out", "train", "all"], holdout: HoldoutConfig, limit: int | None
) -> NDArray[np.int64]:
    """Numbers of the clips to evaluate, ascending.

    Args:
        store: The store.
        split: Side of the split, by video.
        holdout: The trainer's split.
        limit: Most clips, see `some_of`.

    Raises:
        TubeletError: no clip is left.
    """
    table = store.clips()
    out = np.zeros(store.plan.clips, dtype=bool)
    out[table["clip"].to_numpy()] = held_out(table["video_id"].to_pylist(), holdout)
    wanted = {"held_out": out, "train": ~out, "all": np.ones_like(out)}[split]
    clips = np.flatnonzero(store.ok() & wanted)
    if not len(clips):
        raise TubeletError(
            f"{store.url}: no clip to evaluate: {int(wanted.sum())} are in split '{split}' (held-out share "
            f"{holdout.fraction}), none of those holds activations",
            "Choose another --split, or train with a larger holdout.fraction",
        )
    return some_of(clips, limit)


def some_of(numbers: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of `numbers`, drawn at random and in their order; the same ones each time.

    Neither the first ones nor evenly spaced ones are used: data sets list their classes in blocks or alternating.
    """
    if limit is None or limit >= len(numbers):
        return numbers
    return numbers[np.sort(np.random.default_rng(0).permutation(len(numbers))[:limit])]


def stratified_sample(class_N: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """int64, ascending: at most `most` places, first one of each class, then a second one, ...

    Evenly spaced ones would miss classes where these alternate.
    """
    _, number_N = np.unique(class_N, return_inverse=True)
    order = np.argsort(number_N, kind="stable")
    first_C = np.searchsorted(number_N[order], np.arange(number_N.max(initial=-1) + 1))
    rank_N = np.empty(len(class_N), dtype=np.int64)
    rank_N[order] = np.arange(len(class_N)) - first_C[number_N[order]]
    return np.sort(np.argsort(rank_N, kind="stable")[:most])


@dataclass(frozen=True, eq=False)
class Parts:
    """bool [N] each; every clip is in exactly one."""

    train: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    ranking: NDArray[np.bool_]


def partition(videos: Sequence[str], *, validation: float, ranking: float, seed: int) -> Parts:
    """Share out clips by their videos, at random.

    Args:
        videos: [N] Video of each clip.
        validation: Share of the videos, rounded; at least one of them where there are three or more.
        ranking: The same.
        seed: Draws the videos; depends on their ids, not on the order of the clips.
    """
    names, inverse = np.unique(np.asarray(videos, dtype=object).astype(str), return_inverse=True)
    least = 1 if len(names) >= 3 else 0
    first, second = (max(least, round(share * len(names))) for share in (validation, ranking))
    place = np.empty(len(names), dtype=np.int64)
    place[np.random.default_rng(seed).permutation(len(names))] = np.arange(len(names))
    place_N = place[inverse]
    in_validation = place_N < first
    in_ranking = (place_N >= first) & (place_N < first + second)
    return Parts(~in_validation & ~in_ranking, in_validation, in_ranking)
