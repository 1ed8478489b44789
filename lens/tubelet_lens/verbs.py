"""The lens's verbs: `tubelet evaluate`, `study`, `demo`. Heavy imports wait until a verb runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_lens.config import DemoConfig, EvaluateConfig
    from tubelet_lens.study.config import StudyConfig


def _evaluate_config() -> type[EvaluateConfig]:
    from tubelet_lens.config import EvaluateConfig

    return EvaluateConfig


def _run(config: EvaluateConfig) -> int:
    from tubelet.formats import styled
    from tubelet_lens.evaluate import evaluate

    result = evaluate(config)
    report = result.write(config.report_folder)
    for figure in result.evaluation.figures():
        if figure.headline:
            print(f"{figure.title}: {styled(figure.value, figure.style)}")
    print(report)
    return 0


EVALUATE = Verb(
    "evaluate",
    "Measure a trained SAE on a store: one JSON file, one HTML report.",
    _evaluate_config,
    _run,
    positionals=("run", "store"),
)


def _demo_config() -> type[DemoConfig]:
    from tubelet_lens.config import DemoConfig

    return DemoConfig


def _demo(config: DemoConfig) -> int:
    from tubelet_lens.demo.demo import demo

    demo(config)
    return 0


DEMO = Verb(
    "demo",
    "Render videos, extract, train, evaluate: the whole path in minutes.",
    _demo_config,
    _demo,
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
    "Train and evaluate a grid of SAEs over existing stores: tables, plots.",
    _study_config,
    _study,
)
