"""Text-video retrieval: can a linear map take pooled codes to the embeddings of their captions ?

    fit side ─ ridge map M (penalty chosen on validation videos) ─▶ test videos: M z against the captions' embeddings
    text ─▶ video: queries are the distinct captions, the gallery is all test videos       video ─▶ text: the reverse

[RECON] The paper does not describe its text side. Neither DINOv2 nor VideoMAE has a text tower: a map must be fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet_lens.inputs.captions import described, embed
from tubelet_lens.inputs.clip_selection import Parts
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_lens.metrics.clip_vectors import POOLING_WORDS, SUBJECT_WORDS, subjects, vectors
from tubelet_lens.metrics.metric import ClipResult, ClipSetting
from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.section import Figure, Section, Subject
from tubelet_lens.stats.linear_models import LEVEL, Ridge, fit_ridge, interval


@dataclass(frozen=True, eq=False)
class Ranks:
    """Rank of the best right item of each of Q queries, from 1.

    Attributes:
        optimistic: [Q] Ties count for the right item.
        pessimistic: [Q] Against it.
        chance_r1: Probability that an item drawn at random is right, mean over the queries.
    """

    optimistic: NDArray[np.int64]
    pessimistic: NDArray[np.int64]
    chance_r1: float

    @property
    def rank(self) -> NDArray[np.float64]:
        """[Q] Half-way between the two: 1 + #greater + #ties / 2."""
        return (self.optimistic + self.pessimistic) / 2

    def recall(self, top: int) -> NDArray[np.float64]:
        """[Q] Whether the rank is at most `top`."""
        return (self.rank <= top).astype(np.float64)


def ranks(scores_QG: NDArray[np.float64], right_QG: NDArray[np.bool_]) -> Ranks:
    """Ranks of the best right item in a gallery of G.

    Args:
        scores_QG: Higher is nearer.
        right_QG: At least one per query. Right items never count against each other.
    """
    best_Q1 = np.where(right_QG, scores_QG, -np.inf).max(axis=1, keepdims=True)
    wrong = ~right_QG
    greater = (wrong & (scores_QG > best_Q1)).sum(axis=1)
    equal = (wrong & (scores_QG == best_Q1)).sum(axis=1)
    return Ranks(1 + greater, 1 + greater + equal, float(right_QG.mean()))


FIGURES = FigureTable(
    "retrieval",
    FigureSpec(
        "recall",
        "{title}, R@{top}",
        "Share of {queried} whose right answer is among the nearest {top} of all {gallery}, by the cosine of the "
        "caption's embedding and the mapped {vector}{draws}. The map is ridge regression from vectors standardized by "
        "the fitted-on clips to embeddings less their mean there, with the penalty per clip (chosen: {penalties}) of "
        "best mean reciprocal rank on validation videos; views of a video are summed. Embeddings: {embeddings}. Rank = "
        f"1 + greater + ties / 2. Range: {LEVEL:.0%} bootstrap interval over {{queried}}.",
        n_of="{queried}",
        style="percent",
        better="high",
        headline=True,
        null="retrieval.{direction}_chance",
        interval=f"{LEVEL:.0%} bootstrap interval over queries",
        name="retrieval.{direction}_r{top}.{subject}",
    ),
    FigureSpec(
        "median_rank",
        "{title}, median rank",
        "Median rank of the best right answer among all {gallery}, over the {queried}; 1 is best.{draws} Rank = 1 + "
        "greater + ties / 2; a range, where one is given, counts ties for and against the right answer.",
        n_of="{queried}",
        better="low",
        interval="ties counted for and against the right answer",
        name="retrieval.{direction}_medr.{subject}",
    ),
    FigureSpec(
        "mean_rank",
        "{title}, mean rank",
        "Mean rank of the best right answer among all {gallery}, over the {queried}; 1 is best.{draws} Rank = 1 + "
        "greater + ties / 2; a range, where one is given, counts ties for and against the right answer.",
        n_of="{queried}",
        better="low",
        interval="ties counted for and against the right answer",
        name="retrieval.{direction}_meanr.{subject}",
    ),
    FigureSpec(
        "chance",
        "{title}, chance R@1",
        "Share of the {gallery} that are right, mean over the {queried}: R@1 of guessing.",
        n_of="{queried}",
        style="percent",
        name="retrieval.{direction}_chance",
    ),
)

