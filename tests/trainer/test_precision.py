"""Laws of training in bfloat16: gradients of a whole step, and what thresholds learn."""

from __future__ import annotations

import pytest
import torch

from steps import seen
from tubelet_trainer.config import OptimizerConfig
from tubelet_trainer.losses.objective import AuxK, Objective, Reconstruction
from tubelet_trainer.losses.sparsity import sae_terms
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.optim.stacked import StackedSAEs
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sparse_ops import largest

D, F, N = 24, 192, 512
DEAD = slice(20, 60)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))]


def learner_of(config, terms, precision, device="cpu", seed=1):
    """A trainer whose SAE is in general position, with some latents dead."""
    generator = torch.Generator().manual_seed(seed)
    sae = SAE(config, Normalization(torch.randn(D, generator=generator), torch.tensor(2.5))).train()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        # What is dead seldom fires, and learns from AuxK.
        sae.W_enc[DEAD] *= 0.1
    sae.normalize_decoder()
    sae_trainer = SAETrainer(sae.to(device), Objective(terms), OptimizerConfig(), 100, 1000, precision)
    sae_trainer.dead_latents.silent_tokens_F[DEAD] = 10**6
    sae_trainer.dead_latents.dead_count = 40
    return sae_trainer


def tokens(device="cpu", rows=N):
    return (torch.randn(rows, D, generator=torch.Generator().manual_seed(0)) * 3 + 2).to(device)


def step_of(sae_trainers, x):
    """Views, and gradients of each SAE's whole loss, as a step computes them."""
    stacked = StackedSAEs(sae_trainers, "h")
    batch, normalized = seen(sae_trainers[0], x)
    stacked.begin(0, batch)
    forwards, totals = stacked.losses(batch, normalized)
    torch.autograd.backward([total.loss for total in totals])
    return forwards, [
        {n: p.grad.double() for n, p in sae_trainer.sae.named_parameters()} for sae_trainer in sae_trainers
    ]


def dense_gradients(sae, forward, dead_k):
    """Of main and auxiliary loss, and of the main loss, by the formulas: dense codes in float64, the choice as made."""
    w = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    x = forward.x_BD.double()
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    recon = (pre * (forward.codes.dense(F) != 0)) @ w["W_dec"] + w["b_dec"]
    main = (x - recon).square().sum(dim=1).mean() / D
    residual = (x - recon).detach()
    values, indices = largest(forward.pre_BF.masked_fill(~forward.dead_F, -torch.inf), dead_k)
    chosen = torch.zeros_like(pre).scatter(1, indices, (values > 0).double())
    missed = (residual - (pre * chosen) @ w["W_dec"]).square().sum()
    auxiliary = 4.0 * missed / (residual - residual.mean(dim=0)).square().sum()
    losses = (main + auxiliary, main)
    return [
        dict(zip(w, torch.autograd.grad(loss, list(w.values()), retain_graph=True), strict=True)) for loss in losses
    ]


KINDS = {
    "topk": TopKConfig(latents=F, k=5),
    "topk, dense": TopKConfig(latents=F, k=60),
    "batchtopk": BatchTopKConfig(latents=F, k=5),
    "abstopk": AbsTopKConfig(latents=F, k=5),
    "relu": ReLUConfig(latents=F),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [1, 2], ids=["alone", "two together"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_whole_step_in_bfloat16_equal_the_dense_formulas(kind, together, device):
    sae_trainers = [
        learner_of(KINDS[kind], [Reconstruction(D), AuxK(7, 4.0)], torch.bfloat16, device, seed)
        for seed in range(together)
    ]
    forwards, found = step_of(sae_trainers, tokens(device))
    for sae_trainer, forward, gradients in zip(sae_trainers, forwards, found, strict=True):
        assert forward.pre_BF.dtype == torch.bfloat16
        expected, main = dense_gradients(sae_trainer.sae, forward, 7)
        for name, exact in expected.items():
            # bfloat16 keeps 8 bits: products of rounded numbers are off by some thousandths.
            for part in (slice(None), DEAD) if name != "b_dec" else (slice(None),):
                size = exact[part].norm()
                error = float((gradients[name][part] - exact[part]).norm() / size)
                assert 0 < error < 0.015, (name, part, error)
            if name != "b_dec":
                assert (main[name][DEAD] - exact[DEAD]).norm() > 0.1 * exact[DEAD].norm(), "AuxK's part goes unseen"


@pytest.mark.parametrize("device", DEVICES)
def test_thresholds_learn_the_same_in_bfloat16(device):
    """A kernel of 1e-3 is narrower than the steps of bfloat16, 1/128 around 1."""
    config = JumpReLUConfig(latents=F, bandwidth=1e-3, sparsity=0.1, sparsity_warmup_steps=0)
    found = []
    for precision in (torch.float32, torch.bfloat16):
        sae_trainer = learner_of(config, sae_terms(config, D, float(D), 100, torch.device(device)), precision, device)
        ((forward,), (gradients,)) = step_of([sae_trainer], tokens(device, rows=4096))
        threshold = sae_trainer.sae.sparsifier.threshold
        hits = ((forward.pre_BF - threshold).abs() < 0.5e-3).sum(dim=0)
        assert hits.sum() > 50
        found.append((hits, gradients["sparsifier.log_threshold"]))
    (hits, exact), (low_hits, low) = found
    assert torch.equal(hits, low_hits)
    # The decoder's product is rounded, so the loss's part of the gradient is.
    assert (low - exact).norm() < 0.01 * exact.norm()
