"""Evaluation of trained SAEs: metrics with their null models, one JSON file, one HTML report.

    report = tubelet.evaluate(run="runs/a", store="demo/train.zarr")
    report.evaluation.figure("reconstruction.fvu").value
    report.latents                                   # one row per latent

A metric is one file (see `metrics.metric`). Nothing is imported here: the command line lists the verbs quickly.
"""
