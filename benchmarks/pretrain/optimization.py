"""What both trainings share: the optimizer, the learning rate's course, the record of the losses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

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
