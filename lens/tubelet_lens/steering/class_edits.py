"""Class edits: suppress the latent of a class, and measure which predictions change (Stevens et al., arXiv 2502.06755,
sections on semantic segmentation and classification).

    target change rate = #(predicted c before, another after) / #(predicted c before)
    other change rate  = #(another predicted before, changed after) / #(another predicted before)

Beside the class's latent: random alive latents, latents of the same mean activation, random directions with steps of
the same length. The latent is chosen on the fit side; labels of the test side are not used.

[RECON] Rates are given as mean over classes and pooled over classes (micro), because the published code pools while the
paper says mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.results.figure_table import FigureSpec, FigureTable
from tubelet_lens.results.section import Curve, Figure, Line, Section
from tubelet_lens.stats.ablation_curve import matched_set
from tubelet_lens.steering.edit_controls import RandomDirection
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.operations import Suppress
from tubelet_pipeline.backbones.rewrite import Rewrite
from tubelet_trainer.sae.model import SAE

Arm = Literal["class", "matched", "latent", "direction"]
ARMS: dict[Arm, str] = {
    "class": "the class's latent",
    "matched": "a latent of the same mean activation",
    "latent": "a random alive latent",
    "direction": "a random direction, steps of the same length",
}

Predict = Callable[[Rewrite | None], NDArray[np.int64]]
"""Class of each unit (clip, patch) with a rewrite at the SAE's hook; None: without one."""

_HEADLINE = 2.0
"""Strength in the demonstrations of saev (s = -2)."""


@dataclass(frozen=True, eq=False)
class Rates:
    """Counts per class [C] at one strength, summed over draws.

    Attributes:
        changed_C: Units predicted as the class before, and as another after.
        target_C: Units predicted as the class before.
        other_changed_C: Units predicted as another class before, and changed after.
        other_C: Units predicted as another class before.
    """

    changed_C: NDArray[np.int64]
    target_C: NDArray[np.int64]
    other_changed_C: NDArray[np.int64]
    other_C: NDArray[np.int64]

    def target(self, micro: bool = False) -> float | None:
        """Target change rate: mean over the classes that are predicted at least once, or pooled."""
        return _rate(self.changed_C, self.target_C, micro)

    def other(self, micro: bool = False) -> float | None:
        """Other change rate: mean over the same classes, or pooled."""
        # A class that is never predicted has no target and is left out of both rates.
        seen = self.target_C > 0
        return _rate(self.other_changed_C[seen], self.other_C[seen], micro)


def _rate(hits_C: NDArray[np.int64], of_C: NDArray[np.int64], micro: bool) -> float | None:
    seen = of_C > 0
    if not seen.any():
        return None
    return float(hits_C.sum() / of_C.sum()) if micro else float((hits_C[seen] / of_C[seen]).mean())


def change_rates(
    before: NDArray[np.int64], after: Sequence[NDArray[np.int64]], number: int
) -> tuple[int, int, int, int]:
    """(changed, target, other changed, other) of class `number`, summed over the draws `after`."""
    target = before == number
    draws = len(after)
    moved = np.array([now != before for now in after], dtype=bool).reshape(draws, len(before))
    return (
        int(moved[:, target].sum()),
        draws * int(target.sum()),
        int(moved[:, ~target].sum()),
        draws * int((~target).sum()),
    )


@dataclass(frozen=True, eq=False)
class ClassEdits:
    """Rates of predictions that change.

    Attributes:
        strengths: In the order of the rates.
        rates: By arm, one entry per strength.
        classes: [C] Classes that were edited, as the predictor numbers them.
        latents: [C] The latent of each.
    """

    strengths: tuple[float, ...]
    rates: Mapping[Arm, tuple[Rates, ...]]
    classes: tuple[int, ...]
    latents: tuple[int, ...]


def edit_classes(
    predict: Predict,
    sae: SAE,
    latent_of: Mapping[int, int],
    *,
    largest_F: NDArray[np.float64],
    mean_F: NDArray[np.float64],
    strengths: Sequence[float],
    draws: int,
    seed: int,
) -> ClassEdits:
    """Suppress the latent of each class on all tokens, and the controls in its place.

    If no latent but the class's own is alive, the two controls that need another latent are undefined.

    Args:
        predict: Classes of all units, with a rewrite.
        sae: Its latents are edited.
        latent_of: Latent of each class to edit.
        largest_F: Largest activation of each latent, on the fit side.
        mean_F: Mean size of each latent's activation there; 0: dead.
        strengths: f' = -strength x the largest activation.
        draws: Number of each control per class and strength.
        seed: Seed of the controls, which are the same at every strength.
    """
    before = predict(None)
    alive_F = mean_F > 0
    largest = torch.from_numpy(largest_F)
    counts: dict[Arm, list[list[tuple[int, int, int, int]]]] = {arm: [[] for _ in strengths] for arm in ARMS}
    for number, latent in latent_of.items():
        rng = np.random.default_rng([seed, number])
        others = np.setdiff1d(np.flatnonzero(alive_F), [latent])
        of_others = range(draws if len(others) else 0)
        latents_of: dict[Arm, list[int]] = {
            "class": [latent],
            "matched": [int(matched_set(np.array([latent]), mean_F, alive_F, rng)[0]) for _ in of_others],
            "latent": [int(rng.choice(others)) for _ in of_others],
        }
        for place, strength in enumerate(strengths):
            operation = Suppress(strength=strength)
            for arm, chosen in latents_of.items():
                after = [predict(LatentEdits(sae, [Edit(each, operation)], largest)) for each in chosen]
                counts[arm][place].append(change_rates(before, after, number))
            own = LatentEdits(sae, [Edit(latent, operation)], largest)
            seeds = (seed * 1_000_003 + number * 1_009 + draw for draw in range(draws))
            after = [predict(RandomDirection(own, each)) for each in seeds]
            counts["direction"][place].append(change_rates(before, after, number))
    rates: dict[Arm, tuple[Rates, ...]] = {
        arm: tuple(Rates(*np.array(rows, dtype=np.int64).reshape(-1, 4).T) for rows in places)
        for arm, places in counts.items()
    }
    return ClassEdits(tuple(strengths), rates, tuple(latent_of), tuple(latent_of.values()))


