"""The lens's verbs: `tubelet evaluate`, `edit`, `gallery`, `study`, `demo`. Heavy imports wait until a verb runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_lens.config import EvaluateConfig
    from tubelet_lens.demo.demo import DemoConfig
    from tubelet_lens.gallery.config import GalleryConfig
    from tubelet_lens.steering.config import EditConfig
    from tubelet_lens.steering.edit_report import ClipEffect
    from tubelet_lens.study.config import StudyConfig

_CLASSES_PRINTED = 3


def _evaluate_config() -> type[EvaluateConfig]:
    from tubelet_lens.config import EvaluateConfig

    return EvaluateConfig


def _evaluate(config: EvaluateConfig) -> int:
    from tubelet_lens.evaluate import evaluate

    result = evaluate(config)
    report = result.write(config.report_folder)
    for line in result.lines():
        print(line)
    print(report)
    return 0


EVALUATE = Verb(
    "evaluate",
    "Measure a trained SAE on a store: one JSON file, one HTML report.",
    _evaluate_config,
    _evaluate,
    positionals=("run", "store"),
)


def _edit_config() -> type[EditConfig]:
    from tubelet_lens.steering.config import EditConfig

    return EditConfig


def _edit(config: EditConfig) -> int:
    from tubelet_lens.steering.edit import edit

    report = edit(config)
    for clip in report.clips:
        print("\n".join(_edit_lines(clip)))
    print(report.write(config.report_folder))
    return 0


def _edit_lines(clip: ClipEffect) -> list[str]:
    from tubelet.formats import UNDEFINED, number

    changed = f"{clip.changed_tokens:,} of {clip.tokens:,} tokens changed"
    lines = [f"{clip.name}: {changed}, on average by {clip.step:.1%} of their norm"]
    if clip.top_before is not None:
        lines.append(f"  most probable class: {clip.top_before} -> {clip.top_after}")
    rows = [("logit of " + each.name, each.logit_change) for each in clip.classes[:_CLASSES_PRINTED]]
    rows += [("change at " + each.hook, each.change) for each in clip.hooks]
    width = max(len(name) for name, _ in rows)
    lines.append(f"  {'':<{width}}{'edit':>12}{'matched latents':>30}{'random directions':>30}")
    for name, compared in rows:
        controls = (
            UNDEFINED if each is None else f"{number(each.mean)} ({number(each.low)} … {number(each.high)})"
            for each in (compared.matched, compared.random)
        )
        lines.append(f"  {name:<{width}}{number(compared.edit):>12}" + "".join(f"{text:>30}" for text in controls))
    draws = rows[0][1].random
    lines.append(f"  controls: mean (lowest … highest) of {draws.draws} draws" if draws is not None else "")
    if any(compared.matched is None for _, compared in rows):
        lines.append(f"  {UNDEFINED}: no other latent is active in this part of the clip")
    return [line for line in lines if line]


EDIT = Verb(
    "edit",
    "Edit SAE latents while the backbone runs on some clips, and report what changes.",
    _edit_config,
    _edit,
    positionals=("run", "store", "videos..."),
)


def _gallery_config() -> type[GalleryConfig]:
    from tubelet_lens.gallery.config import GalleryConfig

    return GalleryConfig


def _gallery(config: GalleryConfig) -> int:
    from tubelet_lens.gallery.make_gallery import make_gallery

    made = make_gallery(config)
    print(f"{made.pages:,} latents, {made.clips:,} clips, {made.size_bytes / 2**20:.1f} MiB written")
    if made.no_evaluation:
        print(
            f"No evaluation in {config.run / 'evaluation'}: its figures of each latent are missing. Run `tubelet "
            f"evaluate {config.run} STORE` first, or give the evaluation's folder as --evaluation.",
            file=sys.stderr,
        )
    if made.silent:
        print(f"{made.silent:,} latents do not fire on any of these clips and have no page")
    if made.no_picture:
        print(f"{made.no_picture:,} clips are shown as heat-maps only, without frames: {made.reason}")
    print(made.address)
    return 0


GALLERY = Verb(
    "gallery",
    "Write a static site that shows what each latent fires on.",
    _gallery_config,
    _gallery,
    positionals=("run", "store"),
)


def _study_config() -> type[StudyConfig]:
    from tubelet_lens.study.config import StudyConfig

    return StudyConfig


def _study(config: StudyConfig) -> int:
    from tubelet_lens.study.run_study import study

    summary = study(config)
    done = summary.cells - len(summary.failures)
    print(f"{done} of {summary.cells} cells done ({summary.done_before} before), {len(summary.failures)} failed")
    for name, reason in summary.failures.items():
        print(f"  {name}: {reason}")
    if summary.page is not None:
        print(summary.page)
    return 1 if summary.failures else 0


STUDY = Verb(
    "study",
    "Train and evaluate a grid of SAEs over existing stores; write tables and plots.",
    _study_config,
    _study,
)


def _demo_config() -> type[DemoConfig]:
    from tubelet_lens.demo.demo import DemoConfig

    return DemoConfig


def _demo(config: DemoConfig) -> int:
    from tubelet_lens.demo.demo import demo

    demo(config)
    return 0


DEMO = Verb(
    "demo",
    "Run the whole path in minutes: render videos, extract, train, evaluate, gallery.",
    _demo_config,
    _demo,
)
