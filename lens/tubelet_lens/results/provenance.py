"""Where an evaluation's figures come from, in words: what a reader of the report asks first."""

from __future__ import annotations

from typing import Any

from tubelet_lens.results.evaluation import Evaluation


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what, words) rows; everything else is among the settings."""
    store: dict[str, Any] = evaluation.store
    sae: dict[str, Any] = evaluation.sae
    recipe, trained, grid = sae["recipe"], sae["provenance"], store["grid"]
    backbone, sampling = store["backbone"], store["sampling"]
    cover = evaluation.coverage
    k = f", k = {recipe['k']}" if "k" in recipe else ""
    metrics = trained.get("metrics") or {}
    rows = [
        (
            "Videos",
            f"{_named(store['dataset'])}: {cover.clips:,} clips of {cover.videos:,} videos in store {store['name']}",
        ),
        ("Frames", _sampling(sampling)),
        (
            "Backbone",
            f"{backbone.get('id', 'unknown')} ({backbone.get('architecture', backbone.get('family', 'unknown'))}), "
            f"read at {store['hook']}: {store['channels']:,} channels, {grid['time']} steps of {grid['height']} x "
            f"{grid['width']} patches, kept as {store['dtype']}",
        ),
        (
            "SAE",
            f"{recipe.get('kind', 'unknown')} with {sae['latents']:,} latents{k}, nesting {recipe['nesting']['kind']}, "
            f"from the run in {sae['run']}",
        ),
        (
            "Trained on",
            f"{trained.get('tokens', 0):,} tokens of store {trained.get('store', 'unknown')} "
            f"({_named(trained.get('dataset', {}))}), seed {recipe['seed']}",
        ),
    ]
    if "dead" in metrics and "tokens" in metrics:
        rows.append(
            (
                "At its end",
                f"FVU {metrics['fvu']:.3g} and {metrics['dead']:.1%} dead latents over {metrics['tokens']:,} held-out "
                f"tokens. The {cover.tokens:,} tokens evaluated here are others: a latent that was silent on the few "
                "may fire on the many.",
            )
        )
    if fit := evaluation.config.get("fit_store"):
        rows.append(("Probes fitted on", f"store {str(fit).rstrip('/').rsplit('/', 1)[-1]}"))
    elif evaluation.config.get("split") == "held_out":
        rows.append(("Probes fitted on", "the videos of the same store that the SAE was trained on"))
    versions = ("tubelet", "torch", "numpy", "python")
    rows.append(
        (
            "Software",
            ", ".join(f"{name} {evaluation.software[name]}" for name in versions if name in evaluation.software),
        )
    )
    return rows


def _named(dataset: dict[str, Any]) -> str:
    words = [str(dataset[name]) for name in ("name", "kind", "split") if dataset.get(name)]
    return ", ".join(words) if words else "unknown data set"


def _sampling(sampling: dict[str, Any]) -> str:
    frames, stride = sampling.get("frames"), sampling.get("stride")
    every = f", every {stride}th" if stride and stride > 1 else ", one after the other" if stride == 1 else ""
    return f"{frames} frames per clip ({sampling.get('kind', 'unknown')}{every})"
