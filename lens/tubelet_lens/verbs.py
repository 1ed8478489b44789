"""The lens's verbs: `tubelet evaluate`."""

from __future__ import annotations

from tubelet_lens.config import EvaluateConfig
from tubelet_store.cli import Verb


def _run(config: EvaluateConfig) -> int:
    from tubelet_lens.evaluate import evaluate, write_evaluation

    evaluation = evaluate(config)
    report = write_evaluation(evaluation, config.out if config.out is not None else config.run / "evaluation")
    for figure in evaluation.figures():
        if figure.headline:
            value = "undefined" if figure.value is None else f"{figure.value:.4g}"
            print(f"{figure.title}: {value}")
    print(report)
    return 0


EVALUATE = Verb(
    "evaluate",
    "Measure a trained SAE on a store: one JSON file, one HTML report.",
    lambda: EvaluateConfig,
    _run,
    positionals=("run", "store"),
)
