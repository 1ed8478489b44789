"""The Triton kernels against their references, in Triton's interpreter: the same code, run on the CPU.

Skipped where Triton is not installed: it comes with torch for CUDA, and not with torch for the CPU.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, for its own functions too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from tubelet_trainer.sae import kernels
from tubelet_trainer.sae.sparse import decode_dense, densify


def case(n, k, f, d, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(n + k + f + d)
    values = torch.randn(n, k, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(f, d, generator=generator).to(device, dtype).requires_grad_()
    indices = torch.rand(n, f, generator=generator).argsort(dim=1)[:, :k].to(device)
    upstream = torch.randn(n, d, generator=generator).to(device, dtype)
    return values, weight, indices, upstream


# One block of channels and several, with and without a remainder; latents that no token uses; no token at all.
SHAPES = [(3, 2, 9, 5), (7, 4, 40, 256), (5, 3, 11, 300), (1, 1, 4, 513), (0, 2, 6, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_decoding_equals_the_reference_in_value_and_gradient(n, k, f, d, dtype):
    values, weight, indices, upstream = case(n, k, f, d, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (values, weight)]
    expected = decode_dense(exact[0], indices, exact[1])
    found = kernels.decode(values, indices, weight)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    ours = torch.autograd.grad(found, (values, weight), upstream)
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize(("n", "k", "f", "d"), SHAPES)
def test_the_encoder_gradient_on_active_latents_equals_the_reference(n, k, f, d):
    values, _, indices, rows = case(n, k, f, d, torch.float32)
    found = kernels.outer_sum(values.detach(), indices, rows, f)
    torch.testing.assert_close(found, densify(values.detach(), indices, f).T @ rows, atol=1e-4, rtol=1e-4)
    assert torch.equal(found, kernels.outer_sum(values.detach(), indices, rows, f))
