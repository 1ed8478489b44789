"""Steps of a single SAE on given tokens, as a run takes them."""

import torch

from tubelet_store.plan import Grid
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.optim.stacked import StackedSAEs

GRID = Grid(time=1, height=1, width=1)


def take_step(sae_trainer, x, step):
    """Step number `step` of `sae_trainer` on raw tokens `x`; its metrics."""
    batch, _ = seen(sae_trainer, x)
    (metrics,) = SAEGroup([sae_trainer], ["h"], len(batch)).learn(batch, step)
    return metrics


def see(sae_trainer, x, step):
    """How `sae_trainer` sees raw tokens `x` in step number `step`, which is not taken."""
    stacked, (batch, normalized) = StackedSAEs([sae_trainer], "h"), seen(sae_trainer, x)
    stacked.begin(step, batch)
    ((forward,), _) = stacked.losses(batch, normalized)
    return forward


def seen(sae_trainer, x):
    """`x` as a batch, and normalized."""
    return Batch({"h": x}, torch.arange(len(x)), GRID, len(x)), sae_trainer.sae.normalization(x)
