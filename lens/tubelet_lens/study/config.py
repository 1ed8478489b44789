"""Configuration of `tubelet study`: which stores, which SAEs, which seeds."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config
from tubelet_pipeline.cluster import ClusterConfig


class SourceConfig(Config):
    """Activations of one backbone on one data set."""

    backbone: str
    """Name of the backbone in the tables."""
    dataset: str
    """Name of the data set in the tables."""
    train: str
    """Store to train on (path or URL)."""
    test: str | None = None
    """Store to evaluate on; none: the held-out videos of `train`."""
    hook: str | None = None
    """Hook to train on; none: the stores' only hook."""
    evaluate: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet evaluate` for this source only, such as reference embeddings."""


class VariantConfig(Config):
    """One kind of SAE."""

    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet train` for this variant, in sections sae, objective and optimizer:
    `{sae: {kind: topk, k: 16}, objective: {lambda_t: 0.1}}`."""
    weights: dict[str, list[JsonValue]] = Field(default_factory=dict)
    """Fields to sweep within the variant; each combination is a cell: `{objective.lambda_t: [0.03, 0.1]}`."""


class StudyConfig(Config):
    """A grid of SAEs: source x variant x swept weights x seed."""

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
    """Folder of the study. Cells that are finished there are not repeated."""
    sources: dict[str, SourceConfig] = Field(min_length=1)
    """Stores by name."""
    variants: dict[str, VariantConfig] = Field(min_length=1)
    """SAEs by name."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of the initial weights and the token order."""
    train: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet train` that all cells share."""
    evaluate: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of `tubelet evaluate` that all cells share."""
    cluster: ClusterConfig = ClusterConfig()
    """Where cells run; one per worker at a time."""
    retries: int = Field(default=1, ge=0)
    """Retries of a cell whose worker process ended."""

    @model_validator(mode="after")
    def _names(self) -> StudyConfig:
        for kind, names in (("source", self.sources), ("variant", self.variants)):
            for name in names:
                if not name or name.startswith(".") or Path(name).name != name:
                    raise ValueError(f"'{name}' is not a valid name of a {kind}: it becomes a folder name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} contain duplicates")
        return self
