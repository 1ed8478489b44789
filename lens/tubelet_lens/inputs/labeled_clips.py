"""Clips whose class is known, on both sides, and the videos that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_lens.inputs.pooled_clips import PooledSplit


@dataclass(frozen=True, eq=False)
class Labeled:
    """Classes are numbered 0 ... C - 1 in the order of their labels.

    Attributes:
        labels: int64 [C] The store's number of each class on the fit side.
        names: [C] What the store calls it, else its number.
        fit_rows: int64 Clips of the fit side with a label.
        fit_class: int64 Their classes.
        test_rows: int64 Clips of the test side with a label.
        video: int64 Video of each of them, 0 ... V - 1.
        video_class: int64 [V] Its class; -1: no clip of the fit side has it, so it cannot be predicted.
    """

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    fit_rows: NDArray[np.int64]
    fit_class: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    video: NDArray[np.int64]
    video_class: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """C."""
        return len(self.labels)

    def by_video(self, values_NC: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [V, C]: mean over the clips (views) of each video."""
        sums_VC = np.zeros((len(self.video_class), values_NC.shape[1]))
        np.add.at(sums_VC, self.video, values_NC)
        return sums_VC / np.bincount(self.video, minlength=len(sums_VC))[:, None]


def labeled_clips(fit: PooledSplit | None, test: PooledSplit) -> Labeled | None:
    """None where there is nothing to fit on, or fewer than two classes on the fit side, or no labels to test.

    Raises:
        TubeletError: the two sides give one label two names.
    """
    if fit is None:
        return None
    fit_rows, test_rows = np.flatnonzero(fit.labels >= 0), np.flatnonzero(test.labels >= 0)
    labels, fit_class = np.unique(fit.labels[fit_rows], return_inverse=True)
    if len(labels) < 2 or not len(test_rows):
        return None
    names, names_there = _names(fit), _names(test)
    for label in names.keys() & names_there.keys():
        if names[label] != names_there[label]:
            raise TubeletError(
                f"Label {label} is '{names[label]}' in {fit.store.url} and '{names_there[label]}' in {test.store.url}",
                "Give stores of one data set, or leave out what needs labels: --skip '[action, ablation]'",
            )
    place = np.searchsorted(labels, test.labels[test_rows])
    known = labels[np.minimum(place, len(labels) - 1)] == test.labels[test_rows]
    test_class = np.where(known, place, -1)
    # Numbers in order of first appearance would do as well; sorted ones do not depend on the order of clips.
    _, first, video = np.unique(test.videos[test_rows].astype(str), return_index=True, return_inverse=True)
    return Labeled(
        labels=labels,
        names=tuple(names.get(int(label), str(label)) for label in labels),
        fit_rows=fit_rows,
        fit_class=fit_class,
        test_rows=test_rows,
        video=video,
        video_class=test_class[first],
    )


def _names(side: PooledSplit) -> dict[int, str]:
    return {
        int(label): str(name)
        for label, name in zip(side.labels, side.label_names, strict=True)
        if label >= 0 and name is not None
    }
