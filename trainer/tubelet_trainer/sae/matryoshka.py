"""Matryoshka: parts of a code that must reconstruct by themselves.

    code ──ordered (by latent, or by magnitude)──▶ groups ──decoded each, summed up──▶ reconstructions of the prefixes

The variants differ in the order and the cuts: prefixes of the dictionary (`Groups`, `RandomPrefixes`) or of the sorted
values (`NestedK`, `Hierarchical`). Each group is decoded once, sparsely, for any number of prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tubelet_trainer.sae.config import AnyNesting, Flat, Groups, Hierarchical, NestedK, RandomPrefixes
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.sparse_ops import decode_groups, is_dense


@dataclass(frozen=True)
class Cuts:
    """Ends and weights of the prefixes."""

    ends: tuple[int, ...]
    """Ascending; the last prefix is everything. Latents, or ranks by magnitude."""
    weights: tuple[float, ...]
    """Of each prefix's reconstruction; they add up to 1 (with `bias_weight`)."""
    by_rank: bool
    """`ends` count a token's values by magnitude; otherwise latents."""
    bias_weight: float = 0.0
    """Of the reconstruction by the decoder's bias alone."""


def cuts(nesting: AnyNesting, latents: int, k: int, seed: int, step: int) -> Cuts:
    """The prefixes of training step `step`, a pure function of its arguments.

    Args:
        nesting: Which kind.
        latents: F.
        k: Values per token, for nesting over k.
        seed: Of the SAE; with `step` it decides what is drawn.
        step: From 0.
    """
    match nesting:
        case Flat():
            return Cuts((latents,), (1.0,), by_rank=False)
        case Groups():
            given = nesting.weights or (1.0,) * len(nesting.fractions)
            # The bias counts as much as a prefix does on average: with equal weights, the plain mean of all of them.
            bias = sum(given) / len(given) if nesting.bias_alone else 0.0
            total = sum(given) + bias
            return Cuts(nesting.sizes(latents), tuple(w / total for w in given), False, bias / total)
        case RandomPrefixes():
            ends = _draw_prefixes(nesting, latents, seed, step)
            return Cuts(ends, (1 / len(ends),) * len(ends), by_rank=False)
        case NestedK():
            ends = nesting.ks or _halves(k)
            # Only while k is annealed does a value beyond the levels exist: the last prefix is everything.
            ends = (*(e for e in ends if e < k), k)
            given = tuple(range(len(ends), 0, -1)) if nesting.weights == "reverse" else (1,) * len(ends)
            return Cuts(ends, tuple(w / sum(given) for w in given), by_rank=True)
        case Hierarchical():
            ends = (*(e for e in (nesting.levels or range(1, k + 1)) if e < k), k)
            return Cuts(ends, (1 / len(ends),) * len(ends), by_rank=True)


def prefix_reconstructions(sae: SAE, codes: Codes, cuts: Cuts, ends_M: Tensor) -> Tensor:
    """Reconstructions [N, M - 1, D] of all prefixes but the last, which is the whole code, in normalized space.

    Args:
        sae: The SAE of the codes.
        codes: Of N tokens.
        cuts: The prefixes.
        ends_M: int64 [M - 1]: all ends but the last, where the codes are.
    """
    ends = cuts.ends[:-1]
    if is_dense(codes.indices) and not cuts.by_rank:
        starts = (0, *ends[:-1])
        parts = [codes.values[:, a:b] @ sae.W_dec[a:b] for a, b in zip(starts, ends, strict=True)]
        return torch.stack(parts, dim=1).cumsum(dim=1) + sae.b_dec
    if cuts.by_rank:
        order = codes.values.detach().abs().argsort(dim=1, descending=True, stable=True)
        group = torch.bucketize(torch.arange(order.shape[1], device=order.device), ends_M, right=True)
        values, indices, group = codes.values.gather(1, order), codes.indices.gather(1, order), group.expand_as(order)
    elif codes.bags is None:
        indices, order = codes.indices.sort(dim=1, stable=True)
        values, group = codes.values.gather(1, order), torch.bucketize(indices, ends_M, right=True)
    else:
        # A token's entries are one stretch, ascending by latent.
        values, indices, group = codes.values, codes.indices, torch.bucketize(codes.indices, ends_M, right=True)
    return decode_groups(values, indices, group, len(ends), sae.W_dec, codes.bags).cumsum(dim=1) + sae.b_dec


def _halves(k: int) -> tuple[int, ...]:
    halves = [k]
    while halves[-1] // 2 >= 4:
        halves.append(halves[-1] // 2)
    return tuple(reversed(halves))


def _draw_prefixes(nesting: RandomPrefixes, latents: int, seed: int, step: int) -> tuple[int, ...]:
    """`prefixes` - 1 distinct lengths below F with P(length <= l) ~ 1 - l^-power, and F.

    Drawn by inversion; a length that came before is drawn again, which is sampling without replacement.
    """
    rng = np.random.Generator(np.random.Philox(key=(seed % 2**64, step)))
    reach = 1 - max(1, latents - 1) ** -nesting.power
    lengths: set[int] = set()
    # P(length = 1) is 0, so there are F - 2 lengths to draw from.
    while len(lengths) < min(nesting.prefixes - 1, latents - 2):
        length = int(np.ceil((1 - rng.random() * reach) ** (-1 / nesting.power)))
        if 1 < length < latents:
            lengths.add(length)
    return (*sorted(lengths), latents)
