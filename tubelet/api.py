"""The verbs as functions: `tubelet.extract`, `train`, `evaluate`, `edit`, `gallery`, `study`, `estimate`.

Each takes the fields that the verb's YAML has: as keywords (nested fields as dicts, or dotted: `**{"sae.k": 16}`), as
the path of a YAML file, as a mapping, or as a configuration object; keywords override the rest. Results are shown as
tables and turn into pandas with `to_pandas()`. Progress goes to stderr.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.config import configure
from tubelet.extras import require_extra

if TYPE_CHECKING:
    from tubelet_lens.config import EvaluateConfig
    from tubelet_lens.gallery.config import GalleryConfig
    from tubelet_lens.gallery.make_gallery import GallerySummary
    from tubelet_lens.report.evaluation_result import EvaluationResult
    from tubelet_lens.steering.config import EditConfig
    from tubelet_lens.steering.edit_report import EditReport
    from tubelet_lens.study.config import StudyConfig
    from tubelet_lens.study.run_study import StudySummary
    from tubelet_pipeline.estimate import Estimate, EstimateConfig
    from tubelet_pipeline.extract_config import ExtractConfig
    from tubelet_pipeline.extract_report import ExtractSummary
    from tubelet_trainer.config import TrainConfig
    from tubelet_trainer.run.train_result import TrainResult

Source = str | Path | Mapping[str, Any] | None


def extract(config: Source | ExtractConfig = None, /, **fields: Any) -> ExtractSummary:
    """Decode videos, run a frozen backbone, store its activations: `tubelet.extract("extract.yaml")`.

    An unfinished store with the same plan is continued.

    Raises:
        TubeletError: a field is unknown or invalid; no disk space for the store; shards that fail repeatedly.
    """
    require_extra("pipeline", "tubelet.extract")
    from tubelet_pipeline.driver import extract
    from tubelet_pipeline.extract_config import ExtractConfig
    from tubelet_pipeline.extract_report import ExtractProgress

    settings = configure(ExtractConfig, config, fields)
    with ExtractProgress() as progress:
        return extract(settings, progress)


def estimate(config: Source | EstimateConfig = None, /, **fields: Any) -> Estimate:
    """What an extraction will cost (bytes, requests, hours), before it runs.

    Raises:
        TubeletError: a field is unknown or invalid, or videos or backbone cannot be read.
    """
    require_extra("pipeline", "tubelet.estimate")
    from tubelet_pipeline.estimate import EstimateConfig, estimate

    return estimate(configure(EstimateConfig, config, fields))


def train(config: Source | TrainConfig = None, /, **fields: Any) -> TrainResult:
    """Train one SAE, or several on one stream of activations; a run found in `out` is continued.

    Example:
        tubelet.train(store="demo/train.zarr", out="runs/a", sae={"kind": "batchtopk", "k": 16}, epochs=2)

    Raises:
        TubeletError: a field is unknown or invalid, `out` holds another run, or training diverged.
    """
    require_extra("trainer", "tubelet.train")
    from tubelet_trainer.config import TrainConfig
    from tubelet_trainer.run.loop import train

    return train(configure(TrainConfig, config, fields))


def evaluate(config: Source | EvaluateConfig = None, /, **fields: Any) -> EvaluationResult:
    """Measure a trained SAE on a store; the report is written into `out`, by default `evaluation` in the run's folder.

    Raises:
        TubeletError: a field is unknown or invalid, run and store do not belong together, or no clip is left.
    """
    require_extra("lens", "tubelet.evaluate")
    from tubelet_lens.config import EvaluateConfig
    from tubelet_lens.evaluate import evaluate

    settings = configure(EvaluateConfig, config, fields)
    result = evaluate(settings)
    result.write(settings.report_folder)
    return result


def edit(config: Source | EditConfig = None, /, **fields: Any) -> EditReport:
    """Change latents of an SAE on clips, run the backbone on, and compare with controls; the page is written too.

    Raises:
        TubeletError: a field is unknown or invalid, SAE, store and backbone do not belong together, or a video
            cannot be read.
    """
    require_extra("all", "tubelet.edit")
    from tubelet_lens.steering.config import EditConfig
    from tubelet_lens.steering.edit import edit

    settings = configure(EditConfig, config, fields)
    report = edit(settings)
    report.write(settings.report_folder)
    return report


def gallery(config: Source | GalleryConfig = None, /, **fields: Any) -> GallerySummary:
    """Write a static site with a page per latent: the clips on which it fires most.

    Raises:
        TubeletError: a field is unknown or invalid, run and store do not belong together, or no latent fires.
    """
    require_extra("lens", "tubelet.gallery")
    from tubelet_lens.gallery.config import GalleryConfig
    from tubelet_lens.gallery.make_gallery import make_gallery

    return make_gallery(configure(GalleryConfig, config, fields))


def study(config: Source | StudyConfig = None, /, **fields: Any) -> StudySummary:
    """Train and evaluate a grid of SAEs over stores; tables and plots over all cells.

    Raises:
        TubeletError: a field is unknown or invalid, or a store cannot be opened.
    """
    require_extra("all", "tubelet.study")
    from tubelet_lens.study.config import StudyConfig
    from tubelet_lens.study.run_study import study

    return study(configure(StudyConfig, config, fields))
