"""The loss: a sum of terms, each of which reports its own metrics.

    tokens ─▶ Forward (pre-activations, codes, reconstruction) ─▶ term, term, ... ─▶ sum of losses, union of metrics

A term is a callable that reads a `Forward` and gives a `Term`: the weighted loss and named metrics (0-dimensional
tensors, detached, still on the device). Losses are divided by the variance of the whole data set, a constant, so that a
weight means the same for every backbone and batch. At the end: the terms for a dictionary that is split over ranks
(see `tubelet_trainer.sae.sharded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tubelet_trainer.data.batch import Batch
from tubelet_trainer.device_scalar import DeviceScalar
from tubelet_trainer.process_group import ALONE, ProcessGroup
from tubelet_trainer.sae.config import Flat
from tubelet_trainer.sae.matryoshka import Cuts, cuts, prefix_reconstructions
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.sharded import largest_over_ranks
from tubelet_trainer.sae.sparse_ops import decode, largest
from tubelet_trainer.sae.sparsifiers import Choice


@dataclass(frozen=True)
class Forward:
    """One batch seen through one SAE, in normalized space."""

    sae: SAE
    x_BD: Tensor
    pre_BF: Tensor
    """Pre-activations; no gradient."""
    codes: Codes
    recon_BD: Tensor
    dead_F: Tensor
    """bool: dead latents (see `tubelet_trainer.optim.dead_latents`)."""
    step: int = 0
    """Training step, from 0."""
    dead_bound: int | None = None
    """Upper bound of the number of dead latents, as far as the host knows; None: unknown."""
    batch: Batch | None = None
    """Positions of the tokens, and their neighbors."""
    hook: str = ""
    """Hook of the tokens."""
    ranks: ProcessGroup = ALONE
    """Processes that hold the rest of the batch."""

    @classmethod
    def of(
        cls,
        sae: SAE,
        x_BD: Tensor,
        dead_F: Tensor,
        dead_bound: int | None = None,
        batch: Batch | None = None,
        hook: str = "",
        ranks: ProcessGroup = ALONE,
    ) -> Forward:
        """Run `sae` on normalized tokens [B, D]."""
        pre_BF = sae.pre_activations(x_BD)
        codes = sae.activate(x_BD, pre_BF)
        recon_BD = sae.reconstruct(codes)
        return cls(
            sae, x_BD, pre_BF, codes, recon_BD, dead_F, dead_bound=dead_bound, batch=batch, hook=hook, ranks=ranks
        )

    @property
    def whole(self) -> int:
        """Tokens of the batch over all ranks."""
        return len(self.x_BD) if self.batch is None else self.batch.whole

    def per_token(self, local_sum: Tensor) -> Tensor:
        """A sum over this rank's tokens as a mean over the whole batch; the gradient is of this rank's part."""
        return self.ranks.total(local_sum) / self.whole

    def spread(self, x_BD: Tensor) -> Tensor:
        """Sum of squared distances from the mean, over the whole batch; no gradient."""
        x_BD = x_BD.detach()
        mean_D = x_BD.mean(dim=0) if self.ranks.size == 1 else self.ranks.sum(x_BD.sum(dim=0)) / self.whole
        return self.ranks.sum((x_BD - mean_D).square().sum())


@dataclass(frozen=True)
class Term:
    """One part of the loss."""

    loss: Tensor
    """0-dimensional, weighted."""
    metrics: Mapping[str, Tensor]


class TermFunction(Protocol):
    """A callable that computes a `Term` from a `Forward`."""

    def __call__(self, forward: Forward) -> Term:
        """The term's loss and metrics on one batch."""
        ...


class Reconstruction:
    """mean_b ||x_b - x^_b||^2 / variance; with nesting, the weighted mean of that over all prefixes of the code.

    Args:
        variance: Mean squared distance of the data set's normalized tokens from their mean.
    """

    def __init__(self, variance: float) -> None:
        self.variance = variance
        self._cut: Cuts | None = None
        self._ends, self._weights = DeviceScalar(()), DeviceScalar(())

    def begin(self, sae: SAE, step: int) -> None:
        """Sample the prefixes of step `step`."""
        config = sae.config
        cut = cuts(config.nesting, sae.latents, getattr(sae.sparsifier, "k", 0), config.seed, step)
        if self._cut is None or len(cut.ends) != len(self._cut.ends):
            self._ends, self._weights = DeviceScalar(cut.ends[:-1], torch.int64), DeviceScalar(cut.weights[:-1])
        elif cut != self._cut:
            self._ends.set(cut.ends[:-1])
        self._cut = cut

    def __call__(self, forward: Forward) -> Term:
        """Metrics: `fvu` (of the batch, about the batch's mean; not a number where its tokens do not differ), `l0`."""
        error = (forward.x_BD - forward.recon_BD).square().sum()
        l0 = forward.per_token((forward.codes.values.detach() != 0).sum())
        spread = forward.spread(forward.x_BD)
        fvu = torch.where(spread > 0, forward.ranks.sum(error.detach()) / spread, torch.nan)
        loss = forward.ranks.total(self._nested(forward, error)) / (forward.whole * self.variance)
        return Term(loss, {"reconstruction": loss.detach(), "fvu": fvu, "l0": l0})

    def _nested(self, forward: Forward, error: Tensor) -> Tensor:
        """Weighted mean of the prefixes' squared errors; `error` is that of the whole code."""
        sae = forward.sae
        if isinstance(sae.config.nesting, Flat):
            return error
        if self._cut is None:
            self.begin(sae, forward.step)
        cut = self._cut
        assert cut is not None
        total = cut.weights[-1] * error
        if len(cut.ends) > 1:
            recon_BMD = prefix_reconstructions(sae, forward.codes, cut, self._ends.on(error.device))
            errors_M = (forward.x_BD[:, None] - recon_BMD).square().sum(dim=(0, 2))
            total = total + (errors_M * self._weights.on(error.device).to(errors_M.dtype)).sum()
        if cut.bias_weight:
            total = total + cut.bias_weight * (forward.x_BD - sae.b_dec).square().sum()
        return total


