"""Terms of the objective for a dictionary that is split over ranks (see `tubelet_trainer.sae.sharded`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tubelet_trainer.losses.objective import AuxK, Forward, Reconstruction, Term, TermFunction
from tubelet_trainer.process_group import ProcessGroup
from tubelet_trainer.sae.sharded import largest_over_ranks
from tubelet_trainer.sae.sparse_ops import decode, largest
from tubelet_trainer.sae.sparsifiers import Choice


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
