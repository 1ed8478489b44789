"""Laws of the objectives in time and space."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_trainer.config import ObjectiveConfig, PairsConfig, TrainConfig
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.pairs import PairDraw
from tubelet_trainer.data.source import Source
from tubelet_trainer.losses.coherence import Contrast, Smoothness, coherence_terms, info_nce, prefix_length
from tubelet_trainer.losses.objective import Forward
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, Groups, JumpReLUConfig, ReLUConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

D, F = 16, 48
NO_DEAD = torch.zeros(F, dtype=torch.bool)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Clips with a signal of their own that changes slowly, under noise."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 1, 1, D)) + 0.7 * rng.standard_normal((24, 6, 12, D))
    plan = make_plan(clips=24, clips_per_shard=8, grid=(6, 3, 4), hooks={"h": D})
    return make_store(tmp_path_factory.mktemp("coherence") / "s.zarr", plan, {"h": x.astype(np.float32)}, failed=(3,))


def naive_info_nce(u, v, clips, valid, similarity, temperature):
    """The formula, pair by pair."""

    def sim(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        if similarity == "cosine":
            dot /= math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        return dot / temperature

    total, count = 0.0, 0
    for i in range(len(u)):
        if not valid[i]:
            continue
        count += 1
        others = [j for j in range(len(u)) if valid[j] and clips[j] != clips[i]]
        own = math.exp(sim(u[i], v[i]))
        total -= math.log(own / (own + sum(math.exp(sim(u[i], v[j])) for j in others)))
        total -= math.log(own / (own + sum(math.exp(sim(u[j], v[i])) for j in others)))
    return total / (2 * count) if count else 0.0


@given(
    pairs=st.integers(1, 9), clips=st.integers(1, 4), seed=st.integers(0, 999),
    similarity=st.sampled_from(["cosine", "dot"]), temperature=st.sampled_from([0.1, 1.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_info_nce_is_the_formula(pairs, clips, seed, similarity, temperature):
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, pairs, 5))
    clip, valid = rng.integers(0, clips, pairs), rng.random(pairs) < 0.8
    found = info_nce(
        torch.from_numpy(u),
        torch.from_numpy(v),
        torch.from_numpy(clip),
        torch.from_numpy(valid),
        similarity,
        temperature,
    )
    expected = naive_info_nce(u.tolist(), v.tolist(), clip.tolist(), valid.tolist(), similarity, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_masked_pairs_and_tokens_of_the_same_clip_get_no_gradient():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    clip, valid = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([True, True, True, False, True, True])
    info_nce(u, v, clip, valid).backward()
    assert u.grad[3].abs().sum() == v.grad[3].abs().sum() == 0
    assert (u.grad[[0, 1, 2, 4, 5]].abs().sum(dim=1) > 0).all()
    u.grad = v.grad = None
    # Anchors 0 and 1 share a clip: what 1's neighbor is, is nothing to anchor 0.
    assert info_nce(u[:2], v[:2], clip[:2], valid[:2]).item() == pytest.approx(0, abs=1e-12)


def test_equal_neighbors_of_orthogonal_clips_are_distinguished():
    u = torch.eye(5, dtype=torch.float64)
    everything = torch.ones(5, dtype=torch.bool)
    assert float(info_nce(u, u, torch.arange(5), everything)) == pytest.approx(math.log(1 + 4 * math.exp(-10)))
    mixed_up = info_nce(u, u.roll(1, 0), torch.arange(5), everything)
    assert float(mixed_up) > 5


def batch_of(store, kinds=(True, True), anchors=40, block_patches=12):
    draw = PairDraw(PairsConfig(anchors=anchors), *kinds)
    loader = ActivationLoader(
        Source(store, "h", block_patches), np.arange(24), batch_tokens=64, window_tokens=2000, pairs=draw
    )
    return next(iter(loader))


def make_sae(config, mean=0.0):
    sae = SAE(config, Normalization(torch.full((D,), mean), torch.tensor(1.0)))
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(F, D, generator=torch.Generator().manual_seed(1)))
    return sae.train()


def forward_of(sae, batch):
    return Forward.of(sae, batch.tokens, NO_DEAD, batch=batch, hook="h")


KINDS = [
    TopKConfig(latents=F, k=4), BatchTopKConfig(latents=F, k=4), AbsTopKConfig(latents=F, k=4), ReLUConfig(latents=F),
    JumpReLUConfig(latents=F), TopKConfig(latents=F, k=4, nesting=Groups()),
]  # fmt: skip


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.kind}-{c.nesting.kind}")
@pytest.mark.parametrize("codes", ["pre", "post", "prefix"])
def test_every_objective_goes_with_every_kind(store, config, codes):
    sae = make_sae(config)
    buffers = {name: buffer.clone() for name, buffer in sae.sparsifier.named_buffers()}
    batch = batch_of(store)
    objective = ObjectiveConfig(lambda_t=0.1, lambda_s=0.2, lambda_smooth=0.3, lambda_slow=0.4, codes=codes)
    forward = forward_of(sae, batch)
    learned = {name: buffer.clone() for name, buffer in sae.sparsifier.named_buffers()}
    metrics = {}
    for term in coherence_terms(objective, config, F, 1.0):
        sae.zero_grad(set_to_none=True)
        found = term(forward)
        metrics |= found.metrics
        found.loss.backward(retain_graph=True)
        assert sae.W_enc.grad.abs().sum() > 0
    assert metrics.keys() >= {"temporal_nce", "temporal_dropped", "spatial_nce", "smoothness", "slow"}
    assert all(torch.isfinite(value).all() for value in metrics.values())
    # Neighbors teach the threshold nothing.
    assert all(torch.equal(buffer, learned[name]) for name, buffer in sae.sparsifier.named_buffers())
    assert not buffers or any(not torch.equal(buffers[name], learned[name]) for name in buffers)


def test_what_is_compared_are_the_anchors_and_their_neighbors(store):
    sae, batch = make_sae(KINDS[0]), batch_of(store)
    forward = forward_of(sae, batch)
    rows, pairs = batch.temporal.rows, batch.temporal
    for codes, width in (("pre", F), ("post", F), ("prefix", prefix_length(ObjectiveConfig(), KINDS[0], F))):

        def coded(x, codes=codes, width=width):
            pre = torch.nn.functional.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
            dense = pre.relu() if codes == "pre" else sae.encode(x)
            return dense[:, :width].detach().double()

        u, v = coded(batch.tokens[rows]), coded(pairs.hooks["h"])
        alive = pairs.valid & (u != 0).any(1) & (v != 0).any(1)
        expected = naive_info_nce(
            u.tolist(), v.tolist(), batch.clip[rows].tolist(), alive.tolist(), "cosine", 0.1
        ) if alive.sum() > 1 else None  # fmt: skip
        term = Contrast("temporal", 0.5, ObjectiveConfig(codes=codes), width)(forward)
        assert float(term.metrics["temporal_nce"]) == pytest.approx(expected, rel=1e-4)
        assert term.loss.item() == pytest.approx(0.5 * expected, rel=1e-4)
        assert int(term.metrics["temporal_pairs"]) == int(alive.sum())
        dropped = 1 - int(alive.sum()) / int(pairs.valid.sum())
        assert float(term.metrics["temporal_dropped"]) == pytest.approx(dropped, abs=1e-6)
    assert dropped > 0, "the prefix of so small a code should have been all zero for some tokens"


def test_pre_reaches_latents_that_were_not_chosen_and_post_does_not(store):
    batch = batch_of(store)
    for codes, expected in (("pre", True), ("post", False)):
        sae = make_sae(TopKConfig(latents=F, k=4))
        # A latent that is positive on many tokens and among the largest on none.
        silent = 7
        with torch.no_grad():
            sae.W_enc[silent] *= 0.1
        forward = forward_of(sae, batch)
        assert not forward.codes.fired(F)[silent]
        assert not (sae.encode(batch.temporal.hooks["h"])[:, silent] != 0).any()
        Contrast("temporal", 1.0, ObjectiveConfig(codes=codes), F)(forward).loss.backward()
        assert bool(sae.W_enc.grad[silent].abs().sum() > 0) == expected


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_smoothness_is_the_formula_of_raw_tokens_and_never_negative(store, mean):
    """With centered tokens, or raw ones about the origin, a negative cosine would reward codes that lie far apart."""
    sae, batch = make_sae(KINDS[0], mean), batch_of(store)
    x, pairs = batch.tokens[batch.temporal.rows], batch.temporal
    # Neighbors that point away from each other, where tokens lie about the origin.
    y = torch.where(torch.arange(len(x))[:, None] % 3 == 0, -pairs.hooks["h"], pairs.hooks["h"])
    pairs = replace(pairs, hooks={"h": y})
    batch = replace(batch, temporal=pairs)
    cosine = torch.nn.functional.cosine_similarity(x, y)
    away = pairs.valid & (cosine < 0)
    assert away.any()
    distance = (sae.encode(x) - sae.encode(y)).abs().sum(dim=1)
    term = Smoothness(1.0, ObjectiveConfig(codes="post"), F)
    found = term(Forward.of(sae, sae.normalization(batch.tokens), NO_DEAD, batch=batch, hook="h")).loss
    torch.testing.assert_close(found, (cosine.clamp_min(0) * distance)[pairs.valid].mean())
    alone = replace(batch, temporal=replace(pairs, valid=away))
    assert term(Forward.of(sae, sae.normalization(batch.tokens), NO_DEAD, batch=alone, hook="h")).loss == 0


def test_a_batch_of_one_clip_has_no_negatives(store):
    draw = PairDraw(PairsConfig(anchors=4), True, False)
    loader = ActivationLoader(Source(store, "h", 12), np.arange(24), batch_tokens=8, window_tokens=72, pairs=draw)
    sae = make_sae(KINDS[0])
    with pytest.raises(TubeletError, match=r"no negatives.*one clip.*pairs\.anchors"):
        Contrast("temporal", 1.0, ObjectiveConfig(), F)(forward_of(sae, next(iter(loader))))


def configure(store, out, **fields):
    tree = {
        "store": store.url, "out": out, "steps": 30, "batch_tokens": 128, "window_tokens": 2000, "sae": {"k": 4},
        "holdout": {"fraction": 0}, "device": "cpu", "pairs": {"anchors": 64}, "block_patches": 12, "log_every": 10,
        "optimizer": {"lr": 3e-3},
    }  # fmt: skip
    return TrainConfig.model_validate({**tree, **fields})


def weights(out):
    return load_file(out / "sae.safetensors")


def test_weight_zero_is_the_plain_sae_bit_by_bit(store, tmp_path):
    zero = {"lambda_t": 0, "lambda_s": 0.0, "lambda_smooth": 0, "codes": "post", "temperature": 0.3}
    plain = weights(train(configure(store, tmp_path / "plain")))
    same = weights(train(configure(store, tmp_path / "zero", objective=zero)))
    other = weights(train(configure(store, tmp_path / "one", objective={"lambda_t": 0.1})))
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not torch.equal(plain["W_enc"], other["W_enc"])


def test_each_objective_improves_what_it_is_about(store, tmp_path):
    def last(name, **objective):
        out = train(configure(store, tmp_path / name, steps=150, objective=objective)).out
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return lines[-1]

    tiny = 1e-6
    for metric, options in [
        ("temporal_nce", {"lambda_t": 1.0}),
        ("spatial_nce", {"lambda_s": 1.0}),
        ("smoothness", {"lambda_smooth": 1.0}),
        ("slow", {"lambda_slow": 1.0}),
    ]:
        name = next(iter(options))
        without = last(f"{name}-0", **{name: tiny})[metric]
        with_it = last(f"{name}-1", **options)[metric]
        assert with_it < 0.95 * without, metric


def test_the_prefix_is_the_first_group_by_default():
    grouped = TopKConfig(latents=100, nesting=Groups(fractions=(0.3, 0.7)))
    assert prefix_length(ObjectiveConfig(), grouped, 100) == 30
    assert prefix_length(ObjectiveConfig(prefix_fraction=0.5), grouped, 100) == 50
    assert prefix_length(ObjectiveConfig(), TopKConfig(latents=100), 100) == 20


def test_a_raw_dot_product_is_not_rounded_where_training_is(store):
    """In bfloat16 similarities of 200 are 1 apart: the gradient would be off by half."""
    generator = torch.Generator().manual_seed(0)
    anchors, neighbors = (4 * torch.randn(40, 12, generator=generator) for _ in range(2))
    anchors.requires_grad_()
    clips, valid = torch.arange(40) % 7, torch.ones(40, dtype=torch.bool)
    gradients = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = info_nce(anchors, neighbors, clips, valid, "dot", 1.0)
        gradients.append(torch.autograd.grad(loss, anchors)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("objective", [{"lambda_t": 0.3}, {"lambda_t": 0.3, "codes": "post"}, {"lambda_smooth": 0.1}])
@pytest.mark.parametrize("whitening", ["none", "zca"])
def test_coherence_in_low_precision_is_that_of_full_precision(store, tmp_path, objective, whitening):
    found = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        tree = {
            "store": store.url, "out": out, "steps": 3, "batch_tokens": 128, "window_tokens": 2000, "log_every": 1,
            "sae": {"k": 4, "normalization": {"whitening": whitening}}, "objective": objective, "device": "cpu",
            "precision": precision, "pairs": {"anchors": 64}, "holdout": {"fraction": 0},
        }  # fmt: skip
        train(TrainConfig.model_validate(tree))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        name = "smoothness" if "lambda_smooth" in objective else "temporal_nce"
        found.append([line[name] for line in lines if line["kind"] == "train"])
    # Of codes that were chosen, some are chosen otherwise.
    assert found[1] == pytest.approx(found[0], rel=0.1 if "codes" in objective else 0.03)
