"""One evaluation: the chosen clips pass every metric once.

run folder ─▶ SAE ┐            ┌─▶ metrics over tokens ────────────────┐
store ─▶ clips ───┴─▶ windows ─┴─▶ pooled clips ─▶ metrics over clips ─┴─▶ evaluation.json, report.html, latents.parquet

Probes and maps are fitted on the fit side (clips that the SAE was trained on, or `fit_store`) and measured on the test
side; no video is on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_lens.config import EvaluateConfig, Topic
from tubelet_lens.inputs.clip_selection import choose_clips
from tubelet_lens.inputs.clip_stream import Window, clip_bytes, windows
from tubelet_lens.inputs.control_encoders import controls
from tubelet_lens.inputs.latent_time import latent_time
from tubelet_lens.inputs.pooled_clips import Pooling, pooled_split
from tubelet_lens.inputs.trained_sae import TrainedSae, check_store, load_trained
from tubelet_lens.metrics.action_probe import action
from tubelet_lens.metrics.code_ablation import code_ablation
from tubelet_lens.metrics.code_sparsity import Sparsity
from tubelet_lens.metrics.collinearity import measure_collinearity
from tubelet_lens.metrics.information_scope import measure_information_scope
from tubelet_lens.metrics.label_purity import label_purity
from tubelet_lens.metrics.metric import ClipMetric, ClipResult, ClipSetting, Metric, Setting
from tubelet_lens.metrics.monosemanticity import measure_monosemanticity
from tubelet_lens.metrics.reconstruction import Reconstruction
from tubelet_lens.metrics.retrieval import retrieval
from tubelet_lens.metrics.temporal_coherence import Coherence
from tubelet_lens.report.evaluation_result import EvaluationResult
from tubelet_lens.results.evaluation import Coverage, Evaluation
from tubelet_lens.results.latent_table import latent_table
from tubelet_lens.results.training_curves import training_section
from tubelet_lens.steering.backbone_ablation import backbone_ablation
from tubelet_lens.steering.backbone_session import BackboneSession, start_session
from tubelet_lens.steering.classification_edits import classification_edits
from tubelet_lens.steering.latent_effects import latent_effects
from tubelet_lens.steering.recovery import recovery
from tubelet_lens.steering.segmentation_edits import segmentation_edits
from tubelet_store.reader import Store, open_store
from tubelet_trainer.run.environment import software

METRICS: dict[Topic, Callable[[Setting], Metric]] = {
    "reconstruction": Reconstruction,
    "coherence": Coherence,
    "sparsity": Sparsity,
}
"""What is measured over tokens, in the report's order."""

CLIP_METRICS: dict[Topic, ClipMetric] = {
    "action": action,
    "labels": label_purity,
    "ablation": code_ablation,
    "retrieval": retrieval,
    "monosemanticity": measure_monosemanticity,
    "collinearity": measure_collinearity,
    "scope": measure_information_scope,
}
"""What is measured over pooled clips, in the report's order."""

BACKBONE_METRICS: dict[Topic, Callable[[ClipSetting, BackboneSession], ClipResult | None]] = {
    "recovery": recovery,
    "backbone_ablation": backbone_ablation,
    "effects": latent_effects,
    "classification_edits": classification_edits,
    "segmentation_edits": segmentation_edits,
}
"""What is measured in the running backbone, in the report's order."""

_LABELS = "it needs labels of two classes or more, and labeled clips to fit on"
_READOUT = "it needs a classifier in the checkpoint, or labeled clips to fit one on"

