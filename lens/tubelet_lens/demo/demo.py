"""`tubelet demo`: the whole path on a data set that it renders, by the verbs and settings files a real job would use.

    videos ─▶ extract (train, validation) ─▶ train ─▶ evaluate ─▶ table, report

A step that an earlier run finished is not done again: that is how the verbs themselves behave.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import yaml

from tubelet_lens.config import DemoConfig
from tubelet.cli import main as cli
from tubelet_store.reader import open_store
from tubelet.errors import TubeletError
from tubelet.formats import human_bytes, styled
from tubelet_store.store_summary import summarize


def demo(config: DemoConfig) -> None:
    """Run every step below `config.out`, printing each command.

    Raises:
        TubeletError: a step failed.
    """
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    _step("Render and encode videos", "videos", str(out / "ssv2"), "--videos", str(config.videos))
    for split in ("train", "validation"):
        settings = {
            "dataset": {"kind": "ssv2", "root": str(out / "ssv2"), "split": split},
            # All of a video's 48 frames, every third.
            "sampling": {"kind": "dense", "frames": 16, "stride": 3},
            "backbone": {"id": "videomae-tiny"},
            "hooks": [_HOOK],
            "store": str(out / f"{split}.zarr"),
        }
        _step(f"Decode and extract: {split}", "extract", _settings_file(out, f"extract-{split}", settings))
    settings = {
        "store": str(out / "train.zarr"),
        "out": str(out / "run"),
        "hook": _HOOK,
        "epochs": config.epochs,
        "batch_tokens": 1024,
        "sae": {"kind": "topk", "expansion": 8, "k": 16},
    }
    _step("Train a sparse autoencoder", "train", _settings_file(out, "train", settings))
    report = out / "report"
    settings = {
        "run": str(out / "run"),
        "store": str(out / "validation.zarr"),
        "out": str(report),
        # No video of the validation store was trained on.
        "other_store": True,
        "split": "all",
        "fit_store": str(out / "train.zarr"),
        # The other ways of pooling take their time and tell nothing new here.
        "action": {"poolings": ["mean"]},
        "about": "A demonstration: the videos are rendered shapes that imitate Something-Something's templates, the "
        "backbone is a small model trained on such videos. The figures say nothing about other data or backbones.",
    }
    _step("Evaluate it", "evaluate", _settings_file(out, "evaluate", settings))
    print()
    summary = _summary(out)
    width = max(len(name) for name, _ in summary) + 2
    for name, text in summary:
        print(f"{name:<{width}}{text}")
    print(f"\nThe demo took {time.perf_counter() - began:.0f} s. Open {report / 'report.html'}")


_SHORT = {
    "reconstruction.fvu": "FVU",
    "coherence.lag1.sae": "autocorrelation",
    "coherence.drop": "  drop from raw",
    "sparsity.l0": "L0",
    "sparsity.dead_fraction": "dead latents",
    "action.top1.sae": "action probe, top-1",
    "ablation.m50.sae": "latents for half of it",
    "retrieval.text_to_video_r1.sae": "text to video, R@1",
}

# The last block but one: the last is closest to the pre-training's pixels.
_HOOK = "blocks.2"


def _summary(out: Path) -> list[tuple[str, str]]:
    stores = [summarize(open_store(str(out / f"{split}.zarr"))) for split in ("train", "validation")]
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(line["tokens_per_s"] for line in lines if line["kind"] == "train")
    evaluation = json.loads((out / "report" / "evaluation.json").read_text())
    by_name = {figure["name"]: figure for section in evaluation["sections"] for figure in section["figures"]}
    figures = [figure for figure in by_name.values() if figure["headline"]]
    return [
        ("clips decoded", f"{sum(s['clips']['ok'] for s in stores)}"),
        ("clips failed", f"{sum(s['clips']['failed'] for s in stores)}"),
        ("activations stored", human_bytes(sum(s["size_bytes"] for s in stores))),
        ("training speed", f"{speed:,.0f} tokens/s (median)"),
        *((_SHORT.get(figure["name"], figure["title"]), _text(figure, by_name)) for figure in figures),
    ]


def _text(figure: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> str:
    text = styled(figure["value"], figure["style"])
    if figure["name"] != "action.top1.sae":
        return text
    beside = {"raw": "raw", "untrained SAE": "untrained", "labels permuted": "permuted"}
    others = (
        f"{words} {styled(by_name[f'action.top1.{subject}']['value'], 'percent')}"
        for words, subject in beside.items()
    )
    return f"{text} ({', '.join(others)})"


def _settings_file(out: Path, name: str, settings: dict[str, Any]) -> str:
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def _step(title: str, *command: str) -> None:
    print(f"\n{title}\n$ tubelet {' '.join(command)}", flush=True)
    if status := cli.run(list(command)):
        raise TubeletError(f"`tubelet {' '.join(command)}` ended with status {status}", "See what it printed above")
