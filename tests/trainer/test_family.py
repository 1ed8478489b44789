"""Laws of the SAE family: every combination of parts against its formulas, written with dense codes in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from steps import see, take_step
from tubelet.config import Config, validate
from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_trainer.config import OptimizerConfig
from tubelet_trainer.losses.objective import AuxK, Forward, Objective, Reconstruction
from tubelet_trainer.losses.sparsity import PenaltyWeight, sae_terms
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.sae.config import (
    AbsTopKConfig,
    AnySAEConfig,
    BatchTopKConfig,
    GatedConfig,
    Groups,
    Hierarchical,
    InitConfig,
    JumpReLUConfig,
    NestedK,
    NormalizationConfig,
    RandomPrefixes,
    ReLUConfig,
    TopKConfig,
)
from tubelet_trainer.sae.init import Offset, geometric_median, initialize
from tubelet_trainer.sae.matryoshka import cuts
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sae_files import load_sae, save_sae
from tubelet_trainer.sae.sparse_ops import decode_groups

D, F, N, K = 12, 96, 40, 6
NO_DEAD = torch.zeros(F, dtype=torch.bool)
CPU = torch.device("cpu")
KINDS = {
    "relu": ReLUConfig,
    "gated": GatedConfig,
    "jumprelu": JumpReLUConfig,
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "abstopk": AbsTopKConfig,
}
NESTINGS = {
    "flat": {},
    "groups": {"kind": "groups", "fractions": [0.1, 0.3, 0.6], "weights": [3, 1, 2]},
    "random": {"kind": "random", "prefixes": 4},
    "ks": {"kind": "ks", "ks": [1, 3, 6], "weights": "reverse"},
    "hierarchical": {"kind": "hierarchical"},
}
PER_TOKEN_K = ("topk", "abstopk")
COMBINATIONS = [
    (kind, nesting)
    for kind in KINDS
    for nesting in NESTINGS
    if kind in PER_TOKEN_K or nesting not in ("ks", "hierarchical")
]


def tokens(seed=0, rows=N):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 2


def recipe(kind, nesting="flat", **fields):
    k = {"k": K} if hasattr(KINDS[kind](), "k") else {}
    return KINDS[kind].model_validate({"latents": F, "nesting": NESTINGS[nesting], **k, **fields})


def make_sae(config, seed=1):
    """A float64 SAE whose every tensor is in general position."""
    generator = torch.Generator().manual_seed(seed)
    normalization = Normalization(torch.randn(D, generator=generator), torch.tensor(2.5))
    sae = SAE(config, normalization).double().train()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sae.normalize_decoder()
    return sae


def dense(sae, x_raw, step=0):
    """x, pre, codes [N, F] and the loss of the reconstruction, from the formulas."""
    config = sae.config
    x = (x_raw - sae.normalization.mean) / sae.normalization.scale
    linear = (x - sae.b_dec) @ sae.W_enc.T
    pre = linear + sae.b_enc
    match config.kind:
        case "relu":
            codes = pre.relu()
        case "gated":
            codes = (pre > 0) * (sae.sparsifier.r_mag.exp() * linear + sae.sparsifier.b_mag).relu()
        case "jumprelu":
            codes = torch.where(pre > sae.sparsifier.threshold.detach(), pre, 0)
        case "topk":
            codes = torch.where(pre >= pre.topk(K).values[:, -1:], pre, 0).relu()
        case "batchtopk":
            codes = torch.where(pre >= pre.flatten().topk(K * len(x)).values[-1], pre, 0).relu()
        case "abstopk":
            codes = torch.where(pre.abs() >= pre.abs().topk(K).values[:, -1:], pre, 0)
    return x, pre, codes, dense_loss(sae, x, codes, step)


def dense_loss(sae, x, codes, step):
    nesting = sae.config.nesting

    def error(part):
        return (x - part @ sae.W_dec - sae.b_dec).square().sum(dim=1).mean() / D

    ranks = codes.detach().abs().argsort(dim=1, descending=True).argsort(dim=1)
    match nesting.kind:
        case "flat":
            return error(codes)
        case "groups":
            # 0.1, 0.4 and all of 96 latents; the bias alone counts as much as the mean of 3, 1, 2.
            prefixes = [torch.where(torch.arange(F) < end, codes, 0) for end in (10, 38, F)]
            terms = [(2, codes * 0), *zip((3, 1, 2), prefixes, strict=True)]
        case "random":
            ends = cuts(nesting, F, 0, sae.config.seed, step).ends
            terms = [(1, torch.where(torch.arange(F) < end, codes, 0)) for end in ends]
        case "ks":
            terms = [(weight, torch.where(ranks < k, codes, 0)) for weight, k in ((3, 1), (2, 3), (1, 6))]
        case "hierarchical":
            terms = [(1, torch.where(ranks < k, codes, 0)) for k in range(1, K + 1)]
    return sum(weight * error(part) for weight, part in terms) / sum(weight for weight, _ in terms)


def gradients(sae, loss):
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(sae.named_parameters(), found, strict=True)}


def same_gradients(found, expected, but=()):
    for name in expected.keys() - set(but):
        a, b = (torch.zeros(()) if g is None else g for g in (found[name], expected[name]))
        torch.testing.assert_close(a, b.expand_as(a) if b.ndim == 0 else b, check_dtype=False, msg=name)


@pytest.mark.parametrize(("kind", "nesting"), COMBINATIONS)
def test_every_combination_equals_the_dense_formulas_in_value_and_gradient(kind, nesting):
    sae = make_sae(recipe(kind, nesting))
    forward = replace(Forward.of(sae, sae.normalization(tokens()), NO_DEAD), step=3)
    _, _, codes, expected = dense(sae, tokens(), step=3)
    torch.testing.assert_close(sae.encode(tokens()), codes)
    found = Reconstruction(D)(forward).loss
    torch.testing.assert_close(found, expected)
    # Thresholds have a pseudo-derivative, which has a test of its own.
    same_gradients(gradients(sae, found), gradients(sae, expected), but=["sparsifier.log_threshold"])


def test_the_gradient_of_grouped_decoding_is_right():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(4, 9, generator=generator).argsort(dim=1)[:, :5]
    # Empty groups, a token without any entry in a group, entries beyond the last group.
    group = torch.tensor([[0, 0, 1, 2, 2], [1, 1, 1, 1, 1], [2, 2, 2, 2, 2], [0, 2, 2, 2, 2]])
    out = decode_groups(values, indices, group, 2, weight)
    expected = torch.stack([((values * (group == g))[..., None] * weight[indices]).sum(dim=1) for g in range(2)], dim=1)
    torch.testing.assert_close(out, expected)
    assert gradcheck(lambda v, w: decode_groups(v, indices, group, 2, w), (values, weight))


@pytest.mark.parametrize(
    "nesting",
    [
        Groups(fractions=(1.0,), bias_alone=False),
        RandomPrefixes(prefixes=1),
        NestedK(ks=(K,)),
        Hierarchical(levels=(K,)),
    ],
    ids=lambda n: n.kind,
)
def test_matryoshka_with_one_prefix_is_the_plain_sae(nesting):
    plain, nested = (make_sae(TopKConfig(latents=F, k=K, nesting=n)) for n in ({"kind": "flat"}, nesting))
    losses = [Reconstruction(D)(Forward.of(sae, sae.normalization(tokens()), NO_DEAD)).loss for sae in (plain, nested)]
    assert torch.equal(*losses)
    ours, theirs = gradients(nested, losses[1]), gradients(plain, losses[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_random_prefixes_are_drawn_per_step_and_repeat():
    nesting = RandomPrefixes(prefixes=10, power=0.5)
    drawn = [cuts(nesting, 4096, 0, seed=5, step=step).ends for step in range(300)]
    assert drawn == [cuts(nesting, 4096, 0, seed=5, step=step).ends for step in range(300)]
    assert len(set(drawn)) > 290
    assert all(len(ends) == 10 and ends[-1] == 4096 and list(ends) == sorted(set(ends)) for ends in drawn)
    # P(length <= l) is proportional to 1 - l^-1/2.
    first = [cuts(RandomPrefixes(prefixes=2), 4096, 0, 0, step).ends[0] for step in range(1000)]
    for length in (4, 83, 1000):
        assert abs(np.mean(np.array(first) <= length) - (1 - length**-0.5) / (1 - 4095**-0.5)) < 0.05


def test_the_default_levels_of_nested_k_are_halves():
    assert cuts(NestedK(), F, 32, 0, 0).ends == (4, 8, 16, 32)
    reverse = cuts(NestedK(weights="reverse"), F, 32, 0, 0).weights
    assert all(a > b for a, b in pairwise(reverse))


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "abstopk"])
def test_auxk_reaches_the_encoder_of_dead_latents_for_every_kind_with_a_k(kind):
    sae = make_sae(recipe(kind))
    dead = torch.zeros(F, dtype=torch.bool)
    dead[10:30] = True
    found = gradients(sae, AuxK(6, 1.0)(Forward.of(sae, sae.normalization(tokens()), dead)).loss)
    for name in ("W_enc", "b_enc", "W_dec"):
        strength = found[name].abs().reshape(F, -1).sum(dim=1)
        assert (strength[dead] > 0).float().mean() > 0.8
        assert (strength[~dead] == 0).all()


def test_l0_is_the_configured_one():
    for kind in ("topk", "abstopk", "batchtopk"):
        codes = make_sae(recipe(kind)).encode(tokens())
        assert (codes != 0).sum() == K * N
    assert (make_sae(recipe("abstopk")).encode(tokens()) < 0).any()


def test_thresholds_learn_by_the_rectangle_kernel_around_pre_activations():
    sae = make_sae(recipe("jumprelu"))
    x = tokens()
    forward = Forward.of(sae, sae.normalization(x), NO_DEAD)
    pre, theta, width = forward.pre_BF, sae.sparsifier.threshold.detach(), sae.config.bandwidth
    kernel = (((pre - theta) / width).abs() < 0.5).double()
    below = kernel * (pre < theta)
    assert below.sum() > 0, "nothing lies below its threshold: the test would not tell pre- from post-activations"

    l0 = sae.sparsifier.active(pre) / N
    torch.testing.assert_close(l0.detach(), (pre > theta).double().sum() / N)
    found = gradients(sae, l0)
    # d/d log theta = theta d/d theta
    torch.testing.assert_close(found["sparsifier.log_threshold"], -theta / width * kernel.sum(dim=0) / N)
    assert all(g is None for name, g in found.items() if name != "sparsifier.log_threshold")

    upstream = torch.randn(N, F, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gradients(sae, (forward.codes.values * upstream).sum())
    expected = -(theta / width) * (kernel * upstream).sum(dim=0) * theta
    torch.testing.assert_close(found["sparsifier.log_threshold"], expected)


@pytest.mark.parametrize("penalty", ["linear", "quadratic"])
def test_both_l0_penalties(penalty):
    sae = make_sae(recipe("jumprelu", penalty=penalty, target_l0=7.0, sparsity=0.25, sparsity_warmup_steps=0))
    term = sae_terms(sae.config, D, float(D), 100, CPU)[1]
    forward = Forward.of(sae, sae.normalization(tokens()), NO_DEAD)
    l0 = (forward.codes.values > 0).sum() / N
    expected = 0.25 * (l0 if penalty == "linear" else (l0 / 7 - 1) ** 2)
    torch.testing.assert_close(term(forward).loss, expected, check_dtype=False)


@pytest.mark.parametrize("nesting", ["flat", "random"])
def test_the_l1_penalty_equals_its_formula(nesting):
    sae = make_sae(recipe("relu", nesting, sparsity=0.3, sparsity_warmup_steps=0))
    found = sae_terms(sae.config, D, float(D), 100, CPU)[1](
        replace(Forward.of(sae, sae.normalization(tokens()), NO_DEAD), step=2)
    ).loss
    _, _, codes, _ = dense(sae, tokens())
    ends = cuts(sae.config.nesting, F, 0, 0, 2).ends
    expected = 0.3 * sum(codes[:, :end].sum() for end in ends) / len(ends) / N
    torch.testing.assert_close(found, expected)
    same_gradients(gradients(sae, found), gradients(sae, expected))


def test_the_gated_penalty_equals_its_formula():
    sae = make_sae(recipe("gated", sparsity=0.3, sparsity_warmup_steps=0))
    found = sae_terms(sae.config, D, float(D), 100, CPU)[1](Forward.of(sae, sae.normalization(tokens()), NO_DEAD)).loss
    x, pre, _, _ = dense(sae, tokens())
    frozen = x - pre.relu() @ sae.W_dec.detach() - sae.b_dec.detach()
    expected = 0.3 * pre.relu().sum() / N + frozen.square().sum() / (N * D)
    torch.testing.assert_close(found, expected)
    same_gradients(gradients(sae, found), gradients(sae, expected))


def test_a_penalty_warms_up_and_is_controlled_toward_its_target():
    weight = PenaltyWeight(2.0, warmup_steps=4, target_l0=None, device=CPU)
    found = []
    for step in range(6):
        weight.begin(step)
        found.append(round(float(weight.now()), 6))
    assert found == [0.4, 0.8, 1.2, 1.6, 2.0, 2.0]
    controlled = PenaltyWeight(1.0, warmup_steps=0, target_l0=8.0, device=CPU)
    for step in range(4000):
        # A plant in which twice the weight halves L0; it should settle at a weight of 16.
        controlled.begin(step)
        controlled.observe(128 / controlled.now())
    assert math.isclose(float(controlled.now()), 16, rel_tol=0.01)


def test_a_weight_that_runs_away_stays_in_bounds_and_comes_back():
    weight = PenaltyWeight(0.5, warmup_steps=0, target_l0=8.0, device=CPU)
    for step, (l0, limit, bound) in enumerate([(50.0, 1, 500.0)] * 900 + [(2.0, -1, 0.5e-3)] * 1600):
        weight.begin(step)
        weight.observe(torch.tensor(l0))
        assert 0.5e-3 * (1 - 1e-9) <= float(weight.now()) <= 500 * (1 + 1e-9)
        if step in (899, 2499):
            assert weight.at_limit() == limit
            assert math.isclose(float(weight.now()), bound, rel_tol=1e-9)
        if step == 910:
            # It turns at once, whatever it had to push against before.
            assert weight.at_limit() == 0
            assert float(weight.now()) < 500


def test_batchtopk_inference_looks_at_one_token_at_a_time():
    sae = make_sae(recipe("batchtopk"))
    sae(tokens())
    sae.eval()
    whole = sae.encode(tokens(4))
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in tokens(4)]), whole)
    assert torch.equal(whole > 0, dense(sae, tokens(4))[1] >= sae.sparsifier.threshold)


def test_batchtopk_finds_the_same_cut_where_one_token_takes_almost_all():
    sae = make_sae(recipe("batchtopk"))
    x = tokens()
    x[0] *= 1000
    _, _, codes, _ = dense(sae, x)
    assert (codes[0] > 0).sum() > 4 * K, "the shortcut over a few candidates per token went untested"
    torch.testing.assert_close(sae.encode(x), codes)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_folded_codes_are_the_same(kind, tmp_path):
    sae = make_sae(recipe(kind)).float()
    x = tokens().float()
    sae(x)
    sae.eval()
    save_sae(tmp_path, sae, {})
    loaded = load_sae(tmp_path)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    if kind in ("batchtopk", "jumprelu"):
        assert torch.equal(loaded.sparsifier.threshold, sae.sparsifier.threshold)
    folded = sae.double().fold()
    torch.testing.assert_close(folded.encode(x.double()), sae.encode(x.double()))
    torch.testing.assert_close(folded(x.double()), sae(x.double()))


@pytest.mark.parametrize("whitening", ["zca", "pca"])
def test_whitening_equalizes_directions_and_folds_away(whitening, tmp_path):
    mixer = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    raw = tokens(rows=4000) @ mixer + 5
    moments = Moments.of(raw.numpy())
    config = recipe("topk", normalization=NormalizationConfig(whitening=whitening, shrinkage=1e-9))
    normalization = Normalization.from_moments(moments, config.normalization)
    whitened = normalization.double()(raw)
    torch.testing.assert_close(
        torch.cov(whitened.T, correction=0), torch.eye(D, dtype=torch.float64), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(normalization.inverse(whitened), raw, atol=1e-4, rtol=1e-4)
    assert math.isclose(normalization.variance(moments), D, rel_tol=1e-5)
    if whitening == "zca":
        # Zero-phase: of all whitenings the one that moves the tokens least, so its matrix is symmetric.
        torch.testing.assert_close(normalization.whiten, normalization.whiten.T, atol=1e-4, rtol=1e-4)
    sae = SAE(config, normalization).double().eval()
    folded = sae.fold()
    torch.testing.assert_close(folded.encode(raw), sae.encode(raw), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded(raw), sae(raw), atol=1e-4, rtol=1e-4)
    assert folded.config.normalization.whitening == "none"
    save_sae(tmp_path, sae.float(), {})
    assert torch.equal(load_sae(tmp_path).encode(raw.float()), sae.encode(raw.float()))


def test_whitening_is_regularized_and_needs_a_covariance():
    flat = torch.cat([tokens(rows=500), torch.zeros(500, 2, dtype=torch.float64)], dim=1)
    normalization = Normalization.from_moments(Moments.of(flat.numpy()), NormalizationConfig(whitening="zca"))
    assert normalization.whiten.isfinite().all()
    assert normalization(flat.float()).isfinite().all()
    wide = Moments.of(np.random.default_rng(0).standard_normal((3, 1025)))
    with pytest.raises(TubeletError, match="up to 1024 channels"):
        Normalization.from_moments(wide, NormalizationConfig(whitening="pca"))


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True), (False, False)])
def test_centring_and_scaling_can_each_be_left_out(center, scale):
    moments = Moments.of(tokens(rows=500).numpy())
    normalization = Normalization.from_moments(moments, NormalizationConfig(center=center, scale=scale))
    x = normalization(tokens(rows=500).float())
    assert (float(x.mean(dim=0).abs().max()) < 1e-4) == center
    assert math.isclose(normalization.variance(moments), float(x.var(dim=0, correction=0).sum()), rel_tol=1e-4)
    assert math.isclose(normalization.variance(moments), D, rel_tol=1e-4) == scale


@pytest.mark.parametrize("directions", ["random", "data", "active_subspace"])
@pytest.mark.parametrize("bias", ["mean", "geometric_median"])
def test_initial_weights_are_tied_without_shared_storage(directions, bias):
    raw = tokens(rows=300).float()
    raw[:, 4:] *= 1e-3
    moments = Moments.of(raw.numpy())
    init = InitConfig(directions=directions, bias=bias, subspace=4)
    config = recipe("topk", init=init, normalization=NormalizationConfig(center=False))
    sae = SAE(config, Normalization.from_moments(moments, config.normalization))
    initialize(sae, moments, raw)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert len({parameter.untyped_storage().data_ptr() for parameter in sae.parameters()}) == 4
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    x = sae.normalization(raw)
    center = geometric_median(x) if bias == "geometric_median" else x.mean(dim=0)
    torch.testing.assert_close(sae.b_dec.detach(), center, atol=1e-4, rtol=1e-4)
    outside = sae.W_dec[:, 4:].norm(dim=1)
    # Only four directions vary: rows from data and from the subspace lie along them.
    assert (outside.max() < 0.01) == (directions == "active_subspace")
    if directions == "data":
        offsets = torch.nn.functional.normalize(x - sae.b_dec, dim=1)
        assert ((sae.W_dec @ offsets.T).max(dim=1).values > 0.97).float().mean() > 0.9


def test_the_geometric_median_minimizes_the_sum_of_distances():
    x = tokens()
    x[:5] += 100
    median = geometric_median(x)
    pull = ((x - median) / (x - median).norm(dim=1, keepdim=True)).sum(dim=0)
    assert pull.norm() < 1e-3
    assert (median - tokens().mean(dim=0)).norm() < (x.mean(dim=0) - tokens().mean(dim=0)).norm() / 5


def test_the_offset_predicts_dead_latents():
    x = tokens(rows=5000).numpy()
    offset = Offset.of(Moments.of(x))
    gamma = np.linalg.norm(x.mean(axis=0)) / np.sqrt(x.var(axis=0).sum())
    assert math.isclose(offset.gamma, gamma, rel_tol=1e-9)
    far = Offset.of(Moments.of(x + 1e4))
    assert offset.dead_share < 1e-6
    assert 0.49 < far.dead_share < 0.5


class Holder(Config):
    sae: AnySAEConfig


@pytest.mark.parametrize(
    ("sae", "words"),
    [
        ({"kind": "topk", "sparsty": 1}, "sae.sparsty"),
        ({"kind": "relu", "sparsty": 1}, "Did you mean 'sparsity'"),
        ({"kind": "jumprelu", "bandwith": 1}, "Did you mean 'bandwidth'"),
        ({"nesting": {"kind": "groups", "fraction": [1]}}, "Did you mean 'fractions'"),
        ({"nesting": {"kind": "random", "power": 0}}, "nesting"),
        ({"kind": "jumprelu", "penalty": "quadratic"}, "target_l0"),
        ({"kind": "batchtopk", "nesting": {"kind": "hierarchical"}}, "same k for each token"),
        ({"k": 8, "nesting": {"kind": "ks", "ks": [2, 4]}}, r"'sae\.nesting\.ks'.*end with k 8 \(given: \[2, 4\]\)"),
        ({"k": 8, "latents": 4}, r"'sae\.k'.*8 is more than the 4 latents"),
        ({"latents": 4}, r"'sae\.k'.*32 is more than the 4 latents"),
        ({"nesting": {"kind": "groups", "fractions": [0.5, 0.5], "weights": [1]}}, "1 weights for 2 fractions"),
        ({"init": {"direction": "data"}}, "Did you mean 'directions'"),
        ({"normalization": {"whitenning": "zca"}}, "Did you mean 'whitening'"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(sae, words):
    with pytest.raises(TubeletError, match=words):
        validate(Holder, {"sae": sae}, "the test")


def test_every_kind_is_chosen_by_its_name():
    for kind, model in KINDS.items():
        assert type(validate(Holder, {"sae": {"kind": kind}}, "the test").sae) is model


def learner_of(config, steps=400, dead_after=500, **options):
    sae = SAE(config, Normalization.identity(D))
    terms = sae_terms(config, D, float(D), steps, CPU)
    return SAETrainer(sae, Objective(terms), OptimizerConfig(lr=3e-3, **options), steps, dead_after)


def sparse_tokens(seed, rows=256):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(9)), dim=1)
    strength = torch.rand(rows, 24, generator=generator) * (torch.rand(rows, 24, generator=generator) < 0.1)
    x = strength @ directions
    return x * math.sqrt(D / 0.8)


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_l0_reaches_its_target(kind):
    sae_trainer = learner_of(recipe(kind, target_l0=5.0, sparsity=1e-2), steps=900)
    l0 = []
    for step in range(900):
        metrics = take_step(sae_trainer, sparse_tokens(step % 50), step)
        l0.append(metrics["l0"])
    assert abs(float(torch.stack(l0[-100:]).mean()) - 5.0) < 1.0
    assert float(torch.stack(l0[:20]).mean()) > 10


def test_jumprelu_reaches_its_target_with_everything_else_as_it_comes():
    config = JumpReLUConfig(target_l0=4.0)
    sae = SAE(config, Normalization.identity(D))
    steps = 800
    sae_trainer = SAETrainer(
        sae, Objective(sae_terms(config, D, float(D), steps, CPU)), OptimizerConfig(), steps, 10**6
    )
    last = [take_step(sae_trainer, sparse_tokens(step % 50, rows=128), step) for step in range(steps)][-100:]
    assert abs(float(torch.stack([metrics["l0"] for metrics in last]).mean()) - 4.0) < 1.0
    assert all(metrics["sparsity_limit"] == 0 for metrics in last)
    assert float(torch.stack([metrics["fvu"] for metrics in last]).mean()) < 0.25


@pytest.mark.parametrize("factor", [0.01, 300.0])
def test_thresholds_start_and_learn_alike_on_tokens_of_any_scale(factor, tmp_path):
    """Where tokens are not scaled, thresholds and kernel are as much larger as the tokens."""
    raw = tokens(rows=2000)
    views = []
    for config, x in (
        (recipe("jumprelu"), raw),
        (recipe("jumprelu", normalization=NormalizationConfig(scale=False)), raw * factor),
    ):
        moments = Moments.of(x.numpy())
        sae = SAE(config, Normalization.from_moments(moments, config.normalization)).train()
        forward = Forward.of(sae, sae.normalization(x.float()), NO_DEAD)
        l0 = sae.sparsifier.active(forward.pre_BF)
        views.append((sae, moments, forward, gradients(sae, l0)["sparsifier.log_threshold"]))
    (_, _, plain, expected), (sae, moments, unscaled, found) = views
    # Rounding moves a few of the 192,000 pre-activations over an edge.
    assert ((plain.codes.values > 0) != (unscaled.codes.values > 0)).float().mean() < 1e-4
    torch.testing.assert_close(found, expected, atol=0, rtol=0.02)
    torch.testing.assert_close(sae.sparsifier.threshold, torch.full((F,), math.sqrt(moments.total_variance / D)))
    # What was learned is read as it was written, and folds.
    x = raw[:N].float() * factor
    save_sae(tmp_path, sae, {})
    for other in (load_sae(tmp_path), sae.fold()):
        torch.testing.assert_close(other.sparsifier.threshold, sae.sparsifier.threshold)
        torch.testing.assert_close(other.encode(x), sae.encode(x), atol=1e-3 * factor, rtol=1e-3)


def test_k_is_annealed_from_the_channels_to_its_value():
    config = recipe("topk", k_anneal_steps=10)
    sae_trainer = learner_of(config)
    ks = [see(sae_trainer, sparse_tokens(0), step).codes.values.shape[1] for step in range(14)]
    assert ks[0] == D
    assert ks[10:] == [K] * 4
    assert ks == sorted(ks, reverse=True)


def test_the_running_mean_of_the_weights_is_what_comes_out():
    sae_trainer = learner_of(recipe("topk"), ema=0.9)
    mean = {name: p.detach().clone() for name, p in sae_trainer.sae.named_parameters()}
    for step in range(100):
        take_step(sae_trainer, sparse_tokens(step), step)
        # min(ema, (1 + t) / (10 + t)): 0.9 from step 80 on.
        decay = (1 + step) / (10 + step) if step < 80 else 0.9
        for name, parameter in sae_trainer.sae.named_parameters():
            mean[name].lerp_(parameter.detach(), 1 - decay)
    result = sae_trainer.result()
    torch.testing.assert_close(result.W_enc.detach(), mean["W_enc"])
    torch.testing.assert_close(result.W_dec.detach(), torch.nn.functional.normalize(mean["W_dec"], dim=1))
    assert not torch.equal(result.W_enc, sae_trainer.sae.W_enc)


def test_the_running_mean_of_a_short_run_has_learned_what_the_run_has():
    sae_trainer = learner_of(recipe("topk"), steps=300, ema=0.999)
    for step in range(300):
        take_step(sae_trainer, sparse_tokens(step % 50), step)
    x = sparse_tokens(99)
    fvu = []
    for sae in (sae_trainer.sae, sae_trainer.result()):
        error = (x - sae.eval()(x).detach()).square().sum()
        fvu.append(float(error / (x - x.mean(dim=0)).square().sum()))
    assert fvu[1] < 1.05 * fvu[0] < 0.5
    assert not torch.equal(sae_trainer.result().W_enc, sae_trainer.sae.W_enc)


def test_resampling_gives_dead_latents_bad_tokens_and_a_new_start():
    sae_trainer = learner_of(recipe("topk", auxk=0), dead_after=600, resample_every=10)
    with torch.no_grad():
        sae_trainer.sae.b_enc[:20] = -100
    for step in range(9):
        take_step(sae_trainer, sparse_tokens(step), step)
    assert 20 <= sae_trainer.dead_latents.dead_F.sum() < F
    before = {name: tensor.clone() for name, tensor in sae_trainer.state().items()}
    forward = see(sae_trainer, sparse_tokens(9), 9)
    take_step(sae_trainer, sparse_tokens(9), 9)
    state, x = sae_trainer.state(), sparse_tokens(9)
    dead = (before["dead_latents/silent_tokens"] + 256 > 600) & ~forward.codes.fired(F)
    cosine = torch.nn.functional.normalize(x - before["sae/b_dec"], dim=1) @ state["sae/W_dec"][dead].T
    assert (cosine.max(dim=0).values > 0.95).all()
    for name in ("W_enc", "b_enc", "W_dec"):
        assert (state[f"adam/{name}/exp_avg_sq"][dead] == 0).all()
        assert (state[f"adam/{name}/exp_avg"][dead] == 0).all()
    assert (state["dead_latents/silent_tokens"][dead] == 0).all()
    alive = ~dead
    assert (state["adam/W_dec/exp_avg_sq"][alive].sum(dim=1) > 0).any()
    ratio = state["sae/W_enc"][dead].norm(dim=1) / state["sae/W_enc"][alive].norm(dim=1).mean()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.2), atol=0.01, rtol=0)
    take_step(sae_trainer, sparse_tokens(10), 10)
    assert all(tensor.isfinite().all() for tensor in sae_trainer.state().values())
