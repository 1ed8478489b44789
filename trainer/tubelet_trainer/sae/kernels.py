"""The sparse products of `sparse` as Triton kernels, for CUDA.

    bag_sum   out_n = sum_{e in bag n} v_e W[i_e]   one program per bag and block of channels: a walk over its entries
    dots      g_e   = grad[bag of e] . W[i_e]       one program per entry: the gradient with respect to the values

Decoding is a bag sum over tokens. So is the gradient of both weights, over latents: entries are first sorted by latent,
so every row of the gradient is written by one program: no atomics, and the same sum in the same order every time. Sums
are in float32. What it costs: a latent that is active on every token is one long walk.

The references are the same products in `sparse`, in plain torch, which the tests compare these with.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Channels per program. [RECON] Untuned: no GPU was available.
_BLOCK = 256


@triton.jit
def _bag_sum_kernel(values, rows, weight, starts, out, bags, entries, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    first = tl.load(starts + bag)
    last = tl.load(starts + bag + 1, mask=bag + 1 < bags, other=entries)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for entry in range(first, last):
        value = tl.load(values + entry).to(tl.float32)
        row = tl.load(rows + entry)
        total += value * tl.load(weight + row * D + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + bag * D + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(grad, indices, weight, bag_of, out, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    entry = tl.program_id(0).to(tl.int64)
    latent = tl.load(indices + entry)
    bag = tl.load(bag_of + entry)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < D
        row = tl.load(weight + latent * D + channel, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + bag * D + channel, mask=inside, other=0.0).to(tl.float32)
        total += row * upstream
    tl.store(out + entry, tl.sum(total, axis=0).to(out.dtype.element_ty))


def bag_sum(values_E: Tensor, rows_E: Tensor, weight_RD: Tensor, starts_N: Tensor) -> Tensor:
    """[N, D] sum of the weighted rows of each bag. Bag n's entries begin at `starts_N[n]`. No gradient."""
    bags, channels = len(starts_N), weight_RD.shape[1]
    out = weight_RD.new_empty(bags, channels)
    if bags:
        _bag_sum_kernel[(bags, triton.cdiv(channels, _BLOCK))](
            values_E.contiguous(),
            rows_E.contiguous(),
            weight_RD.contiguous(),
            starts_N,
            out,
            bags,
            len(rows_E),
            channels,
            BLOCK=_BLOCK,
        )
    return out


def dots(grad_ND: Tensor, indices_E: Tensor, weight_FD: Tensor, of_E: Tensor) -> Tensor:
    """[E] grad of each entry's bag . W[its latent]. No gradient."""
    out = grad_ND.new_empty(len(indices_E))
    if len(indices_E):
        _dots_kernel[(len(indices_E),)](
            grad_ND.contiguous(),
            indices_E.contiguous(),
            weight_FD.contiguous(),
            of_E,
            out,
            grad_ND.shape[1],
            BLOCK=_BLOCK,
        )
    return out
