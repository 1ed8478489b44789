"""Products with sparse codes, in value and gradient, without ever forming the dense code.

A batch of codes has K entries per token: `values` [N, K] at latents `indices` [N, K]. Both products below are sums of
few rows, which `embedding_bag` computes; the weight gradients are the same sums with the roles of tokens and latents
swapped.

    decode:  out_n = sum_k values_nk W[indices_nk]                       (rows of the decoder)
    select:  pre_nk = W[indices_nk] . (x_n - b_dec) + b_enc[indices_nk]  (the pre-activations that were kept)

Where tokens keep different numbers, the entries of a batch are one list, token after token, and `Bags` maps them to
tokens; its length is known in advance, so nothing synchronizes with the device.

Codes whose indices come from `every_latent` are dense (K = F), and both products are plain matrix products. So kinds
that keep many latents use the same code as those that keep few.

Measured with N 1024, F 6144, D 768, one CPU thread, forward and backward of `decode`: K 32 18 ms, K 64 43 ms, K 256
126 ms, K 512 231 ms; dense 380 to 480 ms.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

# From the measurement above the dense product wins when a token keeps more than about one latent in six.
_DENSE_FROM = 6


class Bags(NamedTuple):
    """Whose a list of entries is, where bags (tokens, say) hold different numbers of them."""

    of_E: Tensor
    """int64, ascending: bag of each entry."""
    starts_N: Tensor
    """int64: where each bag's entries begin; where it ends the next one's do."""

    @classmethod
    def sorted(cls, of_E: Tensor, count: int) -> Bags:
        """From each entry's bag, ascending, of `count` bags."""
        return cls(of_E, torch.searchsorted(of_E, torch.arange(count, device=of_E.device)))

    @classmethod
    def rows(cls, indices_NK: Tensor) -> Bags:
        """Each row of `indices_NK` a bag."""
        count, width = indices_NK.shape
        numbers_N = torch.arange(count, device=indices_NK.device)
        return cls(numbers_N[:, None].expand(count, width).reshape(-1).contiguous(), numbers_N * width)


@lru_cache(maxsize=1)
def _triton_kernels() -> ModuleType | None:
    return import_module("tubelet_trainer.sae.kernels") if find_spec("triton") is not None else None


