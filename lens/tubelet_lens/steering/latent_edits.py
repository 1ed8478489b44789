"""Edits SAE latents in the activations of a running backbone.

    x ──encode──▶ f ──operations, in order──▶ f' ;   x' = x + A^-1 ((f' - f) W_dec)

W_dec is in the SAE's normalized space, x_n = (x - mean) / scale or (x - mean) whiten. A difference of codes is
therefore taken back through the linear part only (x scale, or @ unwhiten), never through the mean. The SAE's error
x - x^ is kept, because only a difference of codes is decoded (saev: x' = eps + Dec(f'); Stevens et al.,
arXiv 2502.06755). Where f' = f nothing is added and the token keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_lens.steering.operations import Amplify, SetTo, Suppress
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class Edit:
    """One latent, the operation on it, and where.

    Attributes:
        latent: Its number.
        operation: f to f'.
        mask_TS: bool [T', S] Tokens to edit; None: all of them.
    """

    latent: int
    operation: Suppress | Amplify | SetTo
    mask_TS: Tensor | None = None


class EditStep(NamedTuple):
    """What edits change on a batch of tokens.

    Attributes:
        delta: float32 [B, T', S, D] Added to the tokens; exactly 0 where no code changes.
        code_change: float32 [B, T', S, E] f' - f of the edited latents, in the order of `LatentEdits.latents`.
    """

    delta: Tensor
    code_change: Tensor


class LatentEdits:
    """Edits made together: a rewrite for `tubelet_pipeline.backbones.rewriting`.

    Several edits of one latent are applied in order. Codes are computed from the incoming tokens, so edits of different
    latents do not affect each other.

    Args:
        sae: Of the hook that is rewritten, on the backbone's device.
        edits: What to change.
        largest_F: Largest observed activation of each latent; required by `Suppress` with a strength above 0.

    Raises:
        TubeletError: a latent is out of range, or `largest_F` is missing.
    """

    def __init__(self, sae: SAE, edits: Sequence[Edit], largest_F: Tensor | None = None) -> None:
        for edit in edits:
            if not 0 <= edit.latent < sae.latents:
                raise TubeletError(
                    f"There is no latent {edit.latent}: this SAE has {sae.latents:,}",
                    f"Give a number from 0 to {sae.latents - 1}",
                )
            if isinstance(edit.operation, Suppress) and edit.operation.strength and largest_F is None:
                raise TubeletError(
                    f"Latent {edit.latent} cannot be suppressed to -{edit.operation.strength:g} x its largest "
                    "activation, which is not known",
                    "Give the largest activations, or strength 0",
                )
        self._sae, self.edits = sae, tuple(edits)
        self.latents = tuple(dict.fromkeys(edit.latent for edit in edits))
        """Edited latents, each once."""
        device = sae.W_dec.device
        self._column = {latent: column for column, latent in enumerate(self.latents)}
        self._index = torch.tensor(self.latents, dtype=torch.int64, device=device)
        self._largest = {j: 0.0 if largest_F is None else float(largest_F[j]) for j in self.latents}
        self._directions_ED = sae.normalization.raw_difference(sae.W_dec[self._index].float())

    def __call__(self, tokens: Tensor) -> Tensor:
        """New tokens [B, T', S, D] in the precision of `tokens`."""
        return (tokens.float() + self.step(tokens).delta).to(tokens.dtype)

    def step(self, tokens: Tensor) -> EditStep:
        """What the edits change on `tokens` [B, T', S, D]."""
        delta = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        changes = []
        # One clip at a time: dense codes of a batch may not fit into memory.
        for x_TSD, delta_TSD in zip(tokens.float(), delta, strict=True):
            with torch.no_grad():
                codes_NF = self._sae.encode(x_TSD.flatten(0, 1))
            old_TSE = codes_NF[:, self._index].unflatten(0, x_TSD.shape[:2])
            new_TSE = old_TSE.clone()
            for edit in self.edits:
                column = self._column[edit.latent]
                f_TS = new_TSE[..., column]
                match edit.operation:
                    case Suppress(strength=strength):
                        edited_TS = torch.full_like(f_TS, -strength * self._largest[edit.latent])
                    case Amplify(factor=factor):
                        edited_TS = factor * f_TS
                    case SetTo(value=value):
                        edited_TS = torch.full_like(f_TS, value)
                if edit.mask_TS is not None:
                    edited_TS = torch.where(edit.mask_TS.to(f_TS.device), edited_TS, f_TS)
                new_TSE[..., column] = edited_TS
            change_TSE = new_TSE - old_TSE
            changed_TS = (change_TSE != 0).any(-1)
            delta_TSD[changed_TS] = change_TSE[changed_TS] @ self._directions_ED
            changes.append(change_TSE)
        return EditStep(delta, torch.stack(changes))
