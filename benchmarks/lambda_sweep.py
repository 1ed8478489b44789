"""Reconstruction against coherence: what the weight of the temporal contrast buys on the demo's data, at what cost.

    python benchmarks/lambda_sweep.py [--work DIR] [--out benchmarks/results/lambda_sweep.txt]

Renders the demo's videos, extracts them with the tiny VideoMAE, and trains one SAE for every combination of kind (TopK,
BatchTopK), weight lambda_t and seed; all SAEs of a seed share one stream (`tubelet train --sweep`). A seed chooses the
initial weights and the order of the tokens. Measured on the validation videos, which no SAE was trained on:

    FVU     fraction of variance unexplained
    rho     pooled lag-1 autocorrelation of the codes, mean over latents for which it is defined (lens, note 1.4 a)
    null    the same with the time steps of each clip shuffled: what differences between clips and patches make up
    rho_w   rho weighted by how often a latent is active
    drop    (raw rho - rho) / raw rho

With `--work` a second run finds the stores and the SAEs of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from tubelet.cli import main as cli
from tubelet_lens.codes.series import Series, pairs_at_lags, shuffled_steps
from tubelet_lens.codes.sparse_codes import SparseCodes
from tubelet_lens.stats.step_pairs import PooledAutocorrelation
from tubelet_store.reader import Store, open_store
from tubelet_trainer.config import ObjectiveConfig, TrainConfig
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.pairs import fresh_steps
from tubelet_trainer.data.source import Source
from tubelet_trainer.run.heldout import evaluate
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.config import TopKConfig
from tubelet_trainer.sae.sae_files import load_sae

HOOK = "blocks.2"
VIDEOS = 240
LAMBDAS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
KINDS = ("topk", "batchtopk")
SEEDS = (0, 1, 2)
MEASURED_CLIPS = 24
EXPANSION, K = 4, 16
BATCH_TOKENS, ANCHORS = 512, 128
LR = 2e-3
NULL_DRAWS = 1


@dataclass(frozen=True)
class Coherence:
    """Pooled lag-1 autocorrelation of some features."""

    rho: float
    rho_null: float
    weighted: float
    features: int
    """Features for which it is defined."""


@dataclass(frozen=True)
class Row:
    """One SAE on the validation videos."""

    kind: str
    weight: float
    fvu: float
    l0: float
    dead: float
    coherence: Coherence


def make_stores(work: Path) -> tuple[Store, Store]:
    """Training and validation store of the demo's videos."""
    _verb("videos", str(work / "ssv2"), "--videos", str(VIDEOS))
    for split in ("train", "validation"):
        settings = {
            "dataset": {"kind": "ssv2", "root": str(work / "ssv2"), "split": split},
            "sampling": {"kind": "dense", "frames": 16, "stride": 3},
            "backbone": {"id": "videomae-tiny"},
            "hooks": [HOOK],
            "store": str(work / f"{split}.zarr"),
        }
        path = work / f"extract-{split}.yaml"
        path.write_text(yaml.safe_dump(settings))
        _verb("extract", str(path))
    return open_store(str(work / "train.zarr")), open_store(str(work / "validation.zarr"))


