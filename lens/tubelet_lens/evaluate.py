"""One evaluation: stream the chosen clips once through every metric.

run folder ─▶ SAE ┐
store ─▶ clips ───┴─▶ windows ─▶ metrics ─▶ Evaluation ─▶ evaluation.json, report.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import JsonValue
from rich.progress import Progress

from tubelet_lens.codes import SparseCoder
from tubelet_lens.coherence import Coherence
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.evaluation import Coverage, Evaluation
from tubelet_lens.metric import Metric, Setting
from tubelet_lens.reconstruction import Reconstruction
from tubelet_lens.report import render_report
from tubelet_lens.section import Section
from tubelet_lens.selection import choose_clips
from tubelet_lens.sparsity import Sparsity
from tubelet_lens.subject import check_store, load_trained
from tubelet_lens.timing import latent_time
from tubelet_lens.training import training_section
from tubelet_lens.windows import clip_bytes, windows
from tubelet_store import Store, open_store
from tubelet_trainer.machine import choose_device, software

METRICS: tuple[Callable[[Setting], Metric], ...] = (Reconstruction, Coherence, Sparsity)
"""What is measured, in the report's order."""


def evaluate(config: EvaluateConfig) -> Evaluation:
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
    per_window = max(1, config.window_mib * 2**20 // clip_bytes(store, trained.hook, trained.coder.latents))
    sections = measure(setting, trained.coder, clips_per_window=per_window)
    training = training_section(config.run)
    return Evaluation(
        coverage=_coverage(setting, config.split),
        config=config.model_dump(mode="json"),
        sae={"run": trained.folder.name, "latents": trained.coder.latents, "recipe": trained.recipe}
        | {"provenance": trained.provenance},
        store=_describe(store, trained.hook),
        software={**software(), "numpy": np.__version__, "device": device.type},
        sections=(*sections, training) if training is not None else sections,
    )


def measure(setting: Setting, sae: SparseCoder, *, clips_per_window: int) -> tuple[Section, ...]:
    """Stream `setting.clips` through every metric, `clips_per_window` at a time."""
    metrics = [make(setting) for make in METRICS]
    stream = windows(
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
        for window in stream:
            for metric in metrics:
                metric.add(window)
            progress.advance(task, len(window.clips))
    return tuple(metric.section() for metric in metrics)


def write_evaluation(evaluation: Evaluation, out: Path) -> Path:
    """Write `evaluation.json` and `report.html` into `out`; the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    evaluation.write(out / "evaluation.json")
    report = out / "report.html"
    report.write_text(render_report(evaluation))
    return report


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
