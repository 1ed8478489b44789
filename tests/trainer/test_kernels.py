"""The Triton kernels against their references, in Triton's interpreter: the same code, run on the CPU.

Skipped where Triton is not installed: it comes with torch for CUDA, and not with torch for the CPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tubelet_trainer.sae import kernels
from tubelet_trainer.sae.sparse_ops import Bags, decode_dense, densify


def case(n, k, f, d, dtype):
    """Codes, decoder, what flows back; the codes as rows of k, or as a list in which tokens keep different numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(n + k + f + d)
    values = torch.randn(n, k, generator=generator).to(device, dtype)
    weight = torch.randn(f, d, generator=generator).to(device, dtype)
    indices = torch.rand(n, f, generator=generator).argsort(dim=1)[:, :k].to(device)
    upstream = torch.randn(n, d, generator=generator).to(device, dtype)
    return values, weight, indices, upstream


# One block of channels and several, with and without a remainder; latents that no token uses; no token at all.
SHAPES = [(3, 2, 9, 5), (7, 4, 40, 256), (5, 3, 11, 300), (1, 1, 4, 513), (0, 2, 6, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equal", [True, False], ids=["rows", "list"])
@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_every_product_equals_its_reference(n, k, f, d, equal, dtype):
    values, weight, indices, upstream = case(n, k, f, d, dtype)
    bags = Bags.rows(indices)
    values, indices = values.flatten(), indices.flatten()
    if not equal:
        # Every third entry goes: some tokens keep fewer, one perhaps none.
        kept = torch.arange(n * k, device=indices.device) % 3 != 0
        values, indices = values[kept], indices[kept]
        bags = Bags.sorted(bags.of_E[kept], n)
    exact = [tensor.double().requires_grad_() for tensor in (values, weight)]
    expected = decode_dense(exact[0], indices, exact[1], bags)
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    found = kernels.bag_sum(values, indices, weight, bags.starts_N)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(kernels.dots(upstream, indices, weight, bags.of_E).double(), theirs[0], **tolerance)
    # The weight's gradient: bags are latents.
    by_latent, order = indices.sort(stable=True)
    latents = Bags.sorted(by_latent, f)
    summed = kernels.bag_sum(values[order], bags.of_E[order], upstream, latents.starts_N)
    torch.testing.assert_close(summed.double(), theirs[1], **tolerance)
    again = kernels.bag_sum(values[order], bags.of_E[order], upstream, latents.starts_N)
    assert torch.equal(summed, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: on a CPU the references are used")
def test_on_cuda_the_kernels_are_what_decodes():
    values, weight, indices, upstream = case(64, 8, 512, 300, torch.float32)
    values, weight = values.requires_grad_(), weight.requires_grad_()
    from tubelet_trainer.sae.sparse_ops import decode_sparse

    ours = torch.autograd.grad(decode_sparse(values, indices, weight), (values, weight), upstream)
    theirs = torch.autograd.grad(densify(values, indices, 512) @ weight, (values, weight), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
