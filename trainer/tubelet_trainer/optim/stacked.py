"""Several SAEs in one step: one encoder product, one choice and one decoding for all of them, one backward pass.

    tokens, normalized once ─▶ pre-activations [S N, F] ─▶ one choice, one decoding of S N tokens ─▶ S Forwards
    W_enc, W_dec of all S SAEs are in one array [S F, D]                                    each its own terms

S SAEs of the same shape are one SAE with S F latents and S N tokens, in which a token sees its own F latents only. So a
step launches as many kernels for S SAEs as for one, which matters on a GPU that one SAE is too small to fill. On a CPU
each SAE gets the same bits as when it is trained alone: every row is the same sum in the same order. That includes the
batched encoder product: its bits equaled those of single products in nine shapes out of nine (S 3 to 16, B 61 to 1024,
F 96 to 1536, D 16 to 768, one thread), in 0.88 to 0.98 of their time at full size and 0.3 to 0.6 of it for the
smallest. Each SAE has its own optimizer step: one fused call for all gives the same bits, but the clipping factor
differs between SAEs, so gradients would be divided in a pass of their own: 1.12 to 1.18 of the time (4 and 8 SAEs of
1536 x 768, one thread).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tubelet_trainer.data.batch import Batch
from tubelet_trainer.losses.objective import Forward, Term
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.sparse_ops import Bags, decode, largest, pays_dense, select
from tubelet_trainer.sae.sparsifiers import BatchTopK, Choice

# Beyond it a function is no longer compiled; torch's own limit is 8.
_RECOMPILE_LIMIT = 256


class StackedSAEs:
    """SAEs with one shape, one hook and one normalization.

    Args:
        sae_trainers: The SAEs. The weights of several are moved into one array.
        hook: Hook whose tokens they learn from.
        compiled: Compile the losses and their gradients with `torch.compile`.
    """

    def __init__(self, sae_trainers: Sequence[SAETrainer], hook: str, compiled: bool = False) -> None:
        self.sae_trainers, self.hook = tuple(sae_trainers), hook
        self.saes = [sae_trainer.sae for sae_trainer in sae_trainers]
        self._encoders, self._decoders = (_together(self.saes, name) for name in ("W_enc", "W_dec"))
        self._losses = self.losses
        if compiled:
            # Each stack, each k while it is annealed and each width of AuxK is compiled separately.
            torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
            self._losses = torch.compile(self.losses, dynamic=False)

    def begin(self, step: int, batch: Batch) -> None:
        """Set what step `step` changes."""
        for sae_trainer in self.sae_trainers:
            sae_trainer.begin(step, batch.whole)

    def compute(self, batch: Batch, x_BD: Tensor, step: int) -> tuple[list[Forward], list[Mapping[str, Tensor]]]:
        """The device's part of step `step` (from 0), from normalized tokens [B, D]: the same operations each time.

        Returns:
            Each SAE's view of the batch, and its metrics (on the device; with `grad_norm`).
        """
        for sae_trainer in self.sae_trainers:
            sae_trainer.optimizer.zero_grad()
        seen, totals = self._losses(batch, x_BD)
        forwards = [replace(forward, step=step) for forward in seen]
        torch.autograd.backward([total.loss for total in totals])
        together = zip(self.sae_trainers, forwards, totals, strict=True)
        return forwards, [sae_trainer.update(forward, total) for sae_trainer, forward, total in together]

    def losses(self, batch: Batch, x_BD: Tensor) -> tuple[list[Forward], list[Term]]:
        """Each SAE's view of the batch, and its loss."""
        first = self.sae_trainers[0]
        low = first.precision != torch.float32
        # No cache of cast weights: a recorded CUDA graph would not see their updates.
        with torch.autocast(first.device.type, first.precision, enabled=low, cache_enabled=False):
            forwards = self._forwards(batch, x_BD)
            pairs = zip(self.sae_trainers, forwards, strict=True)
            return forwards, [sae_trainer.objective(forward) for sae_trainer, forward in pairs]

    def finish(self, forwards: Sequence[Forward]) -> None:
        """Periodic actions; called after each step."""
        for sae_trainer, forward in zip(self.sae_trainers, forwards, strict=True):
            sae_trainer.finish(forward)

    def _forwards(self, batch: Batch, x_BD: Tensor) -> list[Forward]:
        first = self.sae_trainers[0]
        k = getattr(first.sae.sparsifier, "k", first.sae.latents)
        seen: list[dict[str, Any]] = [
            {
                "dead_F": sae_trainer.dead_latents.dead_F,
                "dead_bound": sae_trainer.dead_latents.dead_bound,
                "batch": batch,
                "hook": self.hook,
                "ranks": sae_trainer.ranks,
            }
            for sae_trainer in self.sae_trainers
        ]
        if len(self.sae_trainers) == 1 or pays_dense(k, 1, first.sae.latents):
            return [Forward.of(sae, x_BD, **own) for sae, own in zip(self.saes, seen, strict=True)]
        parts = self._stacked(x_BD)
        return [Forward(sae, x_BD, *part, **own) for sae, part, own in zip(self.saes, parts, seen, strict=True)]

    def _stacked(self, x_BD: Tensor) -> list[tuple[Tensor, Codes, Tensor]]:
        """Pre-activations, codes and reconstruction of each SAE, all at once."""
        saes, count, tokens, latents = self.saes, len(self.saes), len(x_BD), self.saes[0].latents
        pre_SBF = self._pre_activations(x_BD)
        choice = self._choose(pre_SBF)
        # Tokens and latents of SAE s come after those of SAE s - 1.
        at = torch.arange(count, device=x_BD.device)
        indices = (choice.indices.view(count, -1) + latents * at[:, None]).view_as(choice.indices)
        selected = select(
            x_BD.repeat(count, 1),
            # Stacked again for each use: gradients of a shared stack would be summed first, and round differently.
            torch.stack([sae.b_dec for sae in saes]),
            _Leaves.apply(self._encoders, *(sae.W_enc for sae in saes)),
            torch.cat([sae.b_enc for sae in saes]),
            pre_SBF.flatten(0, 1),
            indices,
            choice.bags,
        )
        values = selected * choice.keep
        decoder = _Leaves.apply(self._decoders, *(sae.W_dec for sae in saes))
        # All sizes given: a rank may have no token of a short last batch, and -1 cannot be inferred from 0 elements.
        recon_SBD = decode(values, indices, decoder, choice.bags).view(count, *x_BD.shape)
        recon_SBD = recon_SBD + torch.stack([sae.b_dec for sae in saes])[:, None]
        entries = zip(values.tensor_split(count), choice.indices.tensor_split(count), strict=True)
        bags = [None] * count if choice.bags is None else _split(choice.bags, count, tokens)
        codes = [Codes(*part, bag) for part, bag in zip(entries, bags, strict=True)]
        return list(zip(pre_SBF.unbind(), codes, recon_SBD.unbind(), strict=True))

    @torch.no_grad()
    def _pre_activations(self, x_BD: Tensor) -> Tensor:
        """[S, B, F]"""
        weight_SFD = self._encoders.view(len(self.saes), -1, self.saes[0].channels)
        b_dec_S1D, b_enc_S1F = (
            torch.stack([getattr(sae, name) for sae in self.saes])[:, None] for name in ("b_dec", "b_enc")
        )
        return torch.baddbmm(b_enc_S1F, x_BD - b_dec_S1D, weight_SFD.mT)

    def _choose(self, pre_SBF: Tensor) -> Choice:
        """Of all tokens of all SAEs; latents count from 0 for each."""
        tokens = pre_SBF.shape[1]
        sparsifiers = [sae.sparsifier for sae in self.saes]
        first = sparsifiers[0]
        if not isinstance(first, BatchTopK):
            choice: Choice = first(pre_SBF.flatten(0, 1))
            return choice
        values_SE, places_SE = largest(pre_SBF.flatten(1), first.budget(pre_SBF[0]))
        choices: list[Choice] = []
        for sparsifier, *own in zip(sparsifiers, values_SE, places_SE, pre_SBF, strict=True):
            assert isinstance(sparsifier, BatchTopK)
            choices.append(sparsifier.chosen(*own))
        bags = [choice.bags for choice in choices if choice.bags is not None]
        entries = values_SE.shape[1]
        return Choice(
            torch.cat([choice.indices for choice in choices]),
            torch.cat([choice.keep for choice in choices]),
            Bags(
                torch.cat([bag.of_E + s * tokens for s, bag in enumerate(bags)]),
                torch.cat([bag.starts_N + s * entries for s, bag in enumerate(bags)]),
            ),
        )


def _together(saes: Sequence[SAE], name: str) -> Tensor:
    """[S F, D] The parameter `name` of all SAEs, which are views of it afterwards."""
    parameters = [sae.get_parameter(name) for sae in saes]
    if len(parameters) == 1:
        return parameters[0].data
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joined.chunk(len(parameters)), strict=True):
        parameter.data = part
    return joined


def _split(bags: Bags, count: int, tokens: int) -> list[Bags]:
    """Each SAE's own part."""
    of_SE, starts_SN = bags.of_E.view(count, -1), bags.starts_N.view(count, -1)
    return [
        Bags(of_E - s * tokens, starts_N - s * of_SE.shape[1])
        for s, (of_E, starts_N) in enumerate(zip(of_SE, starts_SN, strict=True))
    ]


class _Leaves(torch.autograd.Function):
    """The array that holds all SAEs' weights, as a function of those weights; nothing is copied in either case."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> Tensor:
        ctx.count = len(parts)
        return joined.view_as(joined)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.chunk(ctx.count)