class AuxK:
    """Dead latents learn to reconstruct the residual of the alive ones (Gao et al. 2024, appendix A.2).

    The k largest pre-activations among dead latents, through ReLU, are decoded without b_dec and compared with the
    detached residual e = x - x^:  coef ||e - e^||^2 / ||e - mean(e)||^2, and 0 where that is not a number.

    Their number per token is decided on the host, from the number of dead latents some steps ago: the next
    power of 2, at most k. Fewer dead ones leave the rest empty; more have to wait their turn for those few steps.

    Args:
        k: Dead latents per token.
        coef: Weight.
    """

    def __init__(self, k: int, coef: float) -> None:
        self.k = k
        self.coef = coef

    def __call__(self, forward: Forward) -> Term:
        """Metrics: `dead` (share of latents), `auxk` (unweighted)."""
        dead_share = forward.dead_F.float().mean()
        width = self.width(forward, forward.sae.latents)
        if width == 0:
            zero = forward.x_BD.new_zeros(())
            return Term(zero, {"dead": dead_share, "auxk": zero})
        sae = forward.sae
        values, indices = largest(forward.pre_BF.masked_fill(~forward.dead_F, -torch.inf), width)
        codes = sae.choose(forward.x_BD, forward.pre_BF, Choice(indices, values > 0))
        residual_BD = (forward.x_BD - forward.recon_BD).detach()
        modeled_BD = decode(codes.values, codes.indices, sae.W_dec)
        error = forward.ranks.total((residual_BD - modeled_BD).square().sum())
        ratio = error / forward.spread(residual_BD)
        return self.term(ratio, dead_share, forward.dead_F.any())

    def width(self, forward: Forward, latents: int) -> int:
        """Dead latents chosen per token, of `latents`."""
        return min(self.k, latents, latents if forward.dead_bound is None else forward.dead_bound)

    def term(self, ratio: Tensor, dead_share: Tensor, any_dead: Tensor) -> Term:
        """The term from the ratio of unexplained to total residual: 0 if no latent is dead or the ratio is not
        finite."""
        ratio = torch.where(any_dead & ratio.isfinite(), ratio, 0)
        return Term(self.coef * ratio, {"dead": dead_share, "auxk": ratio.detach()})


class Objective:
    """A sum of terms."""

    def __init__(self, terms: Sequence[TermFunction]) -> None:
        self.terms = tuple(terms)

    def __call__(self, forward: Forward) -> Term:
        """Sum of the losses; all metrics, and `loss`."""
        parts = [term(forward) for term in self.terms]
        loss = torch.stack([part.loss for part in parts]).sum()
        metrics = {name: value for part in parts for name, value in part.metrics.items()}
        return Term(loss, {"loss": loss.detach(), **metrics})

    def begin(self, sae: SAE, step: int) -> None:
        """Announce step `step` to the terms that have a `begin`."""
        for term in self.terms:
            if (begin := getattr(term, "begin", None)) is not None:
                begin(sae, step)

    def state(self) -> dict[str, Tensor]:
        """State of the terms that have a `state`, by reference."""
        return {
            f"{number}/{name}": tensor
            for number, term in enumerate(self.terms)
            for name, tensor in getattr(term, "state", {}).items()
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])


def sharded_terms(terms: Sequence[TermFunction], ranks: ProcessGroup) -> list[TermFunction]:
    """`terms` for a `ShardedSAE`."""
    sharded: list[TermFunction] = []
    for term in terms:
        match term:
            case Reconstruction():
                sharded.append(_ShardedReconstruction(term.variance, ranks))
            case AuxK():
                sharded.append(_ShardedAuxK(term.k, term.coef, ranks))
            case _:
                sharded.append(term)
    return sharded


class _ShardedReconstruction(Reconstruction):
    def __init__(self, variance: float, ranks: ProcessGroup) -> None:
        super().__init__(variance)
        self.ranks = ranks

    def __call__(self, forward: Forward) -> Term:
        term = super().__call__(forward)
        return Term(term.loss, {**term.metrics, "l0": self.ranks.sum(term.metrics["l0"])})


class _ShardedAuxK(AuxK):
    """The k largest among the dead latents of all ranks."""

    def __init__(self, k: int, coef: float, ranks: ProcessGroup) -> None:
        super().__init__(k, coef)
        self.ranks = ranks

    def __call__(self, forward: Forward) -> Term:
        sae, dead_F = forward.sae, forward.dead_F
        dead_share = self.ranks.sum(dead_F.float().mean()) / self.ranks.size
        width = self.width(forward, sae.latents * self.ranks.size)
        if width == 0:
            zero = forward.x_BD.new_zeros(())
            return Term(zero, {"dead": dead_share, "auxk": zero})
        values, indices = largest(forward.pre_BF.masked_fill(~dead_F, -torch.inf), min(width, sae.latents))
        cut_B1 = largest_over_ranks(values, width, self.ranks)
        codes = sae.choose(forward.x_BD, forward.pre_BF, Choice(indices, (values > 0) & (values >= cut_B1)))
        residual_BD = (forward.x_BD - forward.recon_BD).detach()
        modeled_BD = self.ranks.total(decode(codes.values, codes.indices, sae.W_dec))
        ratio = (residual_BD - modeled_BD).square().sum() / forward.spread(residual_BD)
        return self.term(ratio, dead_share, dead_share > 0)
