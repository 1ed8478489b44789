"""The lens's verbs: `tubelet evaluate`, `tubelet demo`."""

from __future__ import annotations

from tubelet_lens.config import DemoConfig, EvaluateConfig
from tubelet_store.cli import Verb


def _run(config: EvaluateConfig) -> int:
    from tubelet_lens.evaluate import evaluate
    from tubelet_lens.section import readable

    result = evaluate(config)
    report = result.write(config.out if config.out is not None else config.run / "evaluation")
    for figure in result.evaluation.figures():
        if figure.headline:
            print(f"{figure.title}: {readable(figure.value, figure.style)}")
    print(report)
    return 0


EVALUATE = Verb(
    "evaluate",
    "Measure a trained SAE on a store: one JSON file, one HTML report.",
    lambda: EvaluateConfig,
    _run,
    positionals=("run", "store"),
)


def _demo(config: DemoConfig) -> int:
    from tubelet_lens.demo import demo

    demo(config)
    return 0


DEMO = Verb(
    "demo",
    "Render videos, extract, train, evaluate: the whole path in minutes.",
    lambda: DemoConfig,
    _demo,
)
