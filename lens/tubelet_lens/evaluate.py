"""One evaluation: stream the chosen clips once through every metric.

run folder ─▶ SAE ┐            ┌─▶ metrics over tokens ────────────────┐
store ─▶ clips ───┴─▶ windows ─┴─▶ pooled clips ─▶ metrics over clips ─┴─▶ evaluation.json, report.html, latents.parquet

Probes and maps are fitted on the side of the split that the SAE was trained on and measured on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import JsonValue
from rich.progress import Progress

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet.formats import styled
from tubelet.tables import Table, Tabular
from tubelet_lens.codes.sparse_codes import Encoder, SparseCoder
from tubelet_lens.config import EvaluateConfig, Topic
from tubelet_lens.inputs.clip_selection import choose_clips
from tubelet_lens.inputs.clip_stream import clip_bytes, windows
from tubelet_lens.inputs.control_encoders import controls
from tubelet_lens.inputs.latent_time import latent_time
from tubelet_lens.inputs.pooled_clips import PooledSplit, Pooling, pooled_split
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
from tubelet_lens.report.render import SUBJECTS, render_report
from tubelet_lens.results.evaluation import Coverage, Evaluation
from tubelet_lens.results.latent_table import LatentEffect, latent_table, write_effects, write_latents
from tubelet_lens.results.section import Subject
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
"""What is measured over clips, in the report's order."""

BACKBONE_METRICS: dict[Topic, Callable[[ClipSetting, BackboneSession], ClipResult | None]] = {
    "recovery": recovery,
    "backbone_ablation": backbone_ablation,
    "effects": latent_effects,
    "classification_edits": classification_edits,
    "segmentation_edits": segmentation_edits,
}
"""What is measured in the backbone itself, in the report's order; each gives None where it lacks what it needs."""


@dataclass(frozen=True, eq=False, repr=False)
class Result(Tabular):
    """What an evaluation found; shown as the table of its headline figures."""

    evaluation: Evaluation
    latent_columns: pa.Table
    """One row per latent, see `latent_table`."""
    effects: tuple[LatentEffect, ...] = ()
    """What edits of single latents do, where the backbone ran."""

    @property
    def latents(self) -> Table:
        """What each metric says of every single latent; undefined values are NaN."""
        columns = {name: self.latent_columns[name].to_numpy() for name in self.latent_columns.column_names}
        definitions = {
            field.name: (field.metadata or {}).get(b"definition", b"").decode() for field in self.latent_columns.schema
        }
        return Table(columns, title=f"{len(self.latent_columns):,} latents", definitions=definitions)

    def table(self) -> Table:
        """A row per headline figure: its value, interval, the same figure of controls, and what it counts."""
        rows, texts = [], []
        for section in self.evaluation.sections:
            for figure in section.figures:
                if not figure.headline:
                    continue
                same = [each for each in section.figures if each.title == figure.title and each is not figure]
                controls = ", ".join(f"{SUBJECTS[each.subject]} {styled(each.value, each.style)}" for each in same)
                rows.append(
                    (figure.title, figure.value, figure.low, figure.high, controls, figure.n, figure.n_of, figure.name)
                )
                texts.append([styled(value, figure.style) for value in (figure.value, figure.low, figure.high)])
        covered = self.evaluation.coverage
        return Table.of_rows(
            ("figure", "value", "low", "high", "controls", "n", "of", "name"),
            rows,
            title=f"{self.evaluation.sae['run']} on {self.evaluation.store['name']}: {covered.clips:,} clips of "
            f"{covered.videos:,} videos ({covered.split.replace('_', ' ')})",
            texts={name: [row[place] for row in texts] for place, name in enumerate(("value", "low", "high"))},
        )

    def write(self, out: Path) -> Path:
        """Write `evaluation.json`, `report.html`, `latents.parquet` and, where the backbone ran, `effects.parquet` into
        `out`; the report's path."""
        out.mkdir(parents=True, exist_ok=True)
        self.evaluation.write(out / "evaluation.json")
        write_latents(self.latent_columns, out)
        write_effects(self.effects, out)
        report = out / "report.html"
        report.write_text(render_report(self.evaluation))
        return report


