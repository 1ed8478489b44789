"""All SAEs of a run, and the batch they learn from: each batch is normalized once for all that want it the same way.

batch ─▶ tokens of each hook, normalized ─▶ Cohort, Cohort, ... ─▶ metrics of each SAE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tubelet_trainer.data.batch import Batch
from tubelet_trainer.optim.cuda_graph import CapturedStack
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.optim.stacked import StackedSAEs, same_normalization, stacks


class SAEGroup:
    """SAEs that see the same batches.

    Args:
        learners: One for each.
        hooks: Whose tokens each learns.
        batch_tokens: Of a whole batch, on this rank.
        compiled: Compile losses and gradients.
        captured: Repeat steps as CUDA graphs.
    """

    def __init__(
        self,
        sae_trainers: Sequence[SAETrainer],
        hooks: Sequence[str],
        batch_tokens: int,
        compiled: bool = False,
        captured: bool = False,
    ) -> None:
        self.sae_trainers = tuple(sae_trainers)
        self.stacks = stacks(sae_trainers, hooks, batch_tokens, compiled)
        self._learn = [CapturedStack(stacked).learn if captured else stacked.learn for stacked in self.stacks]
        self._prepared_by = [next(i for i, other in enumerate(self.stacks) if _same(other, c)) for c in self.stacks]

    def learn(self, batch: Batch, step: int) -> list[Mapping[str, Tensor]]:
        """Step number `step` (from 0); metrics of each SAE, in their order, on the device, with `grad_norm`."""
        found: dict[int, Mapping[str, Tensor]] = {}
        prepared: list[Tensor] = []
        for stacked, learn, by in zip(self.stacks, self._learn, self._prepared_by, strict=True):
            new = by == len(prepared)
            prepared.append(stacked.saes[0].normalization(batch.hooks[stacked.hook]) if new else prepared[by])
            metrics = learn(batch, prepared[by], step)
            found |= {id(sae_trainer): line for sae_trainer, line in zip(stacked.sae_trainers, metrics, strict=True)}
        return [found[id(sae_trainer)] for sae_trainer in self.sae_trainers]


def _same(one: StackedSAEs, other: StackedSAEs) -> bool:
    return one.hook == other.hook and same_normalization(one.saes[0].normalization, other.saes[0].normalization)
