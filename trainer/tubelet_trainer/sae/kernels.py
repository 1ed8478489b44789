"""The sparse products of `sparse` as Triton kernels, for CUDA.

    decode      out_n = sum_k v_nk W[i_nk]       one program per token and block of channels: a walk over its K rows
    dots        g_nk  = grad_n . W[i_nk]         one program per entry: the gradient with respect to the values
    outer_sum   G_f   = sum_{nk: i_nk = f} v_nk x_n
                                                 one program per latent and block of channels: a walk over its entries

The third is the gradient of both weights. Entries are first sorted by latent, so every row of the gradient is written
by one program: no atomics, and the same sum in the same order every time. Sums are in float32. What it costs: a latent
that is active on every token is one long walk.

Each kernel's reference is the function of the same meaning in `sparse`, which the tests compare it with.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Channels per program. [RECON] untuned: no GPU was at hand when this was written.
_BLOCK = 256


@triton.jit
def _decode_kernel(values, indices, weight, out, K, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for entry in range(K):
        latent = tl.load(indices + token * K + entry)
        value = tl.load(values + token * K + entry).to(tl.float32)
        row = tl.load(weight + latent * D + channel, mask=inside, other=0.0).to(tl.float32)
        total += value * row
    tl.store(out + token * D + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(grad, indices, weight, out, K, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1)
    latent = tl.load(indices + token * K + entry)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < D
        row = tl.load(weight + latent * D + channel, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + token * D + channel, mask=inside, other=0.0).to(tl.float32)
        total += row * upstream
    tl.store(out + token * K + entry, tl.sum(total, axis=0).to(out.dtype.element_ty))


@triton.jit
def _outer_sum_kernel(values, entries, offsets, rows, out, K, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    latent = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    first = tl.load(offsets + latent)
    last = tl.load(offsets + latent + 1)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for position in range(first, last):
        entry = tl.load(entries + position)
        value = tl.load(values + entry).to(tl.float32)
        row = tl.load(rows + (entry // K) * D + channel, mask=inside, other=0.0).to(tl.float32)
        total += value * row
    tl.store(out + latent * D + channel, total.to(out.dtype.element_ty), mask=inside)


def decode(values_NK: Tensor, indices_NK: Tensor, weight_FD: Tensor) -> Tensor:
    """`sparse.decode_sparse` [N, D], with gradient to values and weight."""
    out: Tensor = _Decode.apply(values_NK, indices_NK, weight_FD)
    return out


def outer_sum(values_NK: Tensor, indices_NK: Tensor, rows_ND: Tensor, latents: int) -> Tensor:
    """sum_n values_nk rows_n, collected per latent indices_nk: [F, D]. No gradient."""
    channels, width = rows_ND.shape[1], indices_NK.shape[1]
    flat = indices_NK.reshape(-1)
    entries = torch.argsort(flat, stable=True)
    counts = torch.zeros(latents, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    out = rows_ND.new_empty(latents, channels)
    grid = (latents, triton.cdiv(channels, _BLOCK))
    _outer_sum_kernel[grid](
        values_NK.contiguous(), entries, offsets, rows_ND.contiguous(), out, width, channels, BLOCK=_BLOCK
    )
    return out


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_NK: Tensor, indices_NK: Tensor, weight_FD: Tensor) -> Tensor:
        values_NK, indices_NK = values_NK.contiguous(), indices_NK.contiguous()
        ctx.save_for_backward(values_NK, indices_NK, weight_FD)
        tokens, width = values_NK.shape
        channels = weight_FD.shape[1]
        out = weight_FD.new_empty(tokens, channels)
        if tokens:
            grid = (tokens, triton.cdiv(channels, _BLOCK))
            _decode_kernel[grid](values_NK, indices_NK, weight_FD.contiguous(), out, width, channels, BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values_NK, indices_NK, weight_FD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_values = grad_weight = None
        tokens, width = values_NK.shape
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values_NK)
            if tokens:
                _dots_kernel[(tokens, width)](
                    grad_ND, indices_NK, weight_FD.contiguous(), grad_values, width, weight_FD.shape[1], BLOCK=_BLOCK
                )
        if ctx.needs_input_grad[2]:
            grad_weight = outer_sum(values_NK, indices_NK, grad_ND, len(weight_FD))
        return grad_values, None, grad_weight