def _verb(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if status := cli.run(list(arguments)):
            raise SystemExit(f"`tubelet {' '.join(arguments)}` ended with status {status}")


def train_all(work: Path, store: Store, seed: int, steps: int, codes: str) -> Path:
    """All SAEs of one seed, trained on one stream."""
    config = TrainConfig(
        store=store.url,
        out=work / f"{codes}-{steps}-seed{seed}",
        hook=HOOK,
        seed=seed,
        steps=steps,
        batch_tokens=BATCH_TOKENS,
        window_tokens=65_536,
        # Only what the SAE is evaluated on elsewhere is held out.
        holdout={"fraction": 0},
        sae=TopKConfig(k=K, expansion=EXPANSION, seed=seed),
        objective=ObjectiveConfig(codes=codes),
        optimizer={"lr": LR},
        pairs={"anchors": ANCHORS},
        sweep={"sae.kind": list(KINDS), "objective.lambda_t": list(LAMBDAS)},
        log_every=max(1, steps // 4),
        checkpoint_every=steps,
        device="cpu",
    )
    return train(config).out


def coherence(store: Store, clips: range, features: int, encode: Callable[[Tensor], Tensor]) -> Coherence:
    """Coherence of `encode(tokens [N, D]) -> [N, features]` over `clips`."""
    device = torch.device("cpu")
    true, nulls = (
        PooledAutocorrelation(features, 1, device),
        [PooledAutocorrelation(features, 1, device) for _ in range(NULL_DRAWS)],
    )
    fresh_CT = torch.from_numpy(fresh_steps(store))
    grid, shard_clips = store.plan.grid, store.plan.clips_per_shard
    for clip in clips:
        stored = store.shard_map(HOOK, clip // shard_clips)[clip % shard_clips]
        values = encode(torch.from_numpy(stored.astype(np.float32)).flatten(0, 1))
        products = Series.of(SparseCodes.of(values.view(grid.time, grid.space, features))).by_feature()
        valid_CT = fresh_CT[clip : clip + 1]
        true.add(products, valid_CT[0], pairs_at_lags(valid_CT[0], torch.arange(grid.time), 1))
        for draw, null in enumerate(nulls):
            (order_T,) = shuffled_steps(np.array([clip]), valid_CT, seed=0, draw=draw)
            null.add(products, valid_CT[0], pairs_at_lags(valid_CT[0], order_T, 1))
    value = true.value(1)
    null_mean = statistics.mean(_known(null.value(1).mean) for null in nulls)
    return Coherence(_known(value.mean), null_mean, _known(value.weighted_mean), value.features)


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def measure(store: Store, folder: Path, kind: str, weight: float) -> Row:
    """One SAE on the validation store."""
    sae = load_sae(folder)
    chosen = np.arange(min(MEASURED_CLIPS, store.plan.clips))
    held = evaluate(sae, ActivationLoader(Source(store, HOOK), chosen, batch_tokens=4096, window_tokens=2**17))
    with torch.no_grad():
        measured = coherence(store, range(min(MEASURED_CLIPS, store.plan.clips)), sae.latents, sae.encode)
    return Row(kind, weight, held["fvu"], held["l0"], held["dead"], measured)


def table(rows: list[Row], raw: Coherence) -> list[str]:
    """Means and standard deviations over seeds."""
    head = f"{'kind':<10}{'lambda_t':>9}{'FVU':>16}{'rho':>16}{'null':>8}{'rho_w':>8}{'drop':>8}{'L0':>7}{'dead':>7}"
    lines = [head, f"{'raw':<10}{'':>9}{'':>16}{raw.rho:>16.4f}{raw.rho_null:>8.3f}{raw.weighted:>8.3f}"]
    for kind in KINDS:
        for weight in LAMBDAS:
            of = [row for row in rows if (row.kind, row.weight) == (kind, weight)]
            rho = [row.coherence.rho for row in of]
            lines.append(
                f"{kind:<10}{weight:>9g}{_spread([row.fvu for row in of]):>16}{_spread(rho):>16}"
                f"{statistics.mean(row.coherence.rho_null for row in of):>8.3f}"
                f"{statistics.mean(row.coherence.weighted for row in of):>8.3f}"
                f"{(raw.rho - statistics.mean(rho)) / raw.rho:>8.1%}"
                f"{statistics.mean(row.l0 for row in of):>7.1f}{statistics.mean(row.dead for row in of):>7.1%}"
            )
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def report(work: Path, steps: int, codes: str) -> str:
    """Train, measure, and describe."""
    began = time.perf_counter()
    training, validation = make_stores(work)
    mean = torch.from_numpy(training.moments(HOOK).mean).float()
    clips = range(min(MEASURED_CLIPS, validation.plan.clips))
    channels = training.plan.hook(HOOK).channels
    raw = coherence(validation, clips, channels, lambda x: x - mean)
    lines = [
        f"videomae-tiny {HOOK}, {int(training.ok().sum())} training clips of {training.plan.grid.tokens} tokens x "
        f"{channels}, {int(validation.ok().sum())} validation clips, measured on {len(clips)} of them",
        f"F {EXPANSION * channels}, k {K}, {steps} steps of {BATCH_TOKENS} tokens, {ANCHORS} anchors, "
        f"contrast on `{codes}`, cosine, temperature 0.1, Adam {LR:g}; mean ± "
        f"standard deviation over seeds {', '.join(map(str, SEEDS))}",
    ]
    rows = []
    for seed in SEEDS:
        out = train_all(work, training, seed, steps, codes)
        rows += [
            measure(validation, out / f"kind={kind},lambda_t={weight}", kind, weight)
            for kind in KINDS
            for weight in LAMBDAS
        ]
    lines += ["", *table(rows, raw)]
    lines += [
        "",
        f"{time.perf_counter() - began:.0f} s, one thread (stores and SAEs found in --work are not made again)",
    ]
    return "\n".join(lines) + "\n"


def run() -> None:
    """Measure, print, and write to `--out` if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--codes", choices=("pre", "post", "prefix"), default="pre")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tubelet-sweep-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        text = report(work, arguments.steps, arguments.codes)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    run()
