"""Configuration of `tubelet evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tubelet.config import Config
from tubelet_pipeline.decode.process import DecodeConfig

Topic = Literal[
    "reconstruction",
    "coherence",
    "sparsity",
    "action",
    "labels",
    "ablation",
    "retrieval",
    "monosemanticity",
    "collinearity",
    "scope",
    "recovery",
    "backbone_ablation",
    "effects",
    "classification_edits",
    "segmentation_edits",
]
"""What an evaluation can measure, in the report's order."""


class ActionConfig(Config):
    """Linear probe of the class of a video, on pooled vectors."""

    poolings: tuple[Literal["mean", "max", "mean_max", "mean_then_encode"], ...] = Field(
        default=("mean", "max", "mean_max"), min_length=1
    )
    """How a clip's tokens become one vector; the first gives the headline. mean_max: both, concatenated. These pool the
    codes of tokens; mean_then_encode: encodes the clip's mean token instead, a different model."""
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1e-3, 1e-2, 1e-1, 1.0), min_length=1)
    """L2 penalties to choose from on the validation videos; C of scikit-learn is 1 / (penalty x clips)."""
    bootstrap: int = Field(default=2000, ge=1)
    """Bootstrap draws of the test videos behind each interval."""


class AblationConfig(Config):
    """Ablation of the latents that the action probe reads."""

    largest: int = Field(default=256, ge=1)
    """Most latents set to 0 at once; never more than half of those alive."""
    draws: int = Field(default=20, ge=1)
    """Random sets of latents per size."""


class Words(Config):
    """Bag of words, no model: tf-idf unit vectors of the words of a caption."""

    kind: Literal["words"] = "words"


class TransformersText(Config):
    """A frozen text model in transformers' format."""

    kind: Literal["transformers"] = "transformers"
    id: str
    """Hub id or folder."""
    revision: str | None = None
    """Commit, tag or branch on the hub; none: its default."""
    pooling: Literal["auto", "mean", "cls"] = "auto"
    """auto: the model's own text embedding where it has one (CLIP, SigLIP), else the mean of its last tokens."""
    batch: int = Field(default=64, ge=1)
    """Captions per forward pass."""


class PrecomputedText(Config):
    """Precomputed embeddings."""

    kind: Literal["array"] = "array"
    path: Path
    """Parquet with columns `caption` and `embedding`, or NAME.npy [captions, E] with NAME.txt, one caption per line."""


AnyText = Annotated[Words | TransformersText | PrecomputedText, Field(discriminator="kind")]


class RetrievalConfig(Config):
    """Text-to-video and video-to-text retrieval, by a ridge map from pooled vectors to frozen text embeddings."""

    text: AnyText = Words()
    """Text model that embeds the captions."""
    pooling: Literal["mean", "max", "mean_max"] = "mean"
    """How a clip's tokens become one vector."""
    penalties: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0), min_length=1
    )
    """Ridge penalties per clip to choose from on the validation videos."""


class _Reference(Config):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Its name in figures and columns, such as `clip`."""
    neutral: bool = False
    """None of the compared SAEs reads this model; its figures are the headline."""


class StoreReference(_Reference):
    """A store of the same videos by another backbone; clips are matched by video and view."""

    kind: Literal["store"] = "store"
    store: str
    """Path of the store."""
    hook: str | None = None
    """Its hook; none: the last of its plan."""
    tokens: Literal["grid", "special"] = "grid"
    """grid: the mean of all tokens of the grid. special: the first special token (CLS), its mean through time."""


class ArrayReference(_Reference):
    """Precomputed embeddings."""

    kind: Literal["array"] = "array"
    path: Path
    """`.npy` [clips, E], a row for each clip of the evaluated store in the order of its clip table (NaN: none); or
    `.parquet` with columns `video_id`, `embedding` (a list of numbers) and, for more than one view, `view`."""


AnyReference = Annotated[StoreReference | ArrayReference, Field(discriminator="kind")]


class MonosemanticityConfig(Config):
    """Whether the clips on which a latent fires are alike."""

    activation: Literal["max", "mean"] = "max"
    """A clip's activation: the largest or the mean over its tokens."""
    references: tuple[AnyReference, ...] = ()
    """Models whose embeddings measure similarity, in addition to the backbone itself."""


class ScopeConfig(Config):
    """Whether a latent follows the content when the view is shifted."""

    store: str | None = None
    """Store with shifted views (`views.kind: shifted` when extracting), same backbone and hook; none: the evaluated
    store, if it has such views."""
    clips: int = Field(default=32, ge=1)
    """Strongest clips per latent, k_CDS."""
    vanished: Literal["left_out", "one"] = "left_out"
    """Pairs in which the latent fires in one view only: left out of the mean, or counted as the largest distance."""
    limit_pairs: int | None = Field(default=None, ge=1)
    """Use at most this many pairs of views, drawn at random; none: all."""


