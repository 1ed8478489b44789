"""Latents of an SAE changed in the activations of a running backbone.

    x ──encode──▶ f ──operations, in order──▶ f' ;   x' = x + A^-1 ((f' - f) W_dec)

W_dec lives in the SAE's normalized space, x_n = (x - mean) / scale or (x - mean) whiten: the change has to be taken
back through its linear part (x scale, or @ unwhiten), never through the mean. What the SAE does not explain,
x - x^, stays as it is, because only a difference of codes is decoded (saev: x' = eps + Dec(f'); Stevens et al.,
arXiv 2502.06755). Where f' = f nothing is added and the token keeps its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_lens.steering.operation import Amplify, SetTo, Suppress
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class Edit:
    """One latent, what is done to it, and where.

    Attributes:
        latent: Its number.
        operation: f to f'.
        mask_TS: bool [T', S] Tokens where it is done; None: all of them.
    """

    latent: int
    operation: Suppress | Amplify | SetTo
    mask_TS: Tensor | None = None


class LatentEdits:
    """Edits to make together: a rewrite for `tubelet_pipeline.backbones.rewriting`.

    Several edits of one latent act one after the other. Codes are computed from the tokens as they come, so edits of
    different latents do not see each other.

    Args:
        sae: Of the hook that is rewritten, on the backbone's device.
        edits: What to change.
        largest_F: Largest observed activation of each latent; needed to suppress with a strength above 0.

    Raises:
        TubeletError: a latent out of range, or no `largest_F` where one is needed.
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
        self._sae, self._edits = sae, tuple(edits)
        self.latents = tuple(dict.fromkeys(edit.latent for edit in edits))
        """Latents that are changed, each once."""
        device = sae.W_dec.device
        self._column = {latent: place for place, latent in enumerate(self.latents)}
        self._index = torch.tensor(self.latents, dtype=torch.int64, device=device)
        self._largest = {j: 0.0 if largest_F is None else float(largest_F[j]) for j in self.latents}
        self._directions_ED = sae.normalization.raw_difference(sae.W_dec[self._index].float())

    def __call__(self, tokens: Tensor) -> Tensor:
        """New tokens [B, T', S, D] in the precision of `tokens`."""
        return (tokens.float() + self.delta(tokens)).to(tokens.dtype)

    def delta(self, tokens: Tensor) -> Tensor:
        """float32 [B, T', S, D] What is added; exactly 0 where no code changes."""
        delta = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        for place, change_TSE in enumerate(self.code_change(tokens)):
            changed_TS = (change_TSE != 0).any(-1)
            delta[place][changed_TS] = change_TSE[changed_TS] @ self._directions_ED
        return delta

    def code_change(self, tokens: Tensor) -> Tensor:
        """f' - f, float32 [B, T', S, E], of the latents `self.latents`."""
        changes = []
        # One clip at a time: dense codes of a batch may not fit into memory.
        for x_TSD in tokens.float():
            with torch.no_grad():
                codes_NF = self._sae.encode(x_TSD.flatten(0, 1))
            before_TSE = codes_NF[:, self._index].unflatten(0, x_TSD.shape[:2])
            changes.append(self._edited(before_TSE) - before_TSE)
        return torch.stack(changes)

    def _edited(self, codes_TSE: Tensor) -> Tensor:
        codes_TSE = codes_TSE.clone()
        for edit in self._edits:
            column = self._column[edit.latent]
            f_TS = codes_TSE[..., column]
            match edit.operation:
                case Suppress(strength=strength):
                    new_TS = torch.full_like(f_TS, -strength * self._largest[edit.latent])
                case Amplify(factor=factor):
                    new_TS = factor * f_TS
                case SetTo(value=value):
                    new_TS = torch.full_like(f_TS, value)
            if edit.mask_TS is not None:
                new_TS = torch.where(edit.mask_TS.to(f_TS.device), new_TS, f_TS)
            codes_TSE[..., column] = new_TS
        return codes_TSE


class RandomDirection:
    """A control of edits: on each token as long a step as theirs, along one random direction instead.

    Args:
        edits: What it is a control of.
        seed: Draws the direction, uniform on the sphere of raw activations.
    """

    def __init__(self, edits: LatentEdits, seed: int) -> None:
        self._edits = edits
        self._generator = torch.Generator().manual_seed(seed)
        self._unit_D: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """New tokens [B, T', S, D]."""
        if self._unit_D is None:
            drawn_D = torch.randn(tokens.shape[-1], generator=self._generator).to(tokens.device)
            self._unit_D = drawn_D / drawn_D.norm()
        delta = self._edits.delta(tokens)
        return (tokens.float() + delta.norm(dim=-1, keepdim=True) * self._unit_D).to(tokens.dtype)