def _kernels(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels, for tensors on CUDA where Triton is installed. They have no float64."""
    return _triton_kernels() if tensor.is_cuda and tensor.dtype != torch.float64 else None


def every_latent(pre_NF: Tensor) -> Tensor:
    """Indices [N, F] of dense codes: 0, 1, ..., F - 1 for each token, without memory of their own."""
    return torch.arange(pre_NF.shape[1], device=pre_NF.device).expand(pre_NF.shape)


def is_dense(indices: Tensor) -> bool:
    """Whether the indices come from `every_latent`: all tokens then share one row of them in memory."""
    return indices.ndim == 2 and indices.stride(0) == 0


def pays_dense(entries: int, tokens: int, latents: int) -> bool:
    """Whether this number of entries is multiplied faster as a dense code."""
    return _DENSE_FROM * entries > tokens * latents


def largest(x_RM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and where they are, [R, k] each, in no order: `topk`, in two stages.

    The k largest of a row lie in the k blocks whose largest values are largest, so only those blocks are looked
    through. Ties may fall differently than `topk`'s. One thread, rows of 16384, k 32: 23 ms for 1024 rows against
    40 ms.
    """
    rows, length = x_RM.shape
    size = 1
    # Both stages look at about the same number of values; in powers of 2, so that blocks leave no rest.
    while k and length % (2 * size) == 0 and (4 * size) ** 2 * k <= length:
        size *= 2
    if size == 1:
        top = x_RM.topk(k, dim=1, sorted=False)
        return top.values, top.indices
    blocks = length // size
    # A block's values lie `blocks` apart, so that the maxima of neighboring blocks are taken together.
    best_Rk = x_RM.view(rows, size, blocks).amax(dim=1).topk(k, dim=1, sorted=False).indices
    within = torch.arange(size, device=x_RM.device) * blocks
    places_RC = (best_Rk[:, None, :] + within[:, None]).flatten(1)
    top = x_RM.gather(1, places_RC).topk(k, dim=1, sorted=False)
    return top.values, places_RC.gather(1, top.indices)


def densify(values: Tensor, indices: Tensor, latents: int, bags: Bags | None = None) -> Tensor:
    """Dense codes [N, F]. Indices of one token must be distinct, unless their values are 0."""
    if is_dense(indices):
        return values
    if bags is None:
        return values.new_zeros(len(values), latents).scatter_add(1, indices, values)
    dense = values.new_zeros(len(bags.starts_N) * latents)
    return dense.index_add(0, bags.of_E * latents + indices, values).view(-1, latents)


def decode_dense(values: Tensor, indices: Tensor, weight_FD: Tensor, bags: Bags | None = None) -> Tensor:
    """Reference of `decode`: [N, D] through the dense code."""
    return densify(values, indices, len(weight_FD), bags) @ weight_FD


def decode_sparse(values: Tensor, indices: Tensor, weight_FD: Tensor, bags: Bags | None = None) -> Tensor:
    """`decode_dense` without the dense code."""
    bags = bags or Bags.rows(indices)
    out: Tensor = _Decode.apply(values.flatten(), indices.flatten().contiguous(), weight_FD, *bags)
    return out


def decode(values: Tensor, indices: Tensor, weight_FD: Tensor, bags: Bags | None = None) -> Tensor:
    """sum_k values_nk W[indices_nk], [N, D], by the faster method.

    Args:
        values: [N, K]; with `bags` [E].
        indices: As values.
        weight_FD: Decoder rows.
        bags: Whose the entries are; None: row n's are token n's.
    """
    tokens = len(indices if bags is None else bags.starts_N)
    if pays_dense(indices.numel(), tokens, len(weight_FD)):
        return decode_dense(values, indices, weight_FD, bags)
    return decode_sparse(values, indices, weight_FD, bags)


def decode_groups(
    values: Tensor, indices: Tensor, group: Tensor, groups: int, weight_FD: Tensor, bags: Bags | None = None
) -> Tensor:
    """What each group of a token's entries contributes to `decode`: [N, groups, D].

    Args:
        values: Codes.
        indices: Their latents.
        group: Group of each entry, 0 to groups - 1, ascending within a token. Entries of a group beyond are left out.
        groups: How many.
        weight_FD: Decoder rows.
        bags: As in `decode`.
    """
    bags = bags or Bags.rows(indices)
    tokens = len(bags.starts_N)
    # The entries beyond the last group are a separate bag, which is dropped.
    of_E = bags.of_E * (groups + 1) + group.flatten().clamp_max(groups)
    parts = Bags.sorted(of_E, tokens * (groups + 1))
    sums = decode_sparse(values.flatten(), indices.flatten(), weight_FD, parts)
    return sums.view(tokens, groups + 1, sums.shape[1])[:, :groups]


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_E: Tensor, indices_E: Tensor, weight_FD: Tensor, of_E: Tensor, starts_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values_E, indices_E, weight_FD, of_E, starts_N)
        return _bag_sum(values_E, indices_E, weight_FD, starts_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        values_E, indices_E, weight_FD, of_E, starts_N = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            if (kernels := _kernels(grad_ND)) is not None:
                grad_values = kernels.dots(grad_ND, indices_E, weight_FD, of_E)
            else:
                grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad_ND, weight_FD, indices_E, starts_N, of_E, 0
                )
        if ctx.needs_input_grad[2]:
            grad_weight = _outer_sum(values_E, indices_E, grad_ND, len(weight_FD), of_E)
        return grad_values, None, grad_weight, None, None


def _bag_sum(values_E: Tensor, rows_E: Tensor, weight_RD: Tensor, starts_N: Tensor) -> Tensor:
    """[N, D] sum of the weighted rows of each bag."""
    if (kernels := _kernels(weight_RD)) is not None:
        summed: Tensor = kernels.bag_sum(values_E, rows_E, weight_RD, starts_N)
        return summed
    return nnf.embedding_bag(rows_E, weight_RD, offsets=starts_N, per_sample_weights=values_E, mode="sum")


