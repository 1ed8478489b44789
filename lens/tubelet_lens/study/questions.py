"""The questions of a study's tables and the figures that answer them, after the paper on spatio-temporal SAEs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One figure in a table."""

    figure: str
    """Its name in the evaluation; `*` matches any part of it and gives one column for each match."""
    title: str
    """`{}` is replaced by what `*` matched."""

    def matching(self, known: Iterable[str]) -> tuple[Column, ...]:
        """This column, or one for each match of `*`, for figures that are among `known`."""
        if "*" not in self.figure:
            return (self,) if self.figure in known else ()
        before, after = self.figure.split("*")
        parts = [
            name.removeprefix(before).removesuffix(after)
            for name in known
            if name.startswith(before) and name.endswith(after)
        ]
        return tuple(Column(f"{before}{part}{after}", self.title.format(part)) for part in parts if "." not in part)


@dataclass(frozen=True)
class Question:
    """One table."""

    name: str
    """Of its files."""
    title: str
    lead: str
    """The question, and what to keep in mind when reading the answer."""
    columns: tuple[Column, ...]


def _columns(**figures: str) -> tuple[Column, ...]:
    return tuple(Column(name.replace("__", "."), title) for name, title in figures.items())


QUESTIONS: tuple[Question, ...] = (
    Question(
        "reconstruction",
        "Reconstruction and sparsity",
        "How much of the activations the code keeps, and with how many latents.",
        _columns(
            reconstruction__fvu="FVU",
            reconstruction__cosine="cosine",
            sparsity__l0="L0",
            sparsity__dead_fraction="dead",
            sparsity__always_on="always on",
        ),
    ),
    Question(
        "coherence",
        "Temporal coherence",
        "Does the code of a patch persist from one latent step to the next as the raw activation does? Compare with "
        "FVU, L0 and dead latents: a few always-on latents look coherent whatever they encode. The null shuffles time "
        "within each clip.",
        _columns(
            coherence__lag1__raw="lag 1, raw",
            coherence__lag1__sae="lag 1, SAE",
            coherence__lag1__sae_shuffled="null",
            coherence__drop="drop",
            coherence__drop_above_null="drop above null",
            coherence__lag1_weighted__sae="weighted by activity",
            coherence__jaccard__sae="support Jaccard",
            coherence__flip_rate__sae="flip rate",
        ),
    ),
    Question(
        "action",
        "Action classification",
        "A linear probe on a clip's pooled codes, and the same probe on the raw activations. A wider vector helps a "
        "linear probe by itself: the random projection and the untrained SAE have the SAE's width.",
        _columns(
            action__top1__sae="SAE",
            action__top1__raw="raw",
            action__top1__random_topk="random TopK",
            action__top1__untrained="untrained SAE",
            action__top1__pca="PCA",
            action__top5__sae="SAE, top 5",
            action__top5__raw="raw, top 5",
        ),
    ),
    Question(
        "interpretability",
        "Monosemanticity",
        "Do the clips on which a latent fires resemble each other? MS has a floor at the mean similarity of any two "
        "clips (the null), and flatters SAEs on the backbone whose embedding judges: only a neutral embedding compares "
        "backbones.",
        _columns(
            monosemanticity__mean__sae="MS, SAE",
            monosemanticity__mean__raw="MS, raw dimensions",
            monosemanticity__mean__permuted="null",
            monosemanticity__above_null="above null",
            **{"monosemanticity__above_null_*": "above null, by {}"},
            collinearity__mean="nearest cosine (size)",
            labels__purity__sae="label purity",
            labels__purity__permuted="purity, null",
        ),
    ),
    Question(
        "cross_backbone",
        "Backbones side by side",
        "Coherence at one distance in time for all sources: latent steps of different backbones cover different "
        "numbers of frames. Other figures as in their own tables.",
        _columns(
            coherence__equal_frames__raw="autocorrelation, raw",
            coherence__equal_frames__sae="autocorrelation, SAE",
            coherence__equal_frames__sae_shuffled="null",
            reconstruction__fvu="FVU",
            action__top1__sae="action, SAE",
            action__top1__raw="action, raw",
            monosemanticity__mean__sae="MS",
        ),
    ),
    Question(
        "retrieval",
        "Text-video retrieval",
        "A ridge map from pooled codes to text embeddings, fitted on other videos; the same map for the raw "
        "activations.",
        _columns(
            retrieval__text_to_video_r1__sae="text to video R@1",
            retrieval__text_to_video_r1__raw="raw",
            retrieval__text_to_video_r5__sae="R@5",
            retrieval__text_to_video_r5__raw="raw, R@5",
            retrieval__text_to_video_medr__sae="MedR",
            retrieval__video_to_text_r1__sae="video to text R@1",
            retrieval__video_to_text_r1__raw="raw, video to text",
        ),
    ),
    Question(
        "ablation",
        "Causal ablation of the code",
        "How many latents carry what the probe reads? Latents are set to 0, best first, against random "
        "ones matched in activation. This shows what the probe uses, not what the backbone uses.",
        _columns(
            ablation__before__sae="accuracy before",
            ablation__m50__sae="latents for half",
            ablation__m50__random="random",
            ablation__area__sae="area lost",
            ablation__area__random="area, random",
            ablation__gini="concentration (Gini)",
        ),
    ),
    Question(
        "backbone",
        "In the backbone",
        "How the backbone's classes change when its activations at the SAE's hook are edited: replaced by the "
        "reconstruction, without some latents, with a class's latent suppressed. Only of cells whose evaluation has "
        "`in_backbone`; the ablation above is of the code alone.",
        _columns(
            recovery__recovered_kl="recovered (KL)",
            backbone_ablation__before="accuracy before",
            backbone_ablation__m50="latents for half",
            backbone_ablation__area__sae="area lost",
            backbone_ablation__area__random="area, random",
            effects__largest__sae="largest logit change",
            effects__largest__random="random direction",
            classification_edits__target__class="class's latent: target",
            classification_edits__other__class="other",
            classification_edits__target__matched="matched latent: target",
        ),
    ),
    Question(
        "scope",
        "Information scope",
        "Does a latent follow the content when the view shifts (low), or stay with the frame (high)? Temporal scope is "
        "exactly 0 for a backbone that sees one frame at a time.",
        _columns(
            scope__spatial__sae="spatial CDS",
            scope__spatial__permuted="null",
            scope__spatial_vanished="vanished",
            scope__spatial_high="high",
            scope__temporal__sae="temporal CDS",
            scope__temporal__permuted="null, time",
            scope__temporal_vanished="vanished, time",
        ),
    ),
    Question(
        "seeds",
        "Stability between seeds",
        "Do SAEs that differ only in their seed learn the same latents? Dictionaries are matched one to one; figures "
        "are means over all pairs of seeds.",
        _columns(
            seeds__cosine="matched cosine",
            seeds__cosine__random="null",
            seeds__above_07="share above 0.7",
            seeds__above_09="share above 0.9",
        ),
    ),
)
