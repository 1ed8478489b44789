"""Laws of the SAE and its parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_trainer.config import OptimizerConfig
from tubelet_trainer.losses.objective import AuxK, Forward, Objective, Reconstruction
from tubelet_trainer.optim.dead_latents import DeadLatentTracker
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.sae.config import BatchTopKConfig, SAEConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sae_files import load_sae, save_sae
from tubelet_trainer.sae.sparse_ops import Bags, decode_dense, decode_sparse, largest, select

D, F, N = 12, 96, 40
KINDS = [TopKConfig(latents=F, k=5), BatchTopKConfig(latents=F, k=5)]


def tokens(seed=0, rows=N):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def make_sae(config: SAEConfig, seed=1):
    """A float64 SAE whose every tensor is in general position."""
    generator = torch.Generator().manual_seed(seed)
    normalization = Normalization(torch.randn(D, generator=generator), torch.tensor(2.5))
    sae = SAE(config, normalization).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sae.normalize_decoder()
    return sae


def dense_forward(sae, x_raw, threshold=None):
    """The formulas, written with dense codes and plain autograd: codes [N, F] and reconstruction, normalized space."""
    x = (x_raw - sae.normalization.mean) / sae.normalization.scale
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    if isinstance(sae.config, TopKConfig):
        cut = pre.detach().topk(sae.config.k, dim=1).values[:, -1:]
    elif threshold is None:
        cut = pre.detach().flatten().topk(sae.config.k * len(x)).values[-1]
    else:
        cut = threshold
    codes = torch.where(pre >= cut, pre, 0)
    return x, codes, codes @ sae.W_dec + sae.b_dec


def gradients(sae, loss):
    return torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)


@given(n=st.integers(1, 5), k=st.integers(1, 4), f=st.integers(4, 9), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_sparse_decode_equals_dense_in_value_and_gradient(n, k, f, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(f, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(n, f, generator=generator).argsort(dim=1)[:, :k]
    upstream = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    outs = [op(values, indices, weight) for op in (decode_sparse, decode_dense)]
    torch.testing.assert_close(outs[0], outs[1])
    for sparse, dense in zip(*(torch.autograd.grad(out, (values, weight), upstream) for out in outs), strict=True):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("latents", [9, 60], ids=["dense branch", "sparse branch"])
def test_select_has_the_gradient_of_a_gather(latents):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 3), (latents, 3), (latents,))
    )
    indices = torch.rand(4, latents, generator=generator).argsort(dim=1)[:, :3]

    b_dec = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (x, b_dec, weight, bias)

    def pre(x, b_dec, weight, bias):
        return (x - b_dec) @ weight.T + bias

    def chosen(*inputs):
        return select(*inputs, pre(*inputs).detach(), indices)

    upstream = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(pre(*inputs).gather(1, indices), inputs, upstream)
    found = torch.autograd.grad(chosen(*inputs), inputs, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert gradcheck(chosen, inputs)


@given(rows=st.integers(1, 4), length=st.integers(1, 300), share=st.floats(0.01, 1), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_largest_in_two_stages_are_the_largest(rows, length, share, seed):
    x = torch.randn(rows, 4 * length, generator=torch.Generator().manual_seed(seed))
    k = max(1, int(share * 4 * length))
    values, places = largest(x, k)
    assert torch.equal(values, x.gather(1, places))
    assert torch.equal(values.sort(dim=1).values, x.topk(k, dim=1).values.sort(dim=1).values)
    assert all(len(row.unique()) == k for row in places)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_tokens_that_keep_different_numbers_decode_and_select_as_dense_codes(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x, b_dec, b_enc = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((30, 3), (len(counts), 3), (3,), (30,))
    )
    latents = [torch.randperm(30, generator=generator)[:count].sort().values for count in counts]
    indices = torch.cat(latents)
    of_E = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    bags = Bags.sorted(of_E, len(counts))
    values = torch.randn(len(indices), generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(counts), 3, generator=generator, dtype=torch.float64)
    outs = [op(values, indices, weight, bags) for op in (decode_sparse, decode_dense)]
    torch.testing.assert_close(outs[0], outs[1])
    for sparse, dense in zip(*(torch.autograd.grad(out, (values, weight), upstream) for out in outs), strict=True):
        torch.testing.assert_close(sparse, dense)
    pre = (x - b_dec) @ weight.T + b_enc
    found = select(x, b_dec, weight, b_enc, pre.detach(), indices, bags)
    expected = pre[of_E, indices]
    torch.testing.assert_close(found, expected)
    inputs, fixed = (x, b_dec, weight, b_enc), values.detach()
    ours, theirs = (torch.autograd.grad((out * fixed).sum(), inputs) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_main_loss_and_gradients_equal_the_dense_formulas(config):
    sae = make_sae(config).train()
    x_raw = tokens()
    forward = Forward.of(sae, sae.normalization(x_raw), torch.zeros(F, dtype=torch.bool))
    x, codes, recon = dense_forward(sae, x_raw)
    torch.testing.assert_close(forward.recon_BD, recon)
    found = Reconstruction(7.0)(forward).loss
    expected = (x - recon).square().sum(dim=1).mean() / 7.0
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(sae, found), gradients(sae, expected), strict=True):
        torch.testing.assert_close(a, b)
    assert (codes > 0).sum() == 5 * N or isinstance(config, TopKConfig)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_auxk_and_its_gradients_equal_the_dense_formulas(config):
    sae = make_sae(config).train()
    x_raw = tokens()
    dead = torch.rand(F, generator=torch.Generator().manual_seed(3)) < 0.4
    forward = Forward.of(sae, sae.normalization(x_raw), dead)
    found = AuxK(7, 1 / 32)(forward).loss
    x, _, recon = dense_forward(sae, x_raw)
    residual = (x - recon).detach()
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).masked_fill(~dead, -torch.inf)
    kept = torch.where(pre >= pre.topk(7, dim=1).values[:, -1:], pre, 0).relu()
    error = (residual - kept @ sae.W_dec).square().sum()
    expected = error / (residual - residual.mean(dim=0)).square().sum() / 32
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(sae, found), gradients(sae, expected), strict=True):
        torch.testing.assert_close(a, b)


def test_auxk_reaches_the_encoder_of_dead_latents_and_of_no_other():
    sae = make_sae(TopKConfig(latents=F, k=5))
    dead = torch.zeros(F, dtype=torch.bool)
    dead[10:30] = True
    W_enc, b_enc, W_dec, _ = gradients(sae, AuxK(6, 1.0)(Forward.of(sae, sae.normalization(tokens()), dead)).loss)
    for gradient in (W_enc.abs().sum(dim=1), b_enc.abs(), W_dec.abs().sum(dim=1)):
        assert (gradient[dead] > 0).float().mean() > 0.8
        assert (gradient[~dead] == 0).all()


def test_auxk_is_zero_without_dead_latents_and_where_it_is_not_a_number():
    sae = make_sae(TopKConfig(latents=F, k=5))
    assert AuxK(6, 1.0)(Forward.of(sae, sae.normalization(tokens()), torch.zeros(F, dtype=torch.bool))).loss == 0
    same = tokens(rows=1).expand(4, D)
    nobody_differs = AuxK(6, 1.0)(Forward.of(sae, sae.normalization(same), torch.ones(F, dtype=torch.bool))).loss
    assert nobody_differs == 0 or nobody_differs.isfinite()


def test_terms_add_up_and_each_reports():
    sae = make_sae(TopKConfig(latents=F, k=5))
    forward = Forward.of(sae, sae.normalization(tokens()), torch.ones(F, dtype=torch.bool))
    parts = [Reconstruction(float(D)), AuxK(6, 0.5)]
    total = Objective(parts)(forward)
    torch.testing.assert_close(total.loss, sum(part(forward).loss for part in parts))
    assert set(total.metrics) == {"loss", "reconstruction", "fvu", "l0", "dead", "auxk"}


def test_a_latent_is_dead_when_it_was_silent_for_long_and_alive_once_it_fires():
    sae = make_sae(TopKConfig(latents=F, k=5))
    tracker = DeadLatentTracker(F, dead_after_tokens=2 * N, device=torch.device("cpu"))
    codes = sae.encode_sparse(tokens())
    fired = torch.zeros(F, dtype=torch.bool)
    fired[codes.indices[codes.values > 0]] = True
    assert 0 < fired.sum() < F
    for _ in range(3):
        assert not tracker.dead_F.any()
        tracker.update(codes)
    assert torch.equal(tracker.dead_F, ~fired)


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_folding_changes_neither_codes_nor_reconstructions(config):
    sae = make_sae(config).train()
    sae(tokens())
    sae.eval()
    folded = sae.fold()
    x = tokens(5)
    assert (folded.normalization.mean == 0).all()
    assert folded.normalization.scale == 1
    torch.testing.assert_close(folded.encode(x), sae.encode(x))
    torch.testing.assert_close(folded(x), sae(x))


def test_dense_and_sparse_faces_agree():
    sae = make_sae(TopKConfig(latents=F, k=5))
    x = tokens()
    values, indices = sae.encode_sparse(x)
    assert values.shape == indices.shape == (N, 5)
    torch.testing.assert_close(sae.encode(x).gather(1, indices), values)
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))
    assert ((sae.encode(x) > 0).sum(dim=1) <= 5).all()


def test_encoder_and_decoder_start_alike_and_share_no_storage():
    sae = SAE(TopKConfig(latents=F, k=5), Normalization.identity(D))
    assert torch.equal(sae.W_enc, sae.W_dec)
    storages = {parameter.untyped_storage().data_ptr() for parameter in sae.parameters()}
    assert len(storages) == 4
    with torch.no_grad():
        sae.W_enc.zero_()
    assert (sae.W_dec.norm(dim=1) > 0.99).all()


def test_the_projected_gradient_is_orthogonal_to_every_row():
    sae = make_sae(TopKConfig(latents=F, k=5))
    Reconstruction(1.0)(Forward.of(sae, sae.normalization(tokens()), torch.zeros(F, dtype=torch.bool))).loss.backward()
    sae.project_decoder_gradient()
    assert sae.W_dec.grad.abs().max() > 0
    assert (sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max() < 1e-12


def test_normalized_tokens_are_centered_and_have_mean_squared_norm_d():
    x = tokens(rows=500).numpy()
    normalized = Normalization.from_moments(Moments.of(x))(torch.from_numpy(x))
    assert normalized.mean(dim=0).abs().max() < 1e-5
    assert math.isclose(normalized.square().sum(dim=1).mean(), D, rel_tol=1e-5)
    torch.testing.assert_close(
        Normalization.from_moments(Moments.of(x)).double().inverse(normalized),
        torch.from_numpy(x),
        rtol=1e-6,
        atol=1e-6,
    )


def test_constant_tokens_are_refused():
    with pytest.raises(TubeletError, match="total variance 0"):
        Normalization.from_moments(Moments.of(np.ones((9, D))))


def test_batchtopk_spends_one_budget_over_the_whole_batch():
    sae = make_sae(BatchTopKConfig(latents=F, k=5)).train()
    x = tokens()
    x[: N // 2] *= 10
    per_token = (sae.encode(x) > 0).sum(dim=1)
    assert per_token.sum() == 5 * N
    assert per_token.min() < per_token.max()


def test_batchtopk_inference_does_not_depend_on_the_batch():
    sae = make_sae(BatchTopKConfig(latents=F, k=5)).train()
    sae(tokens())
    sae.eval()
    x = tokens(9)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in x]), sae.encode(x))
    _, dense, _ = dense_forward(sae, x, threshold=sae.sparsifier.threshold)
    torch.testing.assert_close(sae.encode(x), dense)


def test_batchtopk_threshold_follows_the_smallest_kept_value():
    config = BatchTopKConfig(latents=F, k=5, threshold_momentum=0.25)
    sae = make_sae(config).train()
    kept = []
    for seed in range(3):
        values = sae.encode_sparse(tokens(seed)).values.detach()
        kept.append(float(values[values > 0].min()))
    expected = kept[0]
    for value in kept[1:]:
        expected += 0.25 * (value - expected)
    assert math.isclose(sae.sparsifier.threshold, expected, rel_tol=1e-9)


def test_a_short_batch_moves_the_threshold_by_its_share_of_a_whole_one():
    """The smallest value of one token is far above that of a batch: the last batch of a run must not decide."""
    sae = make_sae(BatchTopKConfig(latents=F, k=5)).train()
    sae_trainer = SAETrainer(sae, Objective([Reconstruction(1.0)]), OptimizerConfig(), 100, 1000, batch_tokens=N)
    sae_trainer.begin(20, N)
    sae(tokens())
    before = float(sae.sparsifier.threshold)
    sae_trainer.begin(20, 1)
    values = sae.encode_sparse(tokens(1)[:1]).values.detach()
    smallest = float(values[values > 0].min())
    # Ten steps' worth of memory after 21 steps, and one token of N.
    expected = before + 10 / 21 / N * (smallest - before)
    assert math.isclose(sae.sparsifier.threshold, expected, rel_tol=1e-6)
    assert not math.isclose(before, smallest, rel_tol=0.1)


def test_tokens_of_another_shape_are_refused_with_the_right_one():
    sae = make_sae(TopKConfig(latents=F, k=5)).eval()
    for wrong in (torch.randn(2, 3, D + 1), torch.randn(4, D - 1), torch.randn(())):
        with pytest.raises(TubeletError, match=rf"the SAE takes \[\.\.\., {D}\]"):
            sae.encode(wrong)


def test_batchtopk_takes_a_batch_in_which_nothing_is_positive():
    sae = make_sae(BatchTopKConfig(latents=F, k=5)).train()
    sae(tokens())
    before = sae.sparsifier.threshold.clone()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    forward = Forward.of(sae, sae.normalization(tokens()), torch.zeros(F, dtype=torch.bool))
    assert (forward.codes.values == 0).all()
    assert torch.equal(sae.sparsifier.threshold, before)
    Reconstruction(1.0)(forward).loss.backward()
    assert (sae.W_enc.grad == 0).all()


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
def test_a_saved_sae_loads_equal(tmp_path, config):
    sae = make_sae(config).float().train()
    x = tokens().float()
    sae(x)
    sae.eval()
    save_sae(tmp_path, sae, {"hook": "h"})
    loaded = load_sae(tmp_path)
    assert not loaded.training
    assert loaded.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_a_missing_or_damaged_sae_is_named(tmp_path):
    with pytest.raises(TubeletError, match=r"sae\.json is missing"):
        load_sae(tmp_path)
    save_sae(tmp_path, make_sae(KINDS[0]).float(), {})
    whole = (tmp_path / "sae.safetensors").read_bytes()
    (tmp_path / "sae.safetensors").write_bytes(whole[:-100])
    with pytest.raises(TubeletError, match=r"sae\.safetensors"):
        load_sae(tmp_path)


def test_more_active_latents_than_latents_are_refused():
    with pytest.raises(TubeletError, match="exceeds the 12 latents"):
        SAE(TopKConfig(expansion=1, k=13), Normalization.identity(D))
