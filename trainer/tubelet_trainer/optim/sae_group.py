"""All SAEs of a run, and the batch they learn from: each batch is normalised once for all that want it the same way.

batch ─▶ tokens of each hook, normalised ─▶ Cohort, Cohort, ... ─▶ metrics of each SAE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tubelet_trainer.data.batch import Batch
from tubelet_trainer.optim.cuda_graph import CapturedCohort
from tubelet_trainer.optim.sae_trainer import Learner
from tubelet_trainer.optim.stacked import Cohort, cohorts, same_normalisation


class Team:
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
        learners: Sequence[Learner],
        hooks: Sequence[str],
        batch_tokens: int,
        compiled: bool = False,
        captured: bool = False,
    ) -> None:
        self.learners = tuple(learners)
        self.cohorts = cohorts(learners, hooks, batch_tokens, compiled)
        self._learn = [CapturedCohort(cohort).learn if captured else cohort.learn for cohort in self.cohorts]
        self._prepared_by = [next(i for i, other in enumerate(self.cohorts) if _same(other, c)) for c in self.cohorts]

    def learn(self, batch: Batch, step: int) -> list[Mapping[str, Tensor]]:
        """Step number `step` (from 0); metrics of each SAE, in their order, on the device, with `grad_norm`."""
        found: dict[int, Mapping[str, Tensor]] = {}
        prepared: list[Tensor] = []
        for cohort, learn, by in zip(self.cohorts, self._learn, self._prepared_by, strict=True):
            new = by == len(prepared)
            prepared.append(cohort.saes[0].normalisation(batch.hooks[cohort.hook]) if new else prepared[by])
            metrics = learn(batch, prepared[by], step)
            found |= {id(learner): line for learner, line in zip(cohort.learners, metrics, strict=True)}
        return [found[id(learner)] for learner in self.learners]


def _same(one: Cohort, other: Cohort) -> bool:
    return one.hook == other.hook and same_normalisation(one.saes[0].normalisation, other.saes[0].normalisation)
