"""An evaluation as one self-contained HTML page: no script, no font, no link to other files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from tubelet.formats import styled
from tubelet_lens.report.page_templates import page_environment
from tubelet_lens.report.svg_plots import svg
from tubelet_lens.results.evaluation import FEWEST_VIDEOS, Evaluation
from tubelet_lens.results.section import Figure, Section

SUBJECTS = {
    "sae": "SAE",
    "raw": "Raw",
    "sae_shuffled": "SAE, time shuffled",
    "raw_shuffled": "Raw, time shuffled",
    "untrained": "Untrained SAE",
    "random_topk": "Random projection, TopK",
    "pca": "PCA",
    "permuted": "Clips permuted",
    "random": "Random control",
}
"""Columns of the tables, in order."""


def render_report(evaluation: Evaluation) -> str:
    """The page, as HTML."""
    environment = page_environment("tubelet_lens.report")
    environment.filters |= {"show": _show, "anchor": anchor, "range": range_of, "why": why_undefined, "count": count}
    return environment.get_template("report.html").render(
        evaluation=evaluation,
        headlines=[figure for figure in evaluation.figures() if figure.headline],
        topic={figure.name: section.title for section in evaluation.sections for figure in section.figures},
        comparisons={
            figure.name: comparisons(evaluation, figure) for figure in evaluation.figures() if figure.headline
        },
        tables={section.name: _table(section) for section in evaluation.sections},
        drawings={curve.name: svg(curve) for section in evaluation.sections for curve in section.curves},
        subjects=SUBJECTS,
        words={section.name: _definitions(section) for section in evaluation.sections},
        provenance=provenance(evaluation),
        settings={
            name: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
            for name, tree in (
                ("Store", evaluation.store),
                ("SAE and its training", evaluation.sae),
                ("Evaluation", evaluation.config),
                ("Software", evaluation.software),
            )
        },
    )


def _show(figure: Figure) -> str:
    return styled(figure.value, figure.style)


def range_of(figure: Figure) -> str:
    """The lower and upper end of the value, if it has them."""
    if figure.low is None or figure.high is None:
        return ""
    low, high = (styled(end, figure.style) for end in (figure.low, figure.high))
    return f" ({low.removesuffix(' %')} … {high})"


def count(figure: Figure) -> str:
    """How many samples the figure is computed from, and whether they are too few."""
    few = ": too few to rely on" if "video" in figure.n_of and figure.n < FEWEST_VIDEOS else ""
    return f"{figure.n:,} {figure.n_of}{few}"


def why_undefined(figure: Figure) -> str:
    """The clause of the definition about when the figure is undefined, if it is."""
    clause = _UNDEFINED.search(figure.definition) if figure.value is None else None
    return f" ({clause[0].strip()})" if clause else ""


def anchor(name: str) -> str:
    """Id of the definition of the figure or curve `name`."""
    return "def-" + name.replace(".", "-")


def _table(section: Section) -> dict[str, Any]:
    """Rows (by title) and columns (by subject) of a section's figures."""
    rows: dict[str, dict[str, Figure]] = {}
    for figure in section.figures:
        rows.setdefault(figure.title, {})[figure.subject] = figure
    columns = [subject for subject in SUBJECTS if any(subject in row for row in rows.values())]
    # Rows about the SAE alone would leave the other columns empty: they get their own table.
    wide = {title: row for title, row in rows.items() if len(row) > 1}
    narrow = {title: row["sae"] for title, row in rows.items() if len(row) == 1 and "sae" in row}
    return {"columns": columns, "wide": wide, "narrow": narrow}


def comparisons(evaluation: Evaluation, headline: Figure) -> list[Figure]:
    """The same figure of other subjects, which a headline must be compared with."""
    others = [
        figure
        for section in evaluation.sections
        if headline in section.figures
        for figure in section.figures
        if figure.title == headline.title and figure.name != headline.name
    ]
    return sorted(others, key=lambda figure: list(SUBJECTS).index(figure.subject))


