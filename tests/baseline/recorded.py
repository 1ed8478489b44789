"""What `make.py` records and `test_written_before.py` compares: the configurations, and the digests of their results.

A field that is renamed is renamed here, in the configurations. The files that were written before stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
ENCODED = HERE / "encoded.npz"
CATALOG = "catalog.yaml"
# Below HERE.
PLAIN, BFLOAT16, MERGED, EXTRACTED = STORES = tuple(
    f"stores/{name}" for name in ("plain", "bfloat16", "merged", "extracted")
)
TRAINED, INTERRUPTED, INTERRUPTED_ALONE = "trained", "interrupted", "interrupted-alone"

# Short runs that still reach everything: latents die, windows and epochs end, the schedule rises and falls.
RUN: dict[str, Any] = {
    "store": PLAIN,
    "hook": "blocks.1",
    "steps": 14,
    "batch_tokens": 48,
    "window_tokens": 240,
    "holdout": {"fraction": 0.2},
    "sae": {"latents": 32, "k": 2, "dead_after_tokens": 48},
    "optimizer": {"lr": 0.01},
    "log_every": 1,
    "eval_every": 7,
    "eval_tokens": 1000,
    "checkpoint_every": 1000,
    "device": "cpu",
}


def _sae(**fields: Any) -> dict[str, Any]:
    """The SAE of `RUN`, other than it by `fields`; kinds without a number of latents per token take no k."""
    plain = {name: value for name, value in RUN["sae"].items() if name != "k" or "sparsity" not in fields}
    return {"sae": {**plain, **fields}}


def _optimizer(**fields: Any) -> dict[str, Any]:
    return {"optimizer": {**RUN["optimizer"], **fields}}


RELU = _sae(kind="relu", sparsity=0.01, sparsity_warmup_steps=3)
GATED = _sae(kind="gated", sparsity=0.01)
JUMPRELU = _sae(kind="jumprelu", sparsity=0.01)
BATCHTOPK = _sae(kind="batchtopk")
MATRYOSHKA = _sae(kind="batchtopk", nesting={"kind": "groups"})
CONTRAST = {"objective": {"lambda_t": 0.1, "lambda_s": 0.05}, "pairs": {"anchors": 24}}
_CONTRAST_ANCHORS = CONTRAST["pairs"]

# Each is RUN but for these fields: one option that changes the arithmetic, or several that meet.
CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk-k-annealed": _sae(k_anneal_steps=5),
    "batchtopk": BATCHTOPK,
    "batchtopk-momentum": _sae(kind="batchtopk", threshold_momentum=0.9),
    "abstopk": _sae(kind="abstopk"),
    "relu": RELU,
    "relu-target-l0": _sae(kind="relu", sparsity=0.01, target_l0=3.0),
    "gated": GATED,
    "gated-target-l0": _sae(kind="gated", sparsity=0.01, target_l0=3.0),
    "jumprelu": JUMPRELU,
    "jumprelu-target-l0": _sae(kind="jumprelu", sparsity=0.01, target_l0=3.0),
    "jumprelu-quadratic": _sae(kind="jumprelu", sparsity=0.01, target_l0=3.0, penalty="quadratic"),
    "jumprelu-bandwidth": _sae(kind="jumprelu", sparsity=0.01, bandwidth=0.3, initial_threshold=0.5),
    "groups": MATRYOSHKA,
    "groups-weighted": _sae(nesting={"kind": "groups", "fractions": [1, 3], "weights": [2, 1], "bias_alone": False}),
    "random-prefixes": _sae(nesting={"kind": "random", "prefixes": 3, "sort_every": 4}),
    "random-prefixes-jumprelu": _sae(kind="jumprelu", sparsity=0.01, nesting={"kind": "random", "sort_every": None}),
    "ks": _sae(k=8, nesting={"kind": "ks"}),
    "ks-reverse": _sae(k=4, nesting={"kind": "ks", "ks": [1, 4], "weights": "reverse"}),
    "hierarchical": _sae(nesting={"kind": "hierarchical"}),
    "hierarchical-levels": _sae(kind="abstopk", k=4, nesting={"kind": "hierarchical", "levels": [1, 4]}),
    "no-auxk": _sae(auxk=0),
    "auxk-coefficient": _sae(auxk=2, auxk_coef=0.5),
    "sae-seed": _sae(seed=3),
    "not-centred": _sae(normalization={"center": False}),
    "not-scaled": _sae(normalization={"scale": False}),
    "zca": _sae(normalization={"whitening": "zca"}),
    "pca-shrunk": _sae(normalization={"whitening": "pca", "shrinkage": 0.1}),
    "init-data": _sae(init={"directions": "data", "tokens": 64}),
    "init-subspace": _sae(init={"directions": "active_subspace", "subspace": 3}),
    "init-median": _sae(init={"bias": "geometric_median"}),
    "adam-lr-default": {"optimizer": {}},
    "adam-beta1": _optimizer(beta1=0.5),
    "adam-beta2": _optimizer(beta2=0.99),
    "adam-eps": _optimizer(eps=1e-3),
    "adam-warmup": _optimizer(warmup_steps=0),
    "adam-decay": _optimizer(decay_fraction=0.0),
    "adam-clip": _optimizer(grad_clip=0.01),
    "ema": _optimizer(ema=0.9),
    "resampled": _optimizer(resample_every=3),
    "resampled-jumprelu-ema": {**JUMPRELU, **_optimizer(resample_every=3, ema=0.9)},
    "contrast": CONTRAST,
    "contrast-post": {"objective": {"lambda_t": 0.1, "codes": "post"}, "pairs": _CONTRAST_ANCHORS},
    "contrast-dot": {"objective": {"lambda_t": 0.01, "similarity": "dot"}, "pairs": _CONTRAST_ANCHORS},
    "contrast-temperature": {"objective": {"lambda_t": 0.1, "temperature": 0.5}, "pairs": _CONTRAST_ANCHORS},
    "contrast-far": {"objective": {"lambda_t": 0.1}, "pairs": {"anchors": 24, "max_delta": 2}},
    "contrast-8-neighbors": {"objective": {"lambda_s": 0.1}, "pairs": {"anchors": 24, "neighbors": 8}},
    "contrast-random-neighbors": {"objective": {"lambda_s": 0.1}, "pairs": {"anchors": 24, "neighbors": "random"}},
    "contrast-gated": {**GATED, **CONTRAST},
    "t-sae": {
        **BATCHTOPK,
        "objective": {"lambda_t": 0.1, "lambda_slow": 1.0, "codes": "prefix", "prefix_fraction": 0.25},
        "pairs": {"anchors": 24},
    },
    "smooth": {"objective": {"lambda_smooth": 0.1}, "pairs": _CONTRAST_ANCHORS},
    "topk-bfloat16": {"precision": "bfloat16"},
    "batchtopk-bfloat16": {**BATCHTOPK, "precision": "bfloat16"},
    "relu-bfloat16": {**RELU, "precision": "bfloat16"},
    "gated-bfloat16": {**GATED, "precision": "bfloat16"},
    "jumprelu-bfloat16": {**JUMPRELU, "precision": "bfloat16"},
    "matryoshka-bfloat16": {**MATRYOSHKA, "precision": "bfloat16"},
    "contrast-bfloat16": {**CONTRAST, "precision": "bfloat16"},
    "seed": {"seed": 1},
    "other-hook": {"hook": "blocks.3"},
    "epochs": {"steps": None, "epochs": 1},
    "tokens": {"steps": None, "tokens": 500},
    "blocks": {"block_patches": 2},
    "resident-shards": {"resident_shards": 2},
    "other-holdout": {"holdout": {"fraction": 0.4, "seed": 2}},
    "bfloat16-store": {"store": BFLOAT16},
    "merged-store": {"store": MERGED},
    "extracted-store": {"store": EXTRACTED, "hook": "blocks.2", "pairs": {"anchors": 24}},
    "mix": {"mix": {MERGED: 0.25}},
}

# Several SAEs of one stream: every state that a checkpoint may hold.
KINDS: list[dict[str, Any]] = [
    {"name": "topk", **_sae()},
    {"name": "batchtopk", **BATCHTOPK},
    {"name": "abstopk-zca", **_sae(kind="abstopk", normalization={"whitening": "zca"})},
    {"name": "relu-target-l0", **CASES["relu-target-l0"]},
    {"name": "gated", **GATED},
    {"name": "jumprelu", **JUMPRELU},
    {"name": "matryoshka", **MATRYOSHKA},
    {"name": "random-prefixes", **CASES["random-prefixes"]},
    {"name": "ema-resampled", **_sae(), **_optimizer(ema=0.9, resample_every=3)},
    {"name": "contrast", **_sae(), "objective": CONTRAST["objective"]},
    {"name": "other-hook", **_sae(), "hook": "blocks.3"},
]
GROUP: dict[str, Any] = {"sae": {}, "saes": KINDS, "pairs": CONTRAST["pairs"]}
# A mix of stores, products in bfloat16.
ALONE: dict[str, Any] = {**MATRYOSHKA, "precision": "bfloat16", "mix": {MERGED: 0.25}}

# The interrupted runs ended after this many of their steps.
INTERRUPTED_AFTER = 8
INTERRUPTED_RUNS = {INTERRUPTED: GROUP, INTERRUPTED_ALONE: ALONE}

# `tubelet evaluate` of what training evaluates too.
EVALUATE: dict[str, Any] = {
    "controls": False,
    "device": "cpu",
    "skip": ["coherence", "action", "labels", "ablation", "retrieval", "monosemanticity", "collinearity", "scope"],
}


def train_config(case: dict[str, Any], out: Path, root: Path = HERE, **fields: Any) -> dict[str, Any]:
    """A configuration of `tubelet train`: `RUN`, but for `case` and `fields`, on stores below `root`."""
    tree = {**RUN, **case, "out": str(out), **fields}
    tree["store"] = str(root / tree["store"])
    if "mix" in tree:
        tree["mix"] = {str(root / store): share for store, share in tree["mix"].items()}
    return tree


def write_config(path: Path, tree: dict[str, Any]) -> str:
    """A settings file; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return str(path)