NEEDS: dict[Topic, str] = {
    "action": _LABELS,
    "labels": "it needs labels of two classes or more on 16 evaluated videos",
    "ablation": f"{_LABELS}, and two alive latents",
    "retrieval": "it needs two captions or more, and clips with captions to fit on",
    "monosemanticity": "it needs two evaluated clips",
    "collinearity": "it needs two alive latents",
    "scope": "it needs shifted views, in this store or in `scope.store`",
    "recovery": _READOUT,
    "backbone_ablation": f"{_READOUT}, labels, and two alive latents",
    "effects": f"{_READOUT}, and a latent that fires",
    "classification_edits": f"{_READOUT}, and labels on the fitted-on clips",
    "segmentation_edits": "it needs clips to fit on, and masks of the videos",
}
"""What a metric lacks when it returns None."""


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate the SAE of a training run on a store.

    Raises:
        TubeletError: the run or store cannot be read, they do not belong together, no clip is left to evaluate, or a
            clip that is stored as ok is damaged.
    """
    device = choose_device(config.device)
    trained = load_trained(config.run, str(device))
    store = open_store(config.store)
    check_store(trained, store, config.other_store)
    clips = choose_clips(store, config.split, trained.holdout, config.limit_clips)
    test = Setting(
        store=store,
        hook=trained.hook,
        clips=clips,
        latents=trained.coder.latents,
        time=latent_time(store, clips),
        lags=config.lags,
        null_draws=config.null_draws,
        seed=config.seed,
        device=device,
    )
    fit = _fit_setting(config, trained, test)
    start = fit or test
    encoders = {}
    if config.controls:
        encoders = controls(
            trained, start.store, start.clips, draws=config.control_draws, seed=config.seed, device=device
        )

    metrics = [make(test) for topic, make in METRICS.items() if topic not in config.skip]
    test_pooling, fit_pooling = Pooling(encoders), Pooling(encoders)
    for window in stream(test, trained.coder, config.window_mib, "evaluating"):
        for metric in metrics:
            metric.add(window)
        test_pooling.add(window)
    if fit is not None:
        for window in stream(fit, trained.coder, config.window_mib, "pooling clips to fit on"):
            fit_pooling.add(window)

    over_clips = ClipSetting(
        setting=test,
        config=config,
        sae=trained.coder,
        trained=trained,
        fit=pooled_split(fit.store, fit_pooling) if fit is not None else None,
        test=pooled_split(store, test_pooling),
        encoders={"sae": (trained.coder,), **encoders},
    )
    results = _clip_results(over_clips)

    measured = [result for result in results.values() if result is not None]
    columns = [column for metric in metrics for column in metric.latents()]
    columns += [column for result in measured for column in result.latents]
    training = training_section(config.run)
    evaluation = Evaluation(
        coverage=_coverage(test, config.split),
        config=config.model_dump(mode="json"),
        sae={"run": trained.folder.name, "latents": trained.coder.latents, "recipe": trained.recipe}
        | {"provenance": trained.provenance},
        store=_describe(store, trained.hook),
        software={**software(), "numpy": np.__version__, "device": device.type},
        sections=(
            *(metric.section() for metric in metrics),
            *(result.section for result in measured),
            *([training] if training is not None else ()),
        ),
        not_measured={topic: _reason(topic, over_clips) for topic, result in results.items() if result is None},
    )
    effects = tuple(effect for result in measured for effect in result.effects)
    return EvaluationResult(evaluation, latent_table(columns, trained.coder.latents), effects)


def stream(setting: Setting, sae: SparseCoder, window_mib: int, label: str = "evaluating") -> Iterator[Window]:
    """The clips of `setting` in windows of at most `window_mib` MiB, one clip at least; with progress."""
    clips_per_window = max(1, window_mib * 2**20 // clip_bytes(setting.store, setting.hook, sae.latents))
    with Progress(label, len(setting.clips), "clips") as progress:
        for window in windows(
            setting.store,
            setting.hook,
            sae,
            setting.clips,
            setting.time.valid_CT,
            clips_per_window=clips_per_window,
            device=setting.device,
        ):
            yield window
            progress.advance(len(window.clips))


def _fit_setting(config: EvaluateConfig, trained: TrainedSae, test: Setting) -> Setting | None:
    """Clips to fit probes and maps on, of other videos than those evaluated; None if there are none."""
    store = test.store
    if config.fit_store is not None:
        store = open_store(config.fit_store)
        check_store(trained, store, other_store=True)
        clips = _not_evaluated(store, choose_clips(store, "all", trained.holdout, config.fit_clips), test)
    elif config.split == "held_out":
        clips = choose_clips(store, "train", trained.holdout, config.fit_clips)
    else:
        return None
    return replace(test, store=store, clips=clips, time=latent_time(store, clips))


def _not_evaluated(store: Store, clips: NDArray[np.int64], setting: Setting) -> NDArray[np.int64]:
    """Those of `clips` whose videos are not among the evaluated ones.

    Raises:
        TubeletError: none is left.
    """
    videos = store.clips()["video_id"].to_numpy(zero_copy_only=False)
    evaluated = setting.store.clips()["video_id"].to_numpy(zero_copy_only=False)[setting.clips]
    apart = clips[~np.isin(videos[clips], np.unique(evaluated))]
    if not len(apart):
        raise TubeletError(
            f"Every clip of {store.url} to fit on shows a video that is evaluated",
            "Give another fit_store, or leave it out and evaluate the held-out split",
        )
    return apart


def _clip_results(clips: ClipSetting) -> dict[Topic, ClipResult | None]:
    """What each metric over clips measures; None: it lacks something."""
    config = clips.config
    measures: dict[Topic, Callable[[], ClipResult | None]] = {
        topic: partial(measure, clips) for topic, measure in CLIP_METRICS.items() if topic not in config.skip
    }
    in_backbone = {topic: measure for topic, measure in BACKBONE_METRICS.items() if topic not in config.skip}
    if config.in_backbone is not None and in_backbone:
        session = start_session(clips, config.in_backbone)
        measures |= {topic: partial(measure, clips, session) for topic, measure in in_backbone.items()}
    results: dict[Topic, ClipResult | None] = {}
    with Progress("measuring", len(measures), "topics") as progress:
        for topic, measure in measures.items():
            results[topic] = measure()
            progress.advance(text=f"{topic} done")
    return results


def _reason(topic: Topic, clips: ClipSetting) -> str:
    """Why `topic` was not measured."""
    if clips.fit is None and "fit" in NEEDS[topic]:
        return (
            f"there are no clips to fit on: split {clips.config.split} without fit_store keeps no videos for it. Give "
            "--fit_store, or evaluate --split held_out"
        )
    return NEEDS[topic]


def _coverage(setting: Setting, split: str) -> Coverage:
    ok = setting.store.ok()
    table = setting.store.clips()
    chosen = np.isin(table["clip"].to_numpy(), setting.clips)
    videos = np.asarray(table["video_id"].to_pylist(), dtype=object)[chosen]
    return Coverage(
        split=split,
        clips=len(setting.clips),
        videos=len(set(videos)),
        tokens=setting.tokens,
        clips_in_store=len(ok),
        failed_clips=int((~ok).sum()),
        clips_with_repeated_frames=int((~setting.time.valid_CT[setting.clips].all(axis=1)).sum()),
    )


def _describe(store: Store, hook: str) -> dict[str, JsonValue]:
    plan = store.plan
    return {
        "name": Path(store.url).name,
        "identity": store.identity,
        "plan_digest": plan.digest,
        "hook": hook,
        "channels": plan.hook(hook).channels,
        "grid": plan.grid.model_dump(mode="json"),
        "dtype": plan.dtype,
        "backbone": plan.backbone,
        "dataset": plan.dataset,
        "sampling": plan.sampling,
        "preprocessing": plan.preprocessing,
    }
