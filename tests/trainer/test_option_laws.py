"""Laws of the options that change the arithmetic of training.

Each case trains a small SAE twice, with two values of one option, and compares both runs with `reference`: the same
training written with dense codes, plain autograd and a plain Adam in float64, which shares no code with the trainer
except the drawing of random prefixes. The two results of the reference have to differ, so a trainer that ignores the
option fails. `test_option_table.py` requires a law for every option.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from stores import make_plan, make_store
from tubelet.config import Config
from tubelet_store.reader import Store
from tubelet_trainer.config import HoldoutConfig, ObjectiveConfig, OptimizerConfig, PairsConfig, TrainConfig
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.source import Source
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.config import (
    AbsTopKConfig,
    BatchTopKConfig,
    Flat,
    GatedConfig,
    Groups,
    Hierarchical,
    InitConfig,
    JumpReLUConfig,
    NestedK,
    NormalizationConfig,
    RandomPrefixes,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)
from tubelet_trainer.sae.matryoshka import cuts

CLIPS, TIME, HEIGHT, WIDTH, D = 24, 4, 2, 3, 8
SPACE = HEIGHT * WIDTH
TOKENS = CLIPS * TIME * SPACE
STEPS, BATCH = 14, 32
CPU = torch.device("cpu")

KConfig, PenalizedConfig = TopKConfig.__bases__[0], ReLUConfig.__bases__[0]

# Every option that changes arithmetic, with its default.
DEFAULTS: dict[type[Config], dict[str, Any]] = {
    OptimizerConfig: {
        "lr": None, "beta1": None, "beta2": 0.999, "eps": 6.25e-10, "warmup_steps": 1000, "decay_fraction": 0.2,
        "grad_clip": 1.0, "ema": None, "resample_every": None,
    },
    ObjectiveConfig: {
        "lambda_t": 0.0, "lambda_s": 0.0, "lambda_smooth": 0.0, "lambda_slow": 0.0, "codes": "pre",
        "similarity": "cosine", "temperature": None, "prefix_fraction": None,
    },
    PairsConfig: {"max_delta": 1, "neighbors": 4, "anchors": 1024},
    SAEConfig: {
        "expansion": 8, "latents": None, "auxk": None, "auxk_coef": 1 / 32, "dead_after_tokens": None, "seed": 0,
    },
    NormalizationConfig: {"center": True, "scale": True, "whitening": "none", "shrinkage": 1e-3},
    InitConfig: {"directions": "random", "bias": "mean", "subspace": None, "tokens": 16_384},
    KConfig: {"k": 32, "k_anneal_steps": 0},
    PenalizedConfig: {"sparsity_warmup_steps": 500, "target_l0": None},
    TopKConfig: {},
    BatchTopKConfig: {"threshold_momentum": 0.01},
    AbsTopKConfig: {},
    ReLUConfig: {"sparsity": 8e-4},
    GatedConfig: {"sparsity": 8e-4},
    JumpReLUConfig: {"penalty": "linear", "sparsity": 1e-3, "bandwidth": 1.0, "initial_threshold": 1.0},
    Flat: {},
    Groups: {"fractions": (0.0625, 0.125, 0.25, 0.5625), "weights": None, "bias_alone": True},
    RandomPrefixes: {"prefixes": 10, "power": 0.5, "sort_every": 100},
    NestedK: {"ks": None, "weights": "uniform"},
    Hierarchical: {"levels": None},
    HoldoutConfig: {"fraction": 0.05, "seed": 0},
    TrainConfig: {
        "hook": None, "seed": 0, "steps": None, "tokens": None, "epochs": None, "batch_tokens": 4096,
        "window_tokens": 262_144, "block_patches": None, "resident_shards": None, "mix": {}, "eval_tokens": 65_536,
        "saes": (), "sweep": {}, "parallel": "data", "precision": "float32", "compile": False, "cuda_graphs": False,
    },
}  # fmt: skip
KINDS = (TopKConfig, BatchTopKConfig, AbsTopKConfig, ReLUConfig, GatedConfig, JumpReLUConfig)
NESTINGS = (Flat, Groups, RandomPrefixes, NestedK, Hierarchical)


def named(model: type[Config]) -> str:
    """The name by which a kind is chosen."""
    return str(model.model_fields["kind"].default)


PLACES: dict[type[Config], str] = {
    OptimizerConfig: "optimizer",
    ObjectiveConfig: "objective",
    PairsConfig: "pairs",
    NormalizationConfig: "sae.normalization",
    InitConfig: "sae.init",
    HoldoutConfig: "holdout",
    TrainConfig: "",
    **dict.fromkeys((SAEConfig, KConfig, PenalizedConfig, *KINDS), "sae"),
    **dict.fromkeys(NESTINGS, "sae.nesting"),
}
"""Where the options of a model stand in a training configuration."""


def dotted(model: type[Config], name: str) -> str:
    """The option as users write it."""
    return f"{PLACES[model]}.{name}".removeprefix(".")


@dataclass(frozen=True)
class Case:
    """An option, two of its values, and what else is set."""

    model: type[Config]
    name: str
    values: tuple[Any, Any]
    beside: dict[str, Any] = field(default_factory=dict)

    @property
    def option(self) -> tuple[type[Config], str]:
        return self.model, self.name

    def settings(self, value: Any) -> dict[str, Any]:
        return {**self.beside, dotted(self.model, self.name): value}


def kind(model: type[Config], **fields: Any) -> dict[str, Any]:
    """Settings of an SAE of kind `model`."""
    return {"sae.kind": named(model), **{f"sae.{name}": value for name, value in fields.items()}}


def nesting(model: type[Config], **fields: Any) -> dict[str, Any]:
    """Settings of nesting `model`."""
    return {"sae.nesting.kind": named(model), **{f"sae.nesting.{name}": value for name, value in fields.items()}}


RELU, GATED, JUMP = (kind(model, sparsity=0.3) for model in (ReLUConfig, GatedConfig, JumpReLUConfig))
TEMPORAL, SPATIAL = {"objective.lambda_t": 1.0}, {"objective.lambda_s": 1.0}
LONG = {"steps": 40}
CASES = [
    Case(OptimizerConfig, "lr", (None, 1e-3)),
    Case(OptimizerConfig, "lr", (None, 1e-3), {"sae.latents": 64}),
    Case(OptimizerConfig, "beta1", (None, 0.0)),
    Case(OptimizerConfig, "beta1", (None, 0.9), JUMP),
    Case(OptimizerConfig, "beta2", (0.999, 0.9)),
    # Adam divides gradients by their size: its epsilon counts where they are small, as they are when clipped.
    Case(OptimizerConfig, "eps", (6.25e-10, 1e-8), {"optimizer.grad_clip": 1e-8}),
    Case(OptimizerConfig, "eps", (6.25e-10, 1e-2)),
    Case(OptimizerConfig, "warmup_steps", (1000, 2), LONG),
    Case(OptimizerConfig, "warmup_steps", (1000, 0)),
    Case(OptimizerConfig, "decay_fraction", (0.2, 0.7)),
    Case(OptimizerConfig, "decay_fraction", (0.2, 0.0)),
    Case(OptimizerConfig, "grad_clip", (1.0, 1e-3), {"optimizer.eps": 1e-3}),
    Case(OptimizerConfig, "grad_clip", (1.0, 100.0), {"objective.lambda_slow": 30.0}),
    Case(OptimizerConfig, "ema", (None, 0.5)),
    Case(OptimizerConfig, "ema", (0.3, 0.999)),
    Case(ObjectiveConfig, "lambda_t", (0.0, 1.0)),
    Case(ObjectiveConfig, "lambda_t", (0.5, 1.0)),
    Case(ObjectiveConfig, "lambda_s", (0.0, 1.0)),
    Case(ObjectiveConfig, "lambda_s", (0.5, 1.0)),
    Case(ObjectiveConfig, "lambda_smooth", (0.0, 1.0)),
    Case(ObjectiveConfig, "lambda_smooth", (0.1, 1.0)),
    Case(ObjectiveConfig, "lambda_slow", (0.0, 1.0)),
    Case(ObjectiveConfig, "lambda_slow", (0.1, 1.0)),
    *(Case(ObjectiveConfig, "codes", ("pre", other), weight)
      for other in ("post", "prefix") for weight in (TEMPORAL, SPATIAL, {"objective.lambda_smooth": 1.0})),
    Case(ObjectiveConfig, "similarity", ("cosine", "dot"), TEMPORAL),
    Case(ObjectiveConfig, "similarity", ("cosine", "dot"), SPATIAL),
    Case(ObjectiveConfig, "temperature", (None, 1.0), TEMPORAL),
    Case(ObjectiveConfig, "temperature", (None, 0.5), {**SPATIAL, "objective.similarity": "dot"}),
    Case(ObjectiveConfig, "prefix_fraction", (None, 0.5), {"objective.lambda_slow": 1.0}),
    Case(ObjectiveConfig, "prefix_fraction", (None, 0.5), {**TEMPORAL, "objective.codes": "prefix"}),
    Case(ObjectiveConfig, "prefix_fraction", (None, 0.5), {**nesting(Groups), "objective.lambda_slow": 1.0}),
    Case(PairsConfig, "max_delta", (1, 3), TEMPORAL),
    Case(PairsConfig, "neighbors", (4, 8), SPATIAL),
    Case(PairsConfig, "neighbors", (4, "random"), SPATIAL),
    Case(PairsConfig, "anchors", (1024, 8), TEMPORAL),
    Case(SAEConfig, "expansion", (8, 3), {"sae.latents": None}),
    Case(SAEConfig, "latents", (16, 20)),
    Case(SAEConfig, "seed", (0, 5)),
    Case(SAEConfig, "seed", (0, 5), nesting(RandomPrefixes, prefixes=4)),
    Case(SAEConfig, "auxk", (None, 1)),
    Case(SAEConfig, "auxk", (None, 0), {"sae.auxk_coef": 1.0}),
    Case(SAEConfig, "auxk", (None, 3), {**JUMP, "sae.auxk_coef": 1.0}),
    Case(SAEConfig, "auxk_coef", (1 / 32, 1.0)),
    Case(SAEConfig, "auxk_coef", (1 / 32, 0.0)),
    Case(SAEConfig, "dead_after_tokens", (None, 200), {"sae.auxk_coef": 1.0}),
    Case(NormalizationConfig, "center", (True, False)),
    Case(NormalizationConfig, "scale", (True, False)),
    *(Case(NormalizationConfig, "scale", (True, False), other) for other in (RELU, JUMP)),
    Case(NormalizationConfig, "whitening", ("none", "zca")),
    Case(NormalizationConfig, "whitening", ("zca", "pca")),
    Case(NormalizationConfig, "shrinkage", (1e-3, 0.3), {"sae.normalization.whitening": "zca"}),
    *(Case(model, "kind", (named(model), named(other)))
      for model, other in zip(KINDS, (*KINDS[1:], TopKConfig), strict=True)),
    Case(KConfig, "k", (3, 5)),
    *(Case(KConfig, "k", (3, 5), kind(model)) for model in (BatchTopKConfig, AbsTopKConfig)),
    *(Case(KConfig, "k_anneal_steps", (0, 6), kind(model)) for model in (TopKConfig, BatchTopKConfig, AbsTopKConfig)),
    Case(KConfig, "k_anneal_steps", (6, 1000)),
    Case(BatchTopKConfig, "threshold_momentum", (0.01, 0.9), {**kind(BatchTopKConfig), "steps": 20}),
    *(Case(PenalizedConfig, "sparsity_warmup_steps", (500, 1), {**other, **LONG}) for other in (RELU, GATED, JUMP)),
    Case(PenalizedConfig, "sparsity_warmup_steps", (500, 0), RELU),
    *(Case(PenalizedConfig, "target_l0", (None, 1.5), {**other, "steps": 30}) for other in (RELU, GATED, JUMP)),
    Case(PenalizedConfig, "target_l0", (2.0, 4.0), {**JUMP, "sae.penalty": "quadratic"}),
    *(Case(model, "sparsity", (DEFAULTS[model]["sparsity"], 0.5), kind(model))
      for model in (ReLUConfig, GatedConfig, JumpReLUConfig)),
    Case(JumpReLUConfig, "penalty", ("linear", "quadratic"), {**JUMP, "sae.target_l0": 2.0}),
    Case(JumpReLUConfig, "bandwidth", (1.0, 0.5), JUMP),
    Case(JumpReLUConfig, "initial_threshold", (1.0, 0.5), JUMP),
    *(Case(model, "kind", (named(model), named(other)))
      for model, other in zip(NESTINGS, (*NESTINGS[1:], Flat), strict=True)),
    Case(Groups, "fractions", ((0.0625, 0.125, 0.25, 0.5625), (0.5, 0.5)), nesting(Groups)),
    Case(Groups, "weights", (None, (3.0, 1.0, 1.0, 0.0)), nesting(Groups)),
    Case(Groups, "bias_alone", (True, False), nesting(Groups)),
    Case(RandomPrefixes, "prefixes", (10, 3), nesting(RandomPrefixes)),
    Case(RandomPrefixes, "power", (0.5, 3.0), nesting(RandomPrefixes, prefixes=3)),
    Case(RandomPrefixes, "sort_every", (100, 5), nesting(RandomPrefixes, prefixes=3)),
    Case(RandomPrefixes, "sort_every", (None, 10), nesting(RandomPrefixes, prefixes=3)),
    Case(NestedK, "ks", (None, (2, 9)), {**nesting(NestedK), "sae.k": 9}),
    Case(NestedK, "weights", ("uniform", "reverse"), {**nesting(NestedK), "sae.k": 9}),
    Case(Hierarchical, "levels", (None, (1, 5)), {**nesting(Hierarchical), "sae.k": 5}),
]  # fmt: skip


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    """Sparse features on an offset of their own, that change slowly within a clip; as stored."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((14, D))
    slow, fast = (rng.random((CLIPS, steps, SPACE, 14)) < 0.15 for steps in (1, TIME))
    strength = (slow | fast) * rng.exponential(1, (CLIPS, TIME, SPACE, 14))
    x = strength @ directions * np.linspace(0.5, 2, D) + 1 + 0.1 * rng.standard_normal((CLIPS, TIME, SPACE, D))
    return x.astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def store(raw: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Store:
    plan = make_plan(clips=CLIPS, clips_per_shard=6, grid=(TIME, HEIGHT, WIDTH), hooks={"h": D})
    return make_store(tmp_path_factory.mktemp("options") / "s.zarr", plan, {"h": raw})


def configure(store: Store, settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration with dotted `settings`."""
    common = {"steps": STEPS, "batch_tokens": BATCH, "window_tokens": TOKENS, "holdout.fraction": 0.0, "device": "cpu"}
    tree: dict[str, Any] = {"store": store.url, "out": "unused"}
    kinds_with_k = [named(model) for model in KINDS if issubclass(model, KConfig)]
    if settings.get("sae.kind", named(TopKConfig)) in kinds_with_k:
        common["sae.k"] = 3
    for path, value in {**common, "sae.latents": 16, **settings}.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return TrainConfig.model_validate(tree)


def in_float64(run: Run) -> Any:
    """The run's only SAE and its optimizer, in float64 and in general position; five of its latents are weak."""
    sae_trainer = run.sae_run.sae_trainer
    for sae in (sae_trainer.sae, sae_trainer.averaged):
        if sae is not None:
            sae.double()
    generator = torch.Generator().manual_seed(7)
    for name, tensor in sae_trainer.state().items():
        if name.endswith(("/exp_avg", "/exp_avg_sq")):
            tensor.data = tensor.data.double()
    with torch.no_grad():
        for name, parameter in sae_trainer.sae.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if name == "W_enc":
                parameter[:5] *= 0.1
        sae_trainer.sae.W_dec.copy_(nnf.normalize(sae_trainer.sae.W_dec, dim=1))
        if sae_trainer.averaged is not None:
            sae_trainer.averaged.load_state_dict(sae_trainer.sae.state_dict())
    return sae_trainer


@dataclass(frozen=True)
class Trained:
    """A run that has been trained, and what it was trained from."""

    start: dict[str, Tensor]
    batches: list[Batch]
    end: dict[str, Tensor]


_TRAINED: dict[str, Trained] = {}


def trained(store: Store, settings: Mapping[str, Any]) -> Trained:
    """The run with `settings`, trained to its end."""
    key = json.dumps(settings, sort_keys=True)
    if key not in _TRAINED:
        run = Run(configure(store, settings), [store], CPU)
        sae_trainer = in_float64(run)
        start = {name: p.detach().clone() for name, p in sae_trainer.sae.named_parameters()}
        batches = []
        for step, batch in enumerate(run.loader):
            run.sae_group.learn(batch, step)
            batches.append(batch)
        sae = run.result(run.sae_run)
        assert sae is not None
        end = {name: p.detach().clone() for name, p in sae.named_parameters()}
        end |= {f"buffer {name}": b.clone() for name, b in sae.sparsifier.named_buffers()}
        _TRAINED[key] = Trained(start, batches, end)
    return _TRAINED[key]


class Options:
    """Options of a run as the reference reads them: the defaults above, and what is set."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        sae = {named(model): model for model in KINDS}[self.get("sae.kind", named(TopKConfig))]
        nesting = {named(model): model for model in NESTINGS}[self.get("sae.nesting.kind", named(Flat))]
        self.kind, self.nesting = named(sae), named(nesting)
        models = [
            OptimizerConfig,
            ObjectiveConfig,
            NormalizationConfig,
            nesting,
            *(m for m in sae.__mro__ if m in PLACES),
        ]
        self.values = {dotted(model, name): value for model in models for name, value in DEFAULTS[model].items()}
        self.values |= {"steps": STEPS, "sae.latents": 16}
        if "sae.k" in self.values:
            self.values["sae.k"] = 3
        self.values |= settings

    def get(self, path: str, default: Any) -> Any:
        return self.settings.get(path, default)

    def __getitem__(self, path: str) -> Any:
        return self.values[path]


def normalizer(o: Options, raw: Tensor) -> tuple[Any, float]:
    """The map of tokens that normalization is, from all raw tokens [N, D], and the unit of a normalized channel."""
    mean, place = raw.mean(dim=0), "sae.normalization"
    covariance = torch.cov(raw.T, correction=0)
    offset = mean if o[f"{place}.center"] else torch.zeros(D, dtype=torch.float64)
    deviation = float((covariance.trace() / D).sqrt())
    if o[f"{place}.whitening"] != "none":
        spread, axes = np.linalg.eigh(covariance.numpy())
        damped = spread + o[f"{place}.shrinkage"] * spread.mean()
        matrix = torch.from_numpy(axes / np.sqrt(damped))
        if o[f"{place}.whitening"] == "zca":
            matrix = matrix @ torch.from_numpy(axes.T)
        matrix = matrix * (D / (matrix.T @ covariance @ matrix).trace()).sqrt()
        return (lambda x: (x.double() - offset) @ matrix), 1.0
    if o[f"{place}.scale"]:
        return (lambda x: (x.double() - offset) / deviation), 1.0
    return (lambda x: x.double() - offset), deviation


def largest_kept(values: Tensor, k: int) -> Tensor:
    """bool: the k largest of each row."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, dim=-1).indices, True)


def encode(o: Options, w: Mapping[str, Tensor], x: Tensor, k: int, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations, codes, and number of active latents with a gradient to thresholds."""
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    if o.kind == "topk":
        codes = pre.relu() * largest_kept(pre, k)
    elif o.kind == "batchtopk":
        codes = (pre.flatten().relu() * largest_kept(pre.flatten(), k * len(x))).view_as(pre)
    elif o.kind == "abstopk":
        codes = pre * largest_kept(pre.abs(), k)
    elif o.kind == "relu":
        codes = pre.relu()
    elif o.kind == "gated":
        magnitude = w["sparsifier.r_mag"].exp() * (pre - w["b_enc"]) + w["sparsifier.b_mag"]
        codes = magnitude.relu() * (pre > 0)
    else:
        theta, width = w["sparsifier.log_threshold"].exp(), o["sae.bandwidth"] * unit
        kernel = ((pre - theta).abs() < width / 2).double().detach()
        # Value 0, with the derivative of the step that the paper defines.
        pseudo = -kernel / width * (theta - theta.detach())
        codes = pre * (pre > theta) + theta.detach() * pseudo
        return pre, codes, ((pre > theta) + pseudo).sum()
    return pre, codes, (codes != 0).sum()


def prefixes(o: Options, k: int, step: int) -> tuple[bool, list[tuple[float, int]]]:
    """Whether prefixes are counted by magnitude, and weight and length of each."""
    place, latents = "sae.nesting", o["sae.latents"]
    if o.nesting == "flat":
        return False, [(1.0, latents)]
    if o.nesting == "groups":
        fractions = np.array(o[f"{place}.fractions"])
        ends = [round(latents * share) for share in fractions.cumsum() / fractions.sum()]
        weights = o[f"{place}.weights"] or (1.0,) * len(ends)
        bias = [(float(np.mean(weights)), 0)] if o[f"{place}.bias_alone"] else []
        return False, [*bias, *zip(weights, ends, strict=True)]
    if o.nesting == "random":
        model = RandomPrefixes(prefixes=o[f"{place}.prefixes"], power=o[f"{place}.power"])
        return False, [(1.0, end) for end in cuts(model, latents, 0, o["sae.seed"], step).ends]
    if o.nesting == "ks":
        ks = o[f"{place}.ks"] or [level for level in (k // 8, k // 4, k // 2, k) if level >= 4 or level == k]
        weights = range(len(ks), 0, -1) if o[f"{place}.weights"] == "reverse" else [1] * len(ks)
        return True, [(float(weight), level) for weight, level in zip(weights, ks, strict=True)]
    return True, [(1.0, level) for level in o[f"{place}.levels"] or range(1, k + 1)]


def contrast(o: Options, u: Tensor, v: Tensor, clip: Tensor, valid: Tensor) -> Tensor:
    """Symmetric InfoNCE with the tokens of other clips as negatives."""
    valid = valid & (u != 0).any(dim=1) & (v != 0).any(dim=1)
    u, v, clip = u[valid], v[valid], clip[valid]
    cosine = o["objective.similarity"] == "cosine"
    if cosine:
        u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    s = (u @ v.T) / (o["objective.temperature"] or (0.1 if cosine else 1.0))
    seen = (clip[:, None] != clip) | torch.eye(len(u), dtype=torch.bool)
    s_seen = torch.where(seen, s, -torch.inf)
    return (-s_seen.log_softmax(dim=1).diagonal().mean() - s_seen.log_softmax(dim=0).diagonal().mean()) / 2


def coherence(
    o: Options,
    w: Mapping[str, Tensor],
    batch: Batch,
    x: Tensor,
    pre: Tensor,
    codes: Tensor,
    normalize: Any,
    k: int,
    variance: float,
) -> Iterator[Tensor]:
    """The terms of the coherence objective."""  # fmt: skip
    latents, fraction = o["sae.latents"], o["objective.prefix_fraction"]
    prefix = round((fraction or 0.2) * latents)
    if fraction is None and o.nesting == "groups":
        prefix = prefixes(o, k, 0)[1][1][1]
    for name, pairs in (("lambda_t", batch.temporal), ("lambda_s", batch.spatial), ("lambda_smooth", batch.temporal)):
        if not (weight := o[f"objective.{name}"]):
            continue
        assert pairs is not None
        y = normalize(pairs.hooks["h"])
        y_pre, y_codes, _ = encode(o, w, y, k, 1.0)
        if o["objective.codes"] == "pre":
            u, v = pre[pairs.rows].relu(), y_pre.relu()
        else:
            width = prefix if o["objective.codes"] == "prefix" else latents
            u, v = codes[pairs.rows][:, :width], y_codes[:, :width]
        if name == "lambda_smooth":
            raw_x, raw_y = batch.tokens[pairs.rows].double(), pairs.hooks["h"].double()
            alike = torch.cosine_similarity(raw_x, raw_y, dim=1).clamp_min(0)
            yield weight * (alike * (u - v).abs().sum(dim=1))[pairs.valid].mean()
        else:
            yield weight * contrast(o, u, v, batch.clip[pairs.rows], pairs.valid)
    error = x - codes[:, :prefix] @ w["W_dec"][:prefix] - w["b_dec"]
    yield o["objective.lambda_slow"] * error.square().sum() / len(x) / variance


def reference(settings: Mapping[str, Any], start: Mapping[str, Tensor], batches: list[Batch], raw: np.ndarray) -> Any:
    """The weights that training from `start` on `batches` has to end in."""
    o = Options(settings)
    o.values["sae.latents"] = latents = o["sae.latents"] or o["sae.expansion"] * D
    all_raw = torch.from_numpy(raw).double().view(-1, D)
    normalize, unit = normalizer(o, all_raw)
    variance = float(normalize(all_raw).var(dim=0, correction=0).sum())
    steps, w = o["steps"], {name: p.clone().requires_grad_() for name, p in start.items()}
    if o.kind == "jumprelu":
        moved = math.log(o["sae.initial_threshold"] * unit)
        assert (start["sparsifier.log_threshold"] - moved).abs().mean() < 0.1
    m, v = ({name: torch.zeros_like(p) for name, p in start.items()} for _ in range(2))
    mean = {name: p.clone() for name, p in start.items()}
    silent, energy = torch.zeros(latents, dtype=torch.int64), torch.zeros(latents, dtype=torch.float64)
    dead_after = o["sae.dead_after_tokens"] or steps * BATCH // 10
    auxk = (D // 2 if "sae.k" in o.values else 0) if o["sae.auxk"] is None else o["sae.auxk"]
    dead_known = dead_sent = 0
    gain, threshold = 0.0, None
    beta1, beta2 = o["optimizer.beta1"], o["optimizer.beta2"]
    if beta1 is None:
        beta1 = 0.0 if o.kind == "jumprelu" else 0.9
    for step, batch in enumerate(batches):
        k = o.values.get("sae.k", 0)
        if k and step < (annealed := min(o["sae.k_anneal_steps"], steps // 2)):
            k = round(D + (k - D) * step / annealed)
        x = normalize(batch.tokens)
        pre, codes, active = encode(o, w, x, k, unit)

        by_rank, parts = prefixes(o, k, step)
        place = torch.arange(latents).expand_as(codes)
        if by_rank:
            place = codes.detach().abs().argsort(dim=1, descending=True).argsort(dim=1)
        loss = torch.zeros((), dtype=torch.float64)
        for weight, end in parts:
            part = torch.where(place < end, codes, 0) @ w["W_dec"] + w["b_dec"]
            loss = loss + weight / sum(weight for weight, _ in parts) * (x - part).square().sum() / len(x) / variance

        if "sae.sparsity" in o.values:
            warmup = min(o["sae.sparsity_warmup_steps"], steps // 10)
            weight = o["sae.sparsity"] * min(1.0, (step + 1) / (warmup + 1)) * math.exp(gain)
            l0, target = active / len(x), o["sae.target_l0"]
            quadratic = o.kind == "jumprelu" and o["sae.penalty"] == "quadratic"
            if o.kind == "relu":
                sums = [codes[:, :end].sum() for _, end in parts if end]
                loss = loss + weight * sum(sums) / len(sums) / len(x)
            elif o.kind == "gated":
                alone = x - pre.relu() @ w["W_dec"].detach() - w["b_dec"].detach()
                loss = loss + weight * pre.relu().sum() / len(x) + alone.square().sum() / len(x) / variance
            else:
                loss = loss + weight * ((l0 / target - 1).square() if quadratic else l0)
            if target and not quadratic and step >= warmup:
                gain += 0.01 * min(1.0, max(-1.0, math.log(float(l0.detach()) / target)))

        dead = silent > dead_after
        # The host learns the number of dead latents four steps late, and rounds it up to a power of 2.
        width = min(auxk, latents, 1 << (dead_known - 1).bit_length() if dead_known else 0)
        if width and dead.any():
            residual = (x - codes @ w["W_dec"] - w["b_dec"]).detach()
            chosen = largest_kept(torch.where(dead, pre, -torch.inf), width) & dead
            missed = residual - (pre.relu() * chosen) @ w["W_dec"]
            spread = (residual - residual.mean(dim=0)).square().sum()
            loss = loss + o["sae.auxk_coef"] * missed.square().sum() / spread
        loss = loss + sum(coherence(o, w, batch, x, pre, codes, normalize, k, variance))

        g = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))
        with torch.no_grad():
            g["W_dec"] -= (g["W_dec"] * w["W_dec"]).sum(dim=1, keepdim=True) * w["W_dec"]
            norm = math.sqrt(sum(float(part.square().sum()) for part in g.values()))
            rise = (step + 1) / (min(o["optimizer.warmup_steps"], steps // 10) + 1)
            falling = round(o["optimizer.decay_fraction"] * steps)
            fall = (steps - step) / (falling + 1) if falling else 1.0
            lr = (o["optimizer.lr"] or 2e-4 * math.sqrt(2**14 / latents)) * min(1.0, rise, fall)
            for name, p in w.items():
                clipped = g[name] * min(1.0, o["optimizer.grad_clip"] / norm)
                m[name] = beta1 * m[name] + (1 - beta1) * clipped
                v[name] = beta2 * v[name] + (1 - beta2) * clipped.square()
                m_hat, v_hat = m[name] / (1 - beta1 ** (step + 1)), v[name] / (1 - beta2 ** (step + 1))
                p -= lr * m_hat / (v_hat.sqrt() + o["optimizer.eps"])
            w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
            if (ema := o["optimizer.ema"]) is not None:
                decay = min(ema, (1 + step) / (10 + step))
                mean = {name: decay * mean[name] + (1 - decay) * p for name, p in w.items()}
            if o.kind == "batchtopk":
                smallest = float(codes[codes > 0].min())
                momentum = max(o["sae.threshold_momentum"], min(1.0, 10 / (step + 1)))
                threshold = smallest if threshold is None else threshold + momentum * (smallest - threshold)
            silent = torch.where((codes != 0).any(dim=0), 0, silent + len(x))
            energy = 0.95 * energy + 0.05 * codes.square().sum(dim=0) / len(x)
            every = o["sae.nesting.sort_every"] if o.nesting == "random" else None
            if every and (step + 1) % every == 0:
                order = energy.argsort(descending=True)
                silent, energy = silent[order], energy[order]
                for tensors in (w, m, v, mean):
                    for name in tensors.keys() - {"b_dec"}:
                        tensors[name].copy_(tensors[name][order].clone())
            if (step + 1) % 4 == 0:
                dead_known, dead_sent = dead_sent, int((silent > dead_after).sum())
    end = {name: p.detach() for name, p in (w if o["optimizer.ema"] is None else mean).items()}
    if o["optimizer.ema"] is not None:
        end["W_dec"] = nnf.normalize(end["W_dec"], dim=1)
    return end if threshold is None else {**end, "buffer threshold": torch.tensor(threshold, dtype=torch.float64)}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """How far apart two results are, as a share of the way from the start: the largest of all parameters."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return math.inf
    ways = {name: (one[name] - start[name]).norm() if name in start else one[name].norm() for name in one}
    return max(float((one[name] - other[name]).norm() / way) for name, way in ways.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{dotted(*case.option)} {case.values[0]} {case.values[1]}")
def test_training_equals_the_formulas_for_two_values_of_an_option(store: Store, raw: np.ndarray, case: Case) -> None:
    expected = []
    for value in case.values:
        settings = case.settings(value)
        run = trained(store, settings)
        assert len(run.batches) == settings.get("steps", STEPS)
        expected.append((reference(settings, run.start, run.batches, raw), run.start))
        assert distance(expected[-1][0], run.end, run.start) < 1e-5
    (one, start), (other, _) = expected
    assert distance(one, other, start) > 1e-2, "the option makes no difference here: the test could not fail"


@pytest.mark.parametrize(("first", "second"), [(5, 7), (9, None)])
def test_dead_latents_are_resampled_after_the_configured_steps(store: Store, first: int, second: int | None) -> None:
    together = {"sae.auxk": 0, "sae.dead_after_tokens": 40}
    runs = [
        Run(configure(store, {**together, "optimizer.resample_every": every}), [store], CPU)
        for every in (first, second)
    ]
    sae_trainers = [in_float64(run) for run in runs]
    for step, batch in enumerate(runs[0].loader):
        for run in runs:
            run.sae_group.learn(batch, step)
        if not torch.equal(*(sae_trainer.sae.W_dec for sae_trainer in sae_trainers)):
            break
    assert step + 1 == first


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_lengths_of_random_prefixes_follow_the_power(power: float) -> None:
    """P(length <= l) is proportional to 1 - l^-power."""
    drawn = [cuts(RandomPrefixes(prefixes=2, power=power), 4096, 0, 0, step).ends for step in range(2000)]
    assert {len(ends) for ends in drawn} == {2}
    first = np.array([ends[0] for ends in drawn])
    for length in (2, 4, 83, 1000):
        expected = (1 - length**-power) / (1 - 4095**-power)
        assert abs(np.mean(first <= length) - expected) < 0.04


@pytest.mark.parametrize("prefixes", [1, 3, 10])
def test_as_many_random_prefixes_are_drawn_as_configured(prefixes: int) -> None:
    assert len(cuts(RandomPrefixes(prefixes=prefixes), 4096, 0, 0, 0).ends) == prefixes


@pytest.mark.parametrize("seed", [0, 5])
def test_initial_rows_are_drawn_from_the_seed(store: Store, seed: int) -> None:
    sae = Run(configure(store, {"sae.seed": seed}), [store], CPU).sae
    drawn = nnf.normalize(torch.randn(16, D, generator=torch.Generator().manual_seed(seed)), dim=1)
    torch.testing.assert_close(sae.W_dec.detach(), drawn)


@pytest.mark.parametrize("tokens", [40, 200])
def test_initial_weights_look_at_the_first_tokens_of_the_order(store: Store, tokens: int) -> None:
    run = Run(configure(store, {"sae.init.bias": "geometric_median", "sae.init.tokens": tokens}), [store], CPU)
    x = run.sae.normalization(torch.cat([batch.tokens for batch in run.loader]))

    def pull(count: int) -> float:
        """Norm of the sum of unit vectors to the first `count` tokens: 0 at their geometric median."""
        return float(nnf.normalize(x[:count] - run.sae.b_dec, dim=1).sum(dim=0).norm().detach())

    assert pull(tokens) < 0.01 < 0.1 < min(pull(tokens - 1), pull(tokens + 1))


def stream(store: Store, settings: Mapping[str, Any]) -> list[list[int]]:
    """Positions of the tokens of each batch that a run with `settings` should see."""
    o = {"seed": 0, "batch_tokens": BATCH, "window_tokens": TOKENS, "resident_shards": None, "steps": STEPS, **settings}
    holdout = HoldoutConfig(fraction=o.get("holdout.fraction", 0.0), seed=o.get("holdout.seed", 0))
    clips = np.flatnonzero(~held_out(store.clips()["video_id"].to_pylist(), holdout))
    total = o.get("tokens") or o.get("epochs", 1) * len(clips) * TIME * SPACE
    if o["steps"] is not None:
        total = o["steps"] * o["batch_tokens"]
    options = {name: o[name] for name in ("seed", "batch_tokens", "window_tokens", "resident_shards")}
    source = Source(store, "h", o.get("block_patches"))
    return [batch.positions.tolist() for batch in ActivationLoader(source, clips, total_tokens=total, **options)]


STREAMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"seed": 3}, {}),
    ({"batch_tokens": 48}, {}),
    ({"window_tokens": 96}, {}),
    ({"block_patches": 3}, {}),
    ({"block_patches": 1}, {}),
    ({"window_tokens": 96, "resident_shards": 2}, {"window_tokens": 96}),
    ({"steps": 9}, {}),
    ({"steps": None}, {}),
    ({"steps": None, "tokens": 333}, {"steps": None}),
    ({"steps": None, "epochs": 2}, {"steps": None}),
    ({"holdout.fraction": 0.3}, {}),
    ({"holdout.fraction": 0.3, "holdout.seed": 4}, {"holdout.fraction": 0.3}),
]


@pytest.mark.parametrize(("settings", "without"), STREAMS, ids=str)
def test_a_run_learns_from_the_configured_tokens(
    store: Store, settings: dict[str, Any], without: dict[str, Any]
) -> None:
    expected = stream(store, settings)
    run = Run(configure(store, settings), [store], CPU)
    assert [batch.positions.tolist() for batch in run.loader] == expected
    assert expected != stream(store, without), "the option makes no difference here: the test could not fail"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_videos_are_held_out_by_a_hash_of_seed_and_name(fraction: float, seed: int) -> None:
    videos = [f"v{number}" for number in range(200)]
    draws = [hashlib.blake2b(f"{seed}:{video}".encode(), digest_size=8).digest() for video in videos]
    expected = [int.from_bytes(draw, "little") < fraction * 2**64 for draw in draws]
    assert held_out(videos, HoldoutConfig(fraction=fraction, seed=seed)).tolist() == expected
    assert abs(np.mean(expected) - fraction) < 0.1


@pytest.mark.parametrize("eval_tokens", [50, 10**6])
def test_an_evaluation_sees_as_many_tokens_as_configured(store: Store, eval_tokens: int) -> None:
    run = Run(configure(store, {"eval_tokens": eval_tokens, "holdout.fraction": 0.3}), [store], CPU)
    assert run.heldout is not None
    held = CLIPS - len(run.loader.clips)
    assert run.evaluate(run.sae_run, run.heldout)["tokens"] == min(eval_tokens, held * TIME * SPACE)


@pytest.mark.parametrize("share", [0.25, 0.625])
def test_a_mixed_store_has_its_share_of_every_batch(store: Store, tmp_path: Path, share: float) -> None:
    plan = make_plan(clips=6, clips_per_shard=6, grid=(TIME, HEIGHT, WIDTH), hooks={"h": D})
    other = make_store(tmp_path / "other.zarr", plan, seed=1)
    tree = configure(store, {}).model_dump(exclude_unset=True)
    config = TrainConfig.model_validate({**tree, "mix": {other.url: share}})
    shares = [float((batch.clip >= CLIPS).float().mean()) for batch in Run(config, [store, other], CPU).loader]
    assert shares == [share] * STEPS