def _outer_sum(values_E: Tensor, indices_E: Tensor, rows_ND: Tensor, latents: int, of_E: Tensor) -> Tensor:
    """sum over entries of value x row of their token, collected per latent: [F, D]."""
    # Stable, so that each latent's sum runs over tokens in their order: repeatable bit by bit.
    by_latent, order = indices_E.sort(stable=True)
    starts_F = torch.searchsorted(by_latent, torch.arange(latents, device=by_latent.device))
    return _bag_sum(values_E[order], of_E[order], rows_ND, starts_F)


def select(
    x_ND: Tensor,
    b_dec: Tensor,
    weight_FD: Tensor,
    b_enc: Tensor,
    pre_NF: Tensor,
    indices: Tensor,
    bags: Bags | None = None,
) -> Tensor:
    """Pre-activations of the chosen latents, as `indices`, differentiable in x, b_dec, weight and b_enc.

    Args:
        x_ND: Normalized tokens.
        b_dec: [D], subtracted from them; or [S, D], the first for the first N / S tokens and F / S latents, and so on.
        weight_FD: Encoder rows.
        b_enc: [F] Encoder bias.
        pre_NF: (x - b_dec) weight^T + b_enc, computed without gradient: the choice was made from it, and its values
            are used. With several b_dec [N, F / S], each token's own latents.
        indices: Chosen latents.
        bags: As in `decode`.
    """
    of_E, starts_N = bags or (None, None)
    out: Tensor = _Select.apply(x_ND, b_dec, weight_FD, b_enc, pre_NF, indices, of_E, starts_N)
    return out


class _Select(torch.autograd.Function):
    """The dense gradient of `gather((x - b_dec) W^T + b_enc)` is zero outside the gathered entries: only those."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        b_dec: Tensor,
        weight_FD: Tensor,
        _b_enc: Tensor,
        pre_NF: Tensor,
        indices: Tensor,
        of_E: Tensor | None,
        starts_N: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_ND, b_dec, weight_FD, indices, of_E, starts_N)
        ctx.precision = pre_NF.dtype
        if is_dense(indices):
            return pre_NF.to(x_ND.dtype, copy=True)
        own = indices if b_dec.ndim == 1 else indices % pre_NF.shape[1]
        if of_E is None:
            return pre_NF.gather(1, own).to(x_ND.dtype)
        return pre_NF.flatten()[of_E * pre_NF.shape[1] + own].to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, b_dec, weight_FD, indices, of_E, starts_N = ctx.saved_tensors
        needs_x, needs_b_dec, needs_weight, needs_b_enc = ctx.needs_input_grad[:4]
        bags = None if of_E is None else Bags(of_E, starts_N)
        latents = len(weight_FD)
        grad_x = decode(grad, indices, weight_FD, bags) if needs_x else None
        grad_b_enc = grad_b_dec = grad_weight = None
        if needs_b_enc or needs_b_dec:
            if is_dense(indices):
                grad_b_enc = grad.sum(dim=0)
            else:
                grad_b_enc = grad.new_zeros(latents).index_add_(0, indices.flatten(), grad.flatten())
        if needs_b_dec and grad_b_enc is not None:
            # The sum over tokens first: one row per latent instead of one per entry.
            parts = 1 if b_dec.ndim == 1 else len(b_dec)
            sums = zip(grad_b_enc.chunk(parts), weight_FD.chunk(parts), strict=True)
            grad_b_dec = -torch.stack([of_F @ rows_FD for of_F, rows_FD in sums]).view_as(b_dec)
        if needs_weight:
            centered_ND = x_ND - b_dec if b_dec.ndim == 1 else _centered(x_ND, b_dec)
            if pays_dense(indices.numel(), len(x_ND), latents):
                # As precise as the product that it belongs to.
                low = ctx.precision
                grad_weight = densify(grad, indices, latents, bags).to(low).T @ centered_ND.to(low)
                grad_weight = grad_weight.to(weight_FD.dtype)
            else:
                of_E = Bags.rows(indices).of_E if of_E is None else of_E
                grad_weight = _outer_sum(grad.flatten(), indices.flatten(), centered_ND, latents, of_E)
        return grad_x, grad_b_dec, grad_weight, grad_b_enc, None, None, None, None


def _centered(x_ND: Tensor, b_dec_SD: Tensor) -> Tensor:
    return (x_ND.view(len(b_dec_SD), -1, x_ND.shape[1]) - b_dec_SD[:, None]).view_as(x_ND)
