"""All SAEs of a run, and the step they take together from one batch.

batch ─▶ tokens of each hook, normalized once per normalization ─▶ StackedSAEs, StackedSAEs, ... ─▶ metrics per SAE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tubelet_trainer.data.batch import Batch
from tubelet_trainer.optim.cuda_graph import CapturedStack
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.optim.stacked import StackedSAEs
from tubelet_trainer.sae.normalization import Normalization

# Most bytes of the pre-activations of a stack. SAEs beyond that fill a GPU on their own.
_MAX_STACK_BYTES = 2**30


class SAEGroup:
    """SAEs that learn from the same batches.

    Args:
        sae_trainers: One for each SAE.
        hooks: Hook whose tokens each learns from.
        batch_tokens: Tokens of a full batch on this rank.
        compiled: Compile losses and gradients with `torch.compile`.
        captured: Replay steps as CUDA graphs.
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
        self.stacks = _stacked(sae_trainers, hooks, batch_tokens, compiled)
        self._compute = [CapturedStack(stack).compute if captured else stack.compute for stack in self.stacks]
        self._tokens_of = [next(i for i, other in enumerate(self.stacks) if _same(other, s)) for s in self.stacks]
        """Per stack the first one that sees the same normalized tokens."""

    def learn(self, batch: Batch, step: int) -> list[Mapping[str, Tensor]]:
        """Step number `step` (from 0); metrics of each SAE, in their order, on the device, with `grad_norm`.

        With `captured` the next step overwrites the metrics.
        """
        metrics: dict[int, Mapping[str, Tensor]] = {}
        normalized: list[Tensor] = []
        for stack, compute, source in zip(self.stacks, self._compute, self._tokens_of, strict=True):
            new = source == len(normalized)
            normalized.append(stack.saes[0].normalization(batch.hooks[stack.hook]) if new else normalized[source])
            stack.begin(step, batch)
            forwards, lines = compute(batch, normalized[source], step)
            stack.finish(forwards)
            metrics |= {id(sae_trainer): line for sae_trainer, line in zip(stack.sae_trainers, lines, strict=True)}
        return [metrics[id(sae_trainer)] for sae_trainer in self.sae_trainers]


def _stacked(
    sae_trainers: Sequence[SAETrainer], hooks: Sequence[str], batch_tokens: int, compiled: bool
) -> list[StackedSAEs]:
    """`sae_trainers`, each at its hook, in stacks, in the order of the first of each."""
    groups: list[tuple[list[SAETrainer], str]] = []
    for sae_trainer, hook in zip(sae_trainers, hooks, strict=True):
        for group, at in groups:
            size_bytes = (len(group) + 1) * batch_tokens * sae_trainer.sae.latents * 4
            if at == hook and size_bytes <= _MAX_STACK_BYTES and _stackable(group[0], sae_trainer):
                group.append(sae_trainer)
                break
        else:
            groups.append(([sae_trainer], hook))
    return [StackedSAEs(group, hook, compiled) for group, hook in groups]


def _stackable(one: SAETrainer, other: SAETrainer) -> bool:
    """Whether two SAEs can take their steps in one stack."""
    a, b = one.sae, other.sae
    return (
        a.sparsifier.stackable
        and b.sparsifier.stackable
        and a.step_shape == b.step_shape
        and a.W_enc.dtype == b.W_enc.dtype
        and one.precision == other.precision
        and _same_normalization(a.normalization, b.normalization)
    )


def _same(one: StackedSAEs, other: StackedSAEs) -> bool:
    return one.hook == other.hook and _same_normalization(one.saes[0].normalization, other.saes[0].normalization)


def _same_normalization(one: Normalization, other: Normalization) -> bool:
    """Whether two normalizations are the same map."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