def digest(tensor: Tensor) -> str:
    """Of type, shape and every bit."""
    whole = tensor.detach().cpu().contiguous()
    head = f"{whole.dtype} {list(whole.shape)} ".encode()
    return hashlib.sha256(head + whole.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def weight_digests(folder: Path) -> list[str]:
    """Of each tensor of the SAE in `folder`, sorted: a tensor may get another name, not another bit."""
    return sorted(digest(tensor) for tensor in load_file(folder / "sae.safetensors").values())


def losses(folder: Path) -> dict[str, list[float]]:
    """Of the run in `folder`: the training loss of each step, and the evaluations' FVU and L0."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {"loss": [line["loss"] for line in lines if line["kind"] == "train"]}
    for name in ("fvu", "l0"):
        found[f"eval {name}"] = [line[name] for line in lines if line["kind"] == "eval"]
    return found


def results(out: Path) -> dict[str, Any]:
    """Of each SAE of the run in `out`, by its folder: digests of the weights, and losses."""
    folders = sorted(path.parent for path in out.rglob("sae.json"))
    return {str(folder.relative_to(out)): {"weights": weight_digests(folder), **losses(folder)} for folder in folders}


def array_digest(values: np.ndarray) -> str:
    """Of type, shape and every bit."""
    head = f"{values.dtype} {list(values.shape)} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def column_digests(table: pa.Table) -> dict[str, str]:
    """Of every column's values."""
    columns = {name: json.dumps(table[name].to_pylist()).encode() for name in table.column_names}
    return {name: hashlib.sha256(values).hexdigest()[:16] for name, values in columns.items()}


def machine() -> dict[str, str]:
    """What the bits of a training depend on beside this project: torch, the CPU, and how they compute together."""
    return {
        "torch": torch.__version__,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "arithmetic": _arithmetic(),
    }


def _arithmetic() -> str:
    """Digest of what torch makes of the operations and sizes of these runs. Not of this project's code."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found: list[Tensor] = []
    for channels in (8, 12, 96):
        x_BD, w_FD = drawn(48, channels), drawn(32, channels)
        pre_BF = nnf.linear(x_BD, w_FD, drawn(32))
        square_DD = x_BD.double().T @ x_BD.double()
        found += [pre_BF, pre_BF.relu() @ w_FD, pre_BF.T @ x_BD, pre_BF @ pre_BF.T, *torch.linalg.eigh(square_DD)]
        found += [nnf.linear(x_BD.bfloat16(), w_FD.bfloat16()), x_BD.norm(dim=1), x_BD.square().sum()]
        found += [pre_BF.exp(), pre_BF.abs().log(), pre_BF.abs().rsqrt(), pre_BF.softmax(dim=1)]
        found += [pre_BF.logsumexp(dim=1), torch.linalg.vector_norm(pre_BF)]
    return hashlib.sha256("".join(digest(tensor) for tensor in found).encode()).hexdigest()[:16]
