"""`tubelet demo`: the whole path on a rendered data set, with the verbs and settings files that a real job uses.

    videos ─▶ extract (train, validation) ─▶ train ─▶ evaluate ─▶ gallery ─▶ table of figures

A step that an earlier run finished is not repeated: the verbs themselves work that way.
"""

from __future__ import annotations

import json
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from tubelet.cli import main as cli
from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet.formats import human_bytes, styled
from tubelet_store.reader import open_store
from tubelet_store.store_summary import summarize

HOOK = "blocks.2"
"""The last block but one: the last is closest to the pixels of pre-training."""

_INTRODUCTION = (
    "This demo renders {videos} short videos of moving shapes, stores the activations of a tiny video backbone on them, "
    "trains a sparse autoencoder (SAE) on these activations, measures it on held-out videos, and writes a gallery that "
    "shows what its latents fire on. It needs no network and no GPU, and takes a few minutes on two CPU cores. "
    "Everything is written to {out}; a second run skips what is done."
)

_COLUMNS = {"SAE": "sae", "raw": "raw", "untrained SAE": "untrained"}
_FIGURES = {
    "reconstruction.fvu": "FVU",
    "sparsity.l0": "L0",
    "sparsity.dead_fraction": "dead latents",
    "coherence.lag1.sae": "temporal coherence",
    "action.top1.sae": "action probe, top-1",
    "retrieval.text_to_video_r1.sae": "text to video, R@1",
    "ablation.m50.sae": "latents for half",
}
_READING = {
    "FVU": "Share of the variance of the activations that the reconstruction misses. 0: exact; 1: no better than the "
    "mean.",
    "L0": "Latents that are active on a token. The SAE was trained to use 16.",
    "dead latents": "Share of latents that fire on no held-out token.",
    "temporal coherence": "Correlation of a patch's code with the code one time step later, next to that of the raw "
    "activations. A code that changes faster than the activations it explains splits lasting content into short-lived "
    "latents.",
    "action probe, top-1": "Accuracy of a linear classifier of the action on a clip's mean code. Compare with raw and "
    "with the untrained SAE: an untrained SAE often probes about as well as a trained one, because a wide vector helps "
    "a linear probe by itself. A high accuracy alone does not show that training found anything.",
    "text to video, R@1": "How often the right clip ranks first when searched for by its caption.",
    "latents for half": "How many latents, most important first, must be removed from the code before the probe loses "
    "half of its accuracy above chance. Few: the classes depend on single latents.",
}


class DemoConfig(Config):
    """Size of the demo."""

    out: Path = Path("demo")
    """Folder for videos, stores, run, report and gallery."""
    videos: int = Field(default=320, ge=32)
    """Videos to render; three tenths of them are held out for evaluation."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the training activations."""


def demo(config: DemoConfig) -> None:
    """Run every step in `config.out`, printing each command.

    Raises:
        TubeletError: a step failed.
    """
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    run, train, validation = out / "run", out / "train.zarr", out / "validation.zarr"
    print(textwrap.fill(_INTRODUCTION.format(videos=config.videos, out=out), 100))
    _step("1/6 Render and encode the videos", "videos", str(out / "ssv2"), "--videos", str(config.videos))
    for number, store in ((2, train), (3, validation)):
        settings = {
            "dataset": {"kind": "ssv2", "root": str(out / "ssv2"), "split": store.stem},
            # All of a video's 48 frames, every third.
            "sampling": {"kind": "dense", "frames": 16, "stride": 3},
            "backbone": {"id": "videomae-tiny"},
            "hooks": [HOOK],
            "store": str(store),
        }
        title = f"{number}/6 Decode and extract the {store.stem} videos"
        _step(title, "extract", _settings_file(out, f"extract-{store.stem}", settings))
    settings = {
        "store": str(train),
        "out": str(run),
        "hook": HOOK,
        "epochs": config.epochs,
        "batch_tokens": 1024,
        "sae": {"kind": "topk", "expansion": 8, "k": 16},
    }
    _step("4/6 Train a sparse autoencoder", "train", _settings_file(out, "train", settings))
    # No video of the validation store was trained on.
    unseen = {"run": str(run), "store": str(validation), "other_store": True, "split": "all"}
    settings = {
        **unseen,
        "fit_store": str(train),
        # Other poolings take time and show nothing new here.
        "action": {"poolings": ["mean"]},
        "about": "A demonstration: the videos are rendered shapes that imitate Something-Something's templates, the "
        "backbone is a small model trained on such videos. The figures say nothing about other data or backbones.",
    }
    _step("5/6 Evaluate it on the validation videos", "evaluate", _settings_file(out, "evaluate", settings))
    gallery = out / "gallery"
    settings = {**unseen, "out": str(gallery), "top_clips": 6, "lower_clips": 2}
    _step("6/6 Show what each latent fires on", "gallery", _settings_file(out, "gallery", settings))
    print()
    _print_figures(json.loads((run / "evaluation" / "evaluation.json").read_text()), (train, validation), run)
    print(f"\nThe demo took {time.perf_counter() - began:.0f} s.")
    print(f"Report:  {run / 'evaluation' / 'report.html'}")
    print(f"Gallery: {gallery / 'index.html'}")


def _print_figures(evaluation: dict[str, Any], stores: tuple[Path, ...], run: Path) -> None:
    by_name = {figure["name"]: figure for section in evaluation["sections"] for figure in section["figures"]}
    shown = {title: name for name, title in _FIGURES.items() if name in by_name}
    width = max(len(title) for title in shown) + 2
    print(" " * width + "".join(f"{column:<16}" for column in _COLUMNS).rstrip())
    for title, name in shown.items():
        cells = []
        for subject in _COLUMNS.values():
            figure = by_name.get(name.removesuffix(".sae") + f".{subject}") if name.endswith(".sae") else None
            figure = by_name[name] if subject == "sae" else figure
            cells.append("" if figure is None else styled(figure["value"], figure["style"]))
        print(f"{title:<{width}}" + "".join(f"{cell:<16}" for cell in cells).rstrip())
    print("\nHow to read the figures:")
    for title in shown:
        print(textwrap.fill(f"{title}: {_READING[title]}", 100, initial_indent="  ", subsequent_indent="    "))
    summaries = [summarize(open_store(str(store))) for store in stores]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["tokens_per_s"] for line in lines if line["kind"] == "train")
    clips, failed = (sum(summary["clips"][state] for summary in summaries) for state in ("ok", "failed"))
    stored = human_bytes(sum(summary["size_bytes"] for summary in summaries))
    print(f"\n{clips} clips stored ({stored}), {failed} failed; trained at {speed:,.0f} tokens/s (median).")


def _settings_file(out: Path, name: str, settings: dict[str, Any]) -> str:
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def _step(title: str, *command: str) -> None:
    print(f"\n{title}\n$ tubelet {' '.join(command)}", flush=True)
    if status := cli.run(list(command)):
        raise TubeletError(f"`tubelet {' '.join(command)}` ended with status {status}", "See its output above")
