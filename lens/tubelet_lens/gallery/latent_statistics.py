"""Figures of each latent, with their definitions: from the evaluation's table and from the survey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_lens.gallery.survey import SurveyResult

_NUMBER = "latent"
# Class numbers, which are not quantities; the pages show class names.
_CLASSES = ("top_label", "probe_label")


@dataclass(frozen=True, eq=False)
class Statistic:
    """One figure of every latent.

    Attributes:
        name: Column of the evaluation's table, or the gallery's own name.
        title: Name on the pages.
        definition: Formula and conventions, readable alone.
        values_F: float64 [F], NaN where undefined.
    """

    name: str
    title: str
    definition: str
    values_F: NDArray[np.float64]


def statistics(survey: SurveyResult, evaluated: pa.Table | None, url: str) -> tuple[Statistic, ...]:
    """Columns of the evaluation, if there is one, then those of the survey that it lacks.

    Args:
        survey: The survey.
        evaluated: `latents.parquet`.
        url: Its path, for errors.

    Raises:
        TubeletError: the table has another number of latents.
    """
    table = () if evaluated is None else _of_table(evaluated, len(survey.tokens_F), url)
    known = {each.name for each in table}
    return (*table, *(each for each in _of_survey(survey) if each.name not in known))


def pick(figures: Sequence[Statistic], name: str) -> Statistic:
    """The figure called `name`.

    Raises:
        TubeletError: there is none.
    """
    by_name = {figure.name: figure for figure in figures}
    if name not in by_name:
        raise TubeletError(f"There is no figure '{name}' of latents", f"Order by one of {', '.join(by_name)}")
    return by_name[name]


def _of_table(table: pa.Table, latents: int, url: str) -> tuple[Statistic, ...]:
    numbers = table[_NUMBER].to_pylist() if _NUMBER in table.column_names else None
    if numbers != list(range(latents)):
        raise TubeletError(
            f"{url} does not hold one row for each of the {latents} latents of this SAE",
            "Give the evaluation of this run, or run `tubelet evaluate` again",
        )
    figures = []
    for field in table.schema:
        number = pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
        if not number or field.name in (_NUMBER, *_CLASSES):
            continue
        about = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
        values = table[field.name].cast(pa.float64()).to_numpy()
        title = field.name.replace("_", " ").capitalize()
        figures.append(Statistic(field.name, title, about.get("definition", "No definition was stored."), values))
    return tuple(figures)


def _of_survey(survey: SurveyResult) -> tuple[Statistic, ...]:
    fired = survey.tokens_F > 0
    undefined = np.full(len(fired), np.nan)
    where = f"the {survey.tokens:,} tokens of the {survey.clips:,} clips in this gallery"
    mean = np.divide(survey.sum_F, survey.tokens_F, out=undefined.copy(), where=fired)
    figures = [
        Statistic(
            "frequency", "Frequency", f"Fraction of {where} on which the latent fires.", survey.tokens_F / survey.tokens
        ),
        Statistic(
            "mean_activation",
            "Mean activation",
            f"Mean size of the code over those of {where} on which the latent fires.",
            mean,
        ),
        Statistic(
            "max_activation",
            "Max activation",
            f"Size of the largest code over {where}.",
            np.abs(survey.top_peak_FK[:, 0]).astype(np.float64),
        ),
        Statistic(
            "clip_share",
            "Share of clips",
            f"Fraction of the {survey.clips:,} clips of this gallery in which the latent fires on at least one token.",
            survey.clips_F / survey.clips,
        ),
    ]
    if len(survey.clips_of_label_L) > 1:
        figures.append(
            Statistic(
                "label_focus",
                "Label focus",
                "Of the clips in which the latent fires, weighted so that every label counts the same, the share with "
                "the most frequent label. 1: it fires on one label only; 1 / number of labels: on all labels equally. "
                "A rare latent can be high by chance.",
                _focus(survey),
            )
        )
    return tuple(figures)


def _focus(survey: SurveyResult) -> NDArray[np.float64]:
    rate_FL = survey.clips_by_label_FL / np.maximum(survey.clips_of_label_L, 1)
    total_F = rate_FL.sum(1)
    return np.divide(rate_FL.max(1), total_F, out=np.full(len(total_F), np.nan), where=total_F > 0)