def evaluate(config: EvaluateConfig) -> Result:
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
    setting = Setting(
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
    metrics = [make(setting) for topic, make in METRICS.items() if topic not in config.skip]
    to_fit = _clips_to_fit(config, trained, setting)
    standing_in: dict[Subject, tuple[Encoder, ...]] = {}
    if config.controls:
        where = to_fit or setting
        standing_in = controls(
            trained, where.store, where.clips, draws=config.control_draws, seed=config.seed, device=device
        )
    pooling = Pooling(standing_in)
    per_window = _clips_per_window(config, trained, store)
    stream(setting, trained.coder, [*metrics, pooling], clips_per_window=per_window)
    sections = [metric.section() for metric in metrics]
    columns = [column for metric in metrics for column in metric.latents()]
    effects: list[LatentEffect] = []
    over_clips = ClipSetting(
        setting=setting,
        config=config,
        sae=trained.coder,
        trained=trained,
        fit=_fit_side(config, trained, to_fit, standing_in) if to_fit is not None else None,
        test=pooled_split(store, pooling),
        encoders={"sae": (trained.coder,), **standing_in},
    )
    results = [measure(over_clips) for topic, measure in CLIP_METRICS.items() if topic not in config.skip]
    in_backbone = [measure for topic, measure in BACKBONE_METRICS.items() if topic not in config.skip]
    if config.in_backbone is not None and in_backbone:
        session = start_session(over_clips, config.in_backbone)
        results += [measure(over_clips, session) for measure in in_backbone]
    for result in results:
        if result is not None:
            sections.append(result.section)
            columns += result.latents
            effects += result.effects
    training = training_section(config.run)
    evaluation = Evaluation(
        coverage=_coverage(setting, config.split),
        config=config.model_dump(mode="json"),
        sae={"run": trained.folder.name, "latents": trained.coder.latents, "recipe": trained.recipe}
        | {"provenance": trained.provenance},
        store=_describe(store, trained.hook),
        software={**software(), "numpy": np.__version__, "device": device.type},
        sections=(*sections, training) if training is not None else tuple(sections),
    )
    return Result(evaluation, latent_table(columns, trained.coder.latents), tuple(effects))


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


def _clips_to_fit(config: EvaluateConfig, trained: TrainedSae, setting: Setting) -> Setting | None:
    """Clips to fit probes and maps on, apart by video from those evaluated; None if there are none."""
    store = setting.store
    if config.fit_store is not None:
        store = open_store(config.fit_store)
        check_store(trained, store, other_store=True)
        clips = _not_evaluated(store, choose_clips(store, "all", trained.holdout, config.fit_clips), setting)
    elif config.split == "held_out":
        clips = choose_clips(store, "train", trained.holdout, config.fit_clips)
    else:
        return None
    return replace(setting, store=store, clips=clips, time=latent_time(store, clips))


def _fit_side(
    config: EvaluateConfig, trained: TrainedSae, setting: Setting, standing_in: Mapping[Subject, Sequence[Encoder]]
) -> PooledSplit:
    pooling = Pooling(standing_in)
    per_window = _clips_per_window(config, trained, setting.store)
    stream(setting, trained.coder, [pooling], clips_per_window=per_window)
    return pooled_split(setting.store, pooling)


def _clips_per_window(config: EvaluateConfig, trained: TrainedSae, store: Store) -> int:
    return max(1, config.window_mib * 2**20 // clip_bytes(store, trained.hook, trained.coder.latents))


def stream(setting: Setting, sae: SparseCoder, takers: Sequence[Metric | Pooling], *, clips_per_window: int) -> None:
    """Stream `setting.clips` once through all `takers`, `clips_per_window` at a time."""
    passing = windows(
        setting.store,
        setting.hook,
        sae,
        setting.clips,
        setting.time.valid_CT,
        clips_per_window=clips_per_window,
        device=setting.device,
    )
    with Progress(transient=True) as progress:
        task = progress.add_task("Evaluating clips", total=len(setting.clips))
        for window in passing:
            for taker in takers:
                taker.add(window)
            progress.advance(task, len(window.clips))


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
