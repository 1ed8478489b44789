"""The cells of a study: one SAE, trained on one store with one seed, and its evaluation.

cells/SOURCE/VARIANT/seed=S/run/           what `tubelet train` writes
                           /evaluation/    what `tubelet evaluate` writes
                           /cell.json      written last; marks the cell as finished, with its settings
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_lens.config import ArrayReference, EvaluateConfig, StoreReference
from tubelet_lens.results.evaluation import Evaluation, read_evaluation
from tubelet_lens.study.config import SourceConfig, StudyConfig
from tubelet_store.reader import open_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.specs import specs


@dataclass(frozen=True)
class Cell:
    """One SAE of the grid."""

    source: str
    variant: str
    """Name of the variant, with the values of its swept fields."""
    seed: int
    folder: Path
    train: TrainConfig
    evaluate: EvaluateConfig
    digest: str
    """Digest of everything that the result depends on: settings and identities of the stores."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return f"{self.source}/{self.variant}/seed={self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is finished with these settings on these stores."""
        return self._has_digest("cell.json")

    @property
    def stale(self) -> bool:
        """Whether the folder has a result of other settings or other stores."""
        return (self.folder / "begun.json").is_file() and not self._has_digest("begun.json")

    def _has_digest(self, file: str) -> bool:
        """Whether `file` of the folder has this cell's digest."""
        try:
            return bool(json.loads((self.folder / file).read_text())["digest"] == self.digest)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def evaluation(self) -> Evaluation:
        """Evaluation of a finished cell."""
        return read_evaluation(self.folder / "evaluation" / "evaluation.json")


def cells(config: StudyConfig) -> list[Cell]:
    """All cells, in the order source, variant, weights, seed.

    Raises:
        TubeletError: a store cannot be opened, or a field is unknown or invalid. Nothing has run then.
    """
    grid = []
    for source_name, source in config.sources.items():
        stores = [open_store(source.train), *([open_store(source.test)] if source.test is not None else [])]
        identities = [store.identity for store in stores]
        for variant_name, variant in config.variants.items():
            for seed in config.seeds:
                base = _base(config, source, variant_name, variant.settings, variant.weights, seed)
                for spec in specs(base):
                    variant_full = spec.name
                    folder = config.out / "cells" / source_name / variant_full / f"seed={seed}"
                    train = spec.config.model_copy(update={"out": folder / "run"})
                    evaluate = _evaluate_config(config, source, folder)
                    described = {
                        "train": train.model_dump(mode="json", exclude={"out"}),
                        "evaluate": evaluate.model_dump(mode="json", exclude={"run", "out"}),
                        "stores": [*identities, *_reference_digests(evaluate)],
                    }
                    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
                    grid.append(Cell(source_name, variant_full, seed, folder, train, evaluate, digest))
    return sorted(grid, key=lambda cell: list(config.sources).index(cell.source))


def _reference_digests(evaluate: EvaluateConfig) -> list[str]:
    """Identities of further stores that an evaluation reads, and digests of arrays."""
    references = evaluate.monosemanticity.references
    stores = [reference.store for reference in references if isinstance(reference, StoreReference)]
    stores += [evaluate.scope.store] if evaluate.scope.store is not None else []
    arrays = [reference.path for reference in references if isinstance(reference, ArrayReference)]
    return [
        *(open_store(store).identity for store in stores),
        *(f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in arrays if path.is_file()),
    ]


def _base(
    config: StudyConfig,
    source: SourceConfig,
    name: str,
    settings: Mapping[str, Any],
    weights: Mapping[str, Any],
    seed: int,
) -> TrainConfig:
    """A variant and its sweep as one training configuration, which `specs` splits into SAEs."""
    own = deepcopy(dict(settings))
    sae = own.setdefault("sae", {})
    if not isinstance(sae, dict):
        raise TubeletError(f"variants.{name}.settings.sae is {sae!r}, not a section", "Write sae: {kind: topk, k: 16}")
    sae.setdefault("seed", seed)
    tree = {
        **config.train,
        "store": source.train,
        "out": str(config.out),
        "seed": seed,
        "saes": [{"name": name, **own}],
        "sweep": dict(weights),
    }
    tree.setdefault("hook", source.hook)
    if source.test is not None:
        # The SAE is measured on another store, so it may train on every video.
        tree.setdefault("holdout", {"fraction": 0})
    return validate(TrainConfig, tree, f"train and variants.{name}")


def _evaluate_config(config: StudyConfig, source: SourceConfig, folder: Path) -> EvaluateConfig:
    tree: dict[str, Any] = {"run": str(folder / "run"), "store": source.test or source.train}
    if source.test is not None:
        tree |= {"other_store": True, "split": "all", "fit_store": source.train}
    tree |= {**config.evaluate, **source.evaluate, "out": str(folder / "evaluation")}
    return validate(EvaluateConfig, tree, "evaluate")
