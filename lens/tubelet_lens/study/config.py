"""Settings of `tubelet study`: which stores, which SAEs, how many seeds."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config
from tubelet_pipeline.cluster import ClusterConfig


class SourceConfig(Config):
    """Activations of one backbone on one data set."""

    backbone: str
    """What the tables call the backbone."""
    dataset: str
    """What the tables call the data set."""
    train: str
    """Store to train on (path or URL)."""
    test: str | None = None
    """Store to evaluate on; none: the videos of `train` that are held out."""
    hook: str | None = None
    """Whose activations; none: the stores' only hook."""
    evaluate: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet evaluate` that hold for this source alone, such as reference embeddings."""


class VariantConfig(Config):
    """One kind of SAE."""

    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """What it has of its own: `{sae: {kind: topk, k: 16}, objective: {lambda_t: 0.1}}` (also optimizer)."""
    weights: dict[str, list[JsonValue]] = Field(default_factory=dict)
    """Fields swept within the variant, each combination a cell: `{objective.lambda_t: [0.03, 0.1]}`."""


class StudyConfig(Config):
    """A grid: every source x every variant x its weights x every seed."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "out",
        "sources",
        "variants",
        "seeds",
        "train",
        "evaluate",
        "cluster.workers",
        "cluster.scheduler",
        "retries",
    )

    out: Path
    """Folder of the study; cells found there are not done again."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Stores by name."""
    variants: dict[str, VariantConfig] = Field(min_length=1)
    """SAEs by name."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Each chooses the initial weights and the order of the tokens."""
    train: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet train` that all cells share."""
    evaluate: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet evaluate` that all cells share."""
    cluster: ClusterConfig = ClusterConfig()
    """Where cells run, one per worker at a time."""
    retries: int = Field(default=1, ge=0)
    """How often a cell is tried again after its worker died."""

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        for kind, names in (("source", self.sources), ("variant", self.variants)):
            for name in names:
                if not name or name.startswith(".") or Path(name).name != name:
                    raise ValueError(f"'{name}' cannot name a {kind}: it becomes a folder")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice")
        return self