def edit_table(section: str, units: str, *extra: FigureSpec) -> FigureTable:
    """After the rows `extra`: how well latents tell the classes, and change rates of `units` (clips, patches)."""

    def specs() -> Iterator[FigureSpec]:
        yield FigureSpec(
            "f1",
            "F1 of the class's latent",
            "On the fit side, mean over the classes, with the lowest and highest of them. {how}",
            n_of="classes",
            better="high",
            interval="lowest and highest over the classes",
        )
        kinds: tuple[tuple[str, str, Literal["high", "low"]], ...] = (
            ("target", "c", "high"),
            ("other", "another class", "low"),
        )
        for kind, of, better in kinds:
            for micro, pooled in (
                ("", "mean over the classes that are predicted at least once"),
                ("_micro", "counts pooled over the classes"),
            ):
                title = f"{kind.capitalize()} change rate of {units}{', pooled' if micro else ''}"
                definition = (
                    f"Of the {units} predicted as {of} before, the share predicted as something else when "
                    f"{{suppressed}} is suppressed; {pooled}.{{alone}} {{setting}}"
                )
                shared: dict[str, Any] = {
                    "definition": definition,
                    "n_of": f"predictions of {units}",
                    "style": "percent",
                    "name": f"{section}.{kind}{micro}.{{arm}}",
                }
                yield FigureSpec(
                    f"{kind}{micro}_class",
                    title,
                    better=better,
                    headline=kind == "target" and not micro,
                    null=f"{section}.{kind}{micro}.matched",
                    **shared,
                )
                yield FigureSpec(f"{kind}{micro}_control", f"{title}: {{suppressed}}", **shared)

    return FigureTable(section, *extra, *specs())


def class_edit_section(
    edits: ClassEdits, *, table: FigureTable, title: str, lead: str, how: str, extra: tuple[Figure, ...]
) -> Section:
    """Figures at the strength nearest to 2, and the rates against strength.

    Args:
        edits: The rates.
        table: See `edit_table`.
        title: Heading of the section.
        lead: The question it answers.
        how: Choice of latents and predictor, for the definitions.
        extra: Figures that come first.
    """
    place = int(np.argmin([abs(strength - _HEADLINE) for strength in edits.strengths]))
    strength = edits.strengths[place]
    setting = f"With f' = -{strength:g} x the latent's largest activation on every patch token. {how}"
    figures = list(extra)
    for arm, words in ARMS.items():
        rates = edits.rates[arm][place]
        count = int(rates.target_C.sum())
        for kind, micro in (("target", False), ("target", True), ("other", False), ("other", True)):
            figures.append(
                table.fill(
                    f"{kind}{'_micro' if micro else ''}_{'class' if arm == 'class' else 'control'}",
                    rates.target(micro) if kind == "target" else rates.other(micro),
                    count if kind == "target" else int(rates.other_C[rates.target_C > 0].sum()),
                    subject="sae" if arm == "class" else "random",
                    arm=arm,
                    suppressed=words,
                    alone=" Undefined where no other latent is alive." if arm in ("matched", "latent") else "",
                    setting=setting,
                )
            )

    def line(label: str, subject: Literal["sae", "raw", "random"], arm: Arm, kind: str) -> Line:
        values = [each.target() if kind == "target" else each.other() for each in edits.rates[arm]]
        return Line(label=label, subject=subject, y=tuple(values))

    return Section(
        name=table.section,
        title=title,
        lead=lead,
        figures=tuple(figures),
        curves=(
            Curve(
                name=f"{table.section}.curve",
                title="Predictions that change",
                x_label="strength",
                y_label="change rate",
                x=edits.strengths,
                lines=(
                    line("the class itself", "sae", "class", "target"),
                    line("other classes", "raw", "class", "other"),
                    line("the class, matched latent", "random", "matched", "target"),
                ),
                definition=f"Target and other change rate, mean over classes, when the class's latent is set to "
                f"-strength x its largest activation, and target change rate of a latent of the same mean activation. "
                f"{how}",
            ),
        ),
        notes=(
            "A latent that is specific to a class has a high target and a low other change rate, both far from those "
            "of "
            "its controls. Classes that are never predicted are left out.",
        ),
    )