class InBackboneConfig(Config):
    """Measurements in the backbone itself: it runs on the videos with its activations reconstructed or edited."""

    root: str | None = None
    """Folder of the data set; none: the folder recorded in each store."""
    checkpoint: str | None = None
    """Hub id or folder of the backbone; none: the one recorded in the store."""
    fit_clips: int = Field(default=256, ge=2)
    """Maximum number of clips to fit probes on, balanced over classes."""
    test_clips: int = Field(default=64, ge=1)
    """Maximum number of clips to measure on, balanced over classes; their pixels are held in memory."""
    largest: int = Field(default=64, ge=1)
    """Ablation: largest number of latents removed at once."""
    draws: int = Field(default=20, ge=1)
    """Ablation: random sets of latents per size."""
    strengths: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 1.0, 2.0, 4.0), min_length=1)
    """Class edits: f' = -strength x the latent's largest activation; figures use the strength nearest to 2."""
    control_draws: int = Field(default=2, ge=1)
    """Class edits: random latents, matched latents and random directions per class and strength."""
    effects: int = Field(default=32, ge=0)
    """Number of latents switched off one by one, in order of importance to the probe. Results go to `effects.parquet`,
    which the gallery shows. Each latent takes two passes over the test clips; 0: none."""
    masks: Literal["color", "shape", "object"] = "color"
    """Patch classes, for data sets with masks as `tubelet videos` writes them."""
    max_frequency: float = Field(default=0.1, gt=0, le=1)
    """Segmentation: ignore latents that fire on a larger share of tokens."""
    label_threshold: float = Field(default=0.9, ge=0, le=1)
    """Segmentation: ignore patches whose most common class covers a smaller share."""
    decode: DecodeConfig = DecodeConfig(processes=1)
    """Video decoding."""


class EvaluateConfig(Config):
    """Evaluate a trained SAE on a store."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "run",
        "store",
        "out",
        "split",
        "other_store",
        "fit_store",
        "skip",
        "controls",
        "limit_clips",
        "in_backbone",
        "device",
    )

    run: Path
    """Folder of a training run, with `sae.json`."""
    store: str
    """Path of the activation store."""
    out: Path | None = None
    """Folder for evaluation.json and report.html; none: `evaluation` inside the run."""
    split: Literal["held_out", "train", "all"] = "held_out"
    """Videos to evaluate: those held out of training, those trained on, or all."""
    other_store: bool = False
    """Accept a store other than the one trained on (another data set or sampling); hook and backbone must be equal."""
    fit_store: str | None = None
    """Store whose clips probes and maps are fitted on; none: the clips of `store` that the SAE was trained on."""
    fit_clips: int = Field(default=20_000, ge=1)
    """Fit on at most this many clips, drawn at random."""
    fit_validation: float = Field(default=0.2, gt=0, lt=0.5)
    """Share of the fitted-on videos on which penalties are chosen."""
    fit_ranking: float = Field(default=0.25, gt=0, lt=0.5)
    """Share of the fitted-on videos on which latents are ranked for ablation."""
    controls: bool = True
    """Also measure an untrained SAE and a random projection with TopK."""
    control_draws: int = Field(default=3, ge=1)
    """Random draws of each control."""
    action: ActionConfig = ActionConfig()
    """The action probe."""
    ablation: AblationConfig = AblationConfig()
    """Ablation of the probe's latents."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Text-video retrieval."""
    monosemanticity: MonosemanticityConfig = MonosemanticityConfig()
    """Monosemanticity."""
    scope: ScopeConfig = ScopeConfig()
    """Information scope, from shifted views."""
    in_backbone: InBackboneConfig | None = None
    """Also measure in the backbone itself (recovery, ablation, class edits); needs the videos. null: do not; `{}`: with
    the defaults."""
    about: str | None = None
    """Text shown at the top of the report, such as what the data are."""
    skip: tuple[Topic, ...] = ()
    """Topics to leave out."""
    limit_clips: int | None = Field(default=None, ge=1)
    """Evaluate at most this many clips, drawn at random; none: all."""
    lags: int = Field(default=4, ge=1)
    """Largest distance in latent steps of the autocorrelation curve."""
    null_draws: int = Field(default=4, ge=1)
    """Draws of the shuffled-time and permuted nulls."""
    seed: int = 0
    """Seed of every random draw."""
    window_mib: int = Field(default=512, ge=1)
    """Memory for clips held at once, MiB; at least one clip is held."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if available."""

    @property
    def report_folder(self) -> Path:
        """Path of the report."""
        return self.out if self.out is not None else self.run / "evaluation"