@dataclass(frozen=True)
class _Definition:
    """What figures of one title mean: the shared sentences once, then those of each figure."""

    title: str
    shared: str
    own: tuple[tuple[Figure, str], ...]


def _definitions(section: Section) -> list[_Definition]:
    """One for each title."""
    by_title: dict[str, list[Figure]] = {}
    for figure in section.figures:
        by_title.setdefault(figure.title, []).append(figure)
    definitions = []
    for title, figures in by_title.items():
        sentences = [_SENTENCE.split(figure.definition) for figure in figures]
        common = [text for text in sentences[0] if all(text in other for other in sentences)]
        own = tuple(
            (figure, " ".join(text for text in texts if text not in common))
            for figure, texts in zip(figures, sentences, strict=True)
        )
        definitions.append(_Definition(title, " ".join(common), own))
    return definitions


_UNDEFINED = re.compile(r"[^.;]*\b[Uu]ndefined\b[^.;]*")

_SENTENCE = re.compile(r"(?<=[.;]) (?=[A-Z0-9|])")


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what, words) rows; everything else is among the settings."""
    store: dict[str, Any] = evaluation.store
    sae: dict[str, Any] = evaluation.sae
    recipe, trained, grid = sae["recipe"], sae["provenance"], store["grid"]
    backbone, sampling = store["backbone"], store["sampling"]
    cover = evaluation.coverage
    k = f", k = {recipe['k']}" if "k" in recipe else ""
    metrics = trained.get("metrics") or {}
    rows = [
        (
            "Videos",
            f"{_named(store['dataset'])}: {cover.clips:,} clips of {cover.videos:,} videos in store {store['name']}",
        ),
        ("Frames", _sampling(sampling)),
        (
            "Backbone",
            f"{backbone.get('id', 'unknown')} ({backbone.get('architecture', backbone.get('family', 'unknown'))}), "
            f"read at {store['hook']}: {store['channels']:,} channels, {grid['time']} steps of {grid['height']} x "
            f"{grid['width']} patches, kept as {store['dtype']}",
        ),
        (
            "SAE",
            f"{recipe.get('kind', 'unknown')} with {sae['latents']:,} latents{k}, nesting {recipe['nesting']['kind']}, "
            f"from the run in {sae['run']}",
        ),
        (
            "Trained on",
            f"{trained.get('tokens', 0):,} tokens of store {trained.get('store', 'unknown')} "
            f"({_named(trained.get('dataset', {}))}), seed {recipe['seed']}",
        ),
    ]
    if "dead" in metrics and "tokens" in metrics:
        rows.append(
            (
                "End of training",
                f"FVU {metrics['fvu']:.3g} and {metrics['dead']:.1%} dead latents over {metrics['tokens']:,} held-out "
                f"tokens. The {cover.tokens:,} tokens evaluated here are others: a latent that was silent there "
                "may fire here.",
            )
        )
    if fit := evaluation.config.get("fit_store"):
        rows.append(("Probes fitted on", f"store {str(fit).rstrip('/').rsplit('/', 1)[-1]}"))
    elif evaluation.config.get("split") == "held_out":
        rows.append(("Probes fitted on", "the videos of the same store that the SAE was trained on"))
    versions = ("tubelet", "torch", "numpy", "python")
    rows.append(
        (
            "Software",
            ", ".join(f"{name} {evaluation.software[name]}" for name in versions if name in evaluation.software),
        )
    )
    return rows


def _named(dataset: dict[str, Any]) -> str:
    words = [str(dataset[name]) for name in ("name", "kind", "split") if dataset.get(name)]
    return ", ".join(words) if words else "unknown data set"


def _sampling(sampling: dict[str, Any]) -> str:
    frames, stride = sampling.get("frames"), sampling.get("stride")
    every = "" if not stride else ", consecutive" if stride == 1 else f", stride {stride}"
    return f"{frames} frames per clip ({sampling.get('kind', 'unknown')}{every})"
