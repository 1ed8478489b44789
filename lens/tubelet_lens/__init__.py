"""What looks at a trained SAE: metrics with nulls beside them, one JSON file, one HTML report.

    from tubelet_lens.evaluate import evaluate
    result = evaluate(EvaluateConfig(run="runs/a", store="demo/videomae.zarr"))
    result.evaluation.figure("reconstruction.fvu").value
    result.latents                                   # one row per latent

A metric is one file (see `metric`). Nothing heavy is imported here: the command line reads
configurations without torch.
"""

from tubelet_lens.config import EvaluateConfig
from tubelet_lens.results.evaluation import Evaluation, read_evaluation

__all__ = ["EvaluateConfig", "Evaluation", "read_evaluation"]
