"""The dictionary of an SAE: the direction that each latent adds to the raw activation, and how directions relate.

SparseCoder ─▶ directions [F, D] ─▶ each latent's nearest others (chunked) · effective rank
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_trainer.sae.model import SAE

# Rows of cosines held at once: 2^24 float32 are 64 MiB.
_CELLS = 2**24


@dataclass(frozen=True, eq=False)
class Nearest:
    """The k directions nearest to each of F, by the size of the cosine.

    Attributes:
        latents_Fk: int64 Their latents, nearest first; -1 where there is none.
        cosines_Fk: float64 Their cosines, with sign; NaN where there is none.
    """

    latents_Fk: NDArray[np.int64]
    cosines_Fk: NDArray[np.float64]


def directions(sae: SparseCoder) -> Tensor:
    """float32 [F, D] What one unit of each latent adds to the raw activation. Not normalized."""
    if isinstance(sae, SAE):
        return sae.fold().W_dec.detach()
    with torch.no_grad():
        return sae.decode(torch.eye(sae.latents)) - sae.decode(torch.zeros(1, sae.latents))


def nearest_latents(directions_FD: Tensor, count: int = 5, among: NDArray[np.bool_] | None = None) -> Nearest:
    """The `count` latents whose directions are nearest to each latent's own, by |cosine|. Memory is bounded.

    Args:
        directions_FD: Any norm.
        count: Neighbors per latent.
        among: bool [F] Compare only these with each other (those alive); None: all.
    """
    latents = len(directions_FD)
    chosen = np.arange(latents) if among is None else np.flatnonzero(among)
    nearest = Nearest(np.full((latents, count), -1, dtype=np.int64), np.full((latents, count), np.nan))
    unit_AD = nnf.normalize(directions_FD[torch.from_numpy(chosen).to(directions_FD.device)].float(), dim=1)
    kept = min(count, len(chosen) - 1)
    if kept < 1:
        return nearest
    rows = max(1, _CELLS // len(chosen))
    for start in range(0, len(chosen), rows):
        cosines = unit_AD[start : start + rows] @ unit_AD.T
        itself = torch.arange(len(cosines), device=cosines.device)
        sizes = cosines.abs()
        sizes[itself, itself + start] = -1
        places = sizes.topk(kept, dim=1).indices
        into = chosen[start : start + rows]
        nearest.latents_Fk[into, :kept] = chosen[places.cpu().numpy()]
        nearest.cosines_Fk[into, :kept] = cosines.gather(1, places).double().clamp(-1, 1).cpu().numpy()
    return nearest


def effective_rank(directions_FD: Tensor) -> float:
    """exp of the entropy of the singular values of the unit directions, as shares of their sum (Roy & Vetterli 2007).

    D for directions that fill the space evenly, 1 for directions on one line.
    """
    unit_FD = nnf.normalize(directions_FD.double(), dim=1)
    spread = torch.linalg.eigvalsh(unit_FD.T @ unit_FD).clamp_min(0).sqrt()
    share = spread / spread.sum()
    return float(torch.special.entr(share).sum().exp())


def random_directions(latents: int, channels: int, seed: int) -> Tensor:
    """float32 [F, D] Random unit vectors: the null of every comparison of directions."""
    generator = torch.Generator().manual_seed(seed)
    return nnf.normalize(torch.randn(latents, channels, generator=generator), dim=1)
