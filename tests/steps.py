"""Steps of a single SAE on given tokens, as a run takes them."""

import torch

from tubelet_store.plan import Grid
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.optim.stacked import Cohort

GRID = Grid(time=1, height=1, width=1)


def take_step(learner, x, step):
    """Step number `step` of `learner` on raw tokens `x`; its metrics."""
    (metrics,) = Cohort([learner], "h").learn(*seen(learner, x), step)
    return metrics


def see(learner, x, step):
    """How `learner` sees raw tokens `x` in step number `step`, which is not taken."""
    cohort, (batch, normalised) = Cohort([learner], "h"), seen(learner, x)
    cohort.begin(step, batch)
    ((forward,), _) = cohort.losses(batch, normalised)
    return forward


def seen(learner, x):
    """`x` as a batch, and normalised."""
    return Batch({"h": x}, torch.arange(len(x)), GRID, len(x)), learner.sae.normalisation(x)