_TOPS = (1, 5, 10)
_DIRECTIONS = {"text_to_video": "Text to video", "video_to_text": "Video to text"}

_TIE_DIGITS = 10


@dataclass(frozen=True, eq=False)
class _Gallery:
    """Clips with captions, grouped into videos.

    Attributes:
        rows: int64 Clips of the side.
        video: int64 Video of each of them, 0 ... V - 1.
        caption_V: int64 [V] Caption of each video, an index of `texts_CE`.
        texts_CE: float64 Embeddings of the captions that these videos have, less the fitted mean.
    """

    rows: NDArray[np.int64]
    video: NDArray[np.int64]
    caption_V: NDArray[np.int64]
    texts_CE: NDArray[np.float64]

    def ranks(self, predicted_NE: NDArray[np.float64]) -> dict[str, Ranks]:
        """Ranks in both directions, given the clips' predicted embeddings."""
        sums_VE = np.zeros((len(self.caption_V), predicted_NE.shape[1]))
        np.add.at(sums_VE, self.video, predicted_NE)
        cosine_CV = _unit(self.texts_CE) @ _unit(sums_VE).T
        # Equal vectors may get products that differ in their last bits; they are to tie.
        cosine_CV = cosine_CV.round(_TIE_DIGITS)
        right_CV = np.arange(len(cosine_CV))[:, None] == self.caption_V
        return {"text_to_video": ranks(cosine_CV, right_CV), "video_to_text": ranks(cosine_CV.T, right_CV.T)}


def _gallery(
    side: PooledSplit,
    rows: NDArray[np.int64],
    place: dict[str, int],
    texts: NDArray[np.float64],
    mean_E: NDArray[np.float64],
) -> _Gallery:
    _, first, video = np.unique(side.videos[rows].astype(str), return_index=True, return_inverse=True)
    used, caption_V = np.unique([place[caption] for caption in side.captions[rows][first]], return_inverse=True)
    return _Gallery(rows, video, caption_V, texts[used] - mean_E)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def retrieval(clips: ClipSetting) -> ClipResult | None:
    """Recall at 1, 5, 10, median and mean rank, both ways; None without captions on both sides.

    Raises:
        TubeletError: the captions cannot be embedded.
    """
    fit, test, parts, config = clips.fit, clips.test, clips.parts, clips.config.retrieval
    if fit is None or parts is None:
        return None
    fit_rows, test_rows = (np.flatnonzero([bool(text) for text in side.captions]) for side in (fit, test))
    known = sorted(set(fit.captions[fit_rows]))
    captions = sorted(set(known) | set(test.captions[test_rows]))
    if len(known) < 2 or len(set(test.captions[test_rows])) < 2:
        return None
    texts = embed(captions, known, config.text, clips.setting.device)
    place = {caption: row for row, caption in enumerate(captions)}
    fitting = _Fitting(clips, fit, fit_rows, place, texts, parts)
    by_subject = {subject: fitting.ranks(subject, test_rows) for subject in subjects(clips)}
    one = by_subject["sae"][0]
    figures = [
        _recall(clips, direction, top, subject, [draw[direction] for draw in draws], fitting)
        for direction in _DIRECTIONS
        for top in _TOPS
        for subject, draws in by_subject.items()
    ]
    figures += [
        figure
        for direction in _DIRECTIONS
        for subject, draws in by_subject.items()
        for figure in _rank_figures(direction, subject, [draw[direction] for draw in draws])
    ]
    queries = {direction: len(one[direction].optimistic) for direction in _DIRECTIONS}
    return ClipResult(
        Section(
            name="retrieval",
            title="Text-video retrieval",
            lead=f"Does a linear map find a video by its caption? Captions are embedded by {described(config.text)}; "
            f"{queries['text_to_video']:,} distinct captions query {queries['video_to_text']:,} test videos, and "
            "the other way round.",
            figures=(
                *figures,
                *(
                    FIGURES.fill("chance", one[direction].chance_r1, queries[direction], **_words(direction))
                    for direction in _DIRECTIONS
                ),
            ),
            notes=(
                "Every video whose caption is identical to the query is a right answer, and captions are "
                "queried once each: so chance is above 1 / gallery where captions repeat.",
                "A ratio to the raw activations means little where both are near chance.",
            ),
        )
    )


