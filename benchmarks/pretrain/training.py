"""What the trainings share: command line, optimizer, learning rate, loss curve, and the checkpoint they write."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pretrain.corpus import SIDE, open_corpus
from tubelet_pipeline.backbones import BackboneConfig, load_backbone
from tubelet_pipeline.backbones.pretrained import quiet_transformers
from tubelet_pipeline.backbones.tiny import write_processor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Arguments:
    """The settings of a training."""

    out: Path
    """Folder of the checkpoint."""
    corpus: Path | None
    """File in which the rendered videos are kept between runs."""

    def open_corpus(self, videos: int) -> NDArray[np.uint8]:
        """Frames of the videos, as `corpus.open_corpus` gives them."""
        return open_corpus(videos, self.corpus)


def parse_arguments(description: str | None) -> Arguments:
    """The command line's, for a training on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--corpus", type=Path, help="file (.npy) in which the rendered videos are kept between runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return Arguments(arguments.out, arguments.corpus)


POINTS = 50
"""Of the recorded curve."""


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as for masked autoencoders (beta2 = 0.95); biases, norms and single vectors do not decay."""
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def learning_rate(peak: float, step: int, warmup: int, steps: int) -> float:
    """A linear rise to `peak`, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def descend(optimizer: torch.optim.Optimizer, model: nn.Module, loss: torch.Tensor, rate: float) -> None:
    """One step at learning rate `rate`, the gradient's norm clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@dataclass
class Curve:
    """Losses averaged over each of `POINTS` stretches of the training, printed as they come."""

    steps: int
    points: list[dict[str, float]] = field(default_factory=list)
    _sums: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.perf_counter)

    def add(self, step: int, losses: Mapping[str, torch.Tensor]) -> None:
        """Count the losses of `step`, 0-based."""
        every = max(1, self.steps // POINTS)
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.item() / every
        if (step + 1) % every == 0:
            self.points.append({"step": step + 1, **{name: round(total, 4) for name, total in self._sums.items()}})
            self._sums.clear()
            print(f"{time.perf_counter() - self._began:6.0f} s  {self.points[-1]}", flush=True)


REPORT_FILE = "training.json"


@dataclass
class Clock:
    """Wall-clock and CPU minutes since it was made."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def minutes(self) -> dict[str, float]:
        """What has passed."""
        wall_s, cpu_s = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"minutes": round(wall_s / 60, 1), "cpu_minutes": round(cpu_s / 60, 1)}


def write_checkpoint(
    folder: Path, encoder: Any, processor: str, recipe: DataclassInstance, clock: Clock, curve: list[dict[str, float]]
) -> None:
    """Write `encoder` in half precision in transformers' layout, its processor file, and `REPORT_FILE`."""
    with quiet_transformers():
        encoder.half().save_pretrained(folder)
    write_processor(folder, processor, shortest_edge=SIDE, crop=SIDE, resample=2)
    backbone = load_backbone(BackboneConfig(id=str(folder), device="cpu"))
    report = {
        "recipe": asdict(recipe),
        "threads": 1,
        **clock.minutes(),
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numpy")},
        "weights_digest": backbone.weights_digest,
        "curve": curve,
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