class _Fitting:
    def __init__(
        self,
        clips: ClipSetting,
        fit: PooledSplit,
        rows: NDArray[np.int64],
        place: dict[str, int],
        texts: NDArray[np.float64],
        parts: Parts,
    ) -> None:
        self._clips, self._fit, self._rows = clips, fit, rows
        self._place, self._texts = place, texts
        self._validation = parts.validation[rows]
        self.chosen: dict[Subject, tuple[float, ...]] = {}
        """Penalty of each draw."""

    def ranks(self, subject: Subject, test_rows: NDArray[np.int64]) -> list[dict[str, Ranks]]:
        """Of every draw, both directions."""
        targets_NE = self._texts[[self._place[text] for text in self._fit.captions[self._rows]]]
        ranks_of_draws, penalties = [], []
        for rows, test in vectors(self._clips, self._fit, subject, self._clips.config.retrieval.pooling):
            fit_rows = rows[self._rows]
            penalty = self._choose(fit_rows, targets_NE)
            ridge = fit_ridge(fit_rows, targets_NE, (penalty,))[penalty]
            gallery = _gallery(self._clips.test, test_rows, self._place, self._texts, ridge.mean_E)
            ranks_of_draws.append(gallery.ranks(ridge(test[test_rows])))
            penalties.append(penalty)
        self.chosen[subject] = tuple(penalties)
        return ranks_of_draws

    def _choose(self, rows_NF: NDArray[np.float32], targets_NE: NDArray[np.float64]) -> float:
        """The penalty with the largest mean reciprocal rank, text to video, on the validation videos."""
        penalties, held = self._clips.config.retrieval.penalties, self._validation
        if len(set(penalties)) == 1 or not held.any() or held.all():
            return max(penalties)
        maps = fit_ridge(rows_NF[~held], targets_NE[~held], sorted(penalties, reverse=True))

        def score(ridge: Ridge) -> float:
            gallery = _gallery(self._fit, self._rows[held], self._place, self._texts, ridge.mean_E)
            return float((1 / gallery.ranks(ridge(rows_NF[held]))["text_to_video"].rank).mean())

        return max(maps, key=lambda penalty: score(maps[penalty]))


def _recall(
    clips: ClipSetting, direction: str, top: int, subject: Subject, draws: list[Ranks], fitting: _Fitting
) -> Figure:
    config = clips.config.retrieval
    values_Q = np.mean([draw.recall(top) for draw in draws], axis=0)
    return FIGURES.fill(
        "recall",
        float(values_Q.mean()),
        len(values_Q),
        subject=subject,
        ends=interval(values_Q, draws=clips.config.action.bootstrap, seed=clips.config.seed),
        headline=direction == "text_to_video" and top == 1 and subject == "sae",
        top=top,
        vector=f"{POOLING_WORDS[config.pooling]} of {SUBJECT_WORDS[subject]}",
        draws=f" (mean of {len(draws)} draws)" if len(draws) > 1 else "",
        penalties=", ".join(f"{penalty:g}" for penalty in sorted(set(fitting.chosen[subject]))),
        embeddings=described(config.text),
        **_words(direction),
    )


def _rank_figures(direction: str, subject: Subject, draws: list[Ranks]) -> tuple[Figure, ...]:
    words: dict[str, Any] = {**_words(direction), "draws": f" Mean of {len(draws)} draws." if len(draws) > 1 else ""}
    figures = []
    for key, statistic in (("median_rank", np.median), ("mean_rank", np.mean)):
        value, low, high = (
            float(np.mean([statistic(of(draw)) for draw in draws]))
            for of in (lambda draw: draw.rank, lambda draw: draw.optimistic, lambda draw: draw.pessimistic)
        )
        ends = (low, high) if low < high else None
        figures.append(FIGURES.fill(key, value, len(draws[0].optimistic), subject=subject, ends=ends, **words))
    return tuple(figures)


def _words(direction: str) -> dict[str, Any]:
    queried, gallery = ("captions", "test videos") if direction == "text_to_video" else ("test videos", "captions")
    return {"direction": direction, "title": _DIRECTIONS[direction], "queried": queried, "gallery": gallery}
