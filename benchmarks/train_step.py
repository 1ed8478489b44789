"""What a training step costs compared with its encoder's matrix product, and what feeding it from the store costs.

    python benchmarks/train_step.py [--sizes 4096 8192] [--out benchmarks/results/train_step.txt]

The encoder's product has to be paid by any SAE; everything else (choosing, decoding, both gradients, clipping, Adam,
unit norm) is overhead. On a CPU times are processor seconds of one thread, so that other work on the machine does not
count; on a GPU they are wall clock between synchronizations. The dense row is the same step with dense codes and plain
autograd, same optimizer. On a GPU the step is measured as it comes, compiled, and as a CUDA graph.

Several SAEs: K of one shape that step together, over K times one of them alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from goals import Goal, goal_lines
from loader import GRID, HOOK, make_store
from random_store import random_store
from tubelet_store.plan import Hook
from tubelet_trainer.config import ObjectiveConfig, OptimizerConfig, PairsConfig
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.pairs import PairDraw
from tubelet_trainer.data.source import Source
from tubelet_trainer.losses.coherence import coherence_terms
from tubelet_trainer.losses.objective import Forward, Objective, Term
from tubelet_trainer.losses.sparsity import sae_terms
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.optim.stacked import StackedSAEs
from tubelet_trainer.run.environment import keep_memory
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, Groups, JumpReLUConfig, SAEConfig, TopKConfig
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.normalization import Normalization

# Of VideoMAE-base; of VideoMAE-large and ViT-L, which are measured at one size.
CHANNELS, LARGE_CHANNELS = 768, 1024
PLAIN = ObjectiveConfig()
KS = (32, 64)
SIZES = (4096, 8192, 16384, 32768, 65536)
CPU_BATCH, GPU_BATCH = 1024, 8192
REPEATS = 3
WARM_UP = 5

TOGETHER_LATENTS = (1536, 6144)

# Latents and k of the step that has a goal.
GOAL_STEP = (8192, 32)

FEED_LATENTS, FEED_BATCH, FEED_STEPS = 6144, 1024, 24


class Stopwatch:
    """Seconds on a device: of this process's threads on a CPU, of the wall on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def best(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        """Fewest seconds of several calls, after one that is not counted."""
        work()
        return min(self.once(work) for _ in range(repeats))

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self.device.type == "cpu":
            start = time.process_time()
            work()
            return time.process_time() - start
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def make_trainer(
    config: SAEConfig,
    device: torch.device,
    precision: torch.dtype,
    objective: ObjectiveConfig = PLAIN,
    channels: int = CHANNELS,
) -> SAETrainer:
    """An SAE whose latents are all alive, as most are after the start of a run."""
    sae = SAE(config, Normalization.identity(channels)).to(device)
    terms = sae_terms(config, channels, float(channels), 1000, device)
    terms += coherence_terms(objective, config, sae.latents, float(channels))
    return SAETrainer(sae, Objective(terms), OptimizerConfig(), 1000, 2**62, precision)


def stepping(
    sae_trainers: list[SAETrainer], x_BD: Tensor, compiled: bool = False, captured: bool = False
) -> Callable[[], object]:
    """One step of all `sae_trainers` together, on the same batch each time."""
    sae_group = SAEGroup(sae_trainers, [HOOK] * len(sae_trainers), len(x_BD), compiled, captured)
    batch = batch_of(x_BD)
    return lambda: sae_group.learn(batch, 5)


def batch_of(x_BD: Tensor) -> Batch:
    """Tokens as a batch."""
    return Batch({HOOK: x_BD}, torch.arange(len(x_BD), device=x_BD.device), GRID, len(x_BD))


def dense_step(sae_trainer: SAETrainer, x_BD: Tensor) -> None:
    """The step of `sae_trainer`, through dense codes and plain autograd."""
    sae = sae_trainer.sae
    pre_BF = (x_BD - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    top = pre_BF.topk(sae.config.k, dim=1, sorted=False)  # type: ignore[attr-defined]
    codes = Codes(top.values.relu(), top.indices)
    recon_BD = torch.zeros_like(pre_BF).scatter(1, codes.indices, codes.values) @ sae.W_dec + sae.b_dec
    error = (x_BD - recon_BD).square().sum() / x_BD.numel()
    sae_trainer.optimizer.zero_grad()
    error.backward()
    sae_trainer.update(Forward(sae, x_BD, pre_BF, codes, recon_BD, sae_trainer.dead_latents.dead_F), Term(error, {}))


def steps_table(
    device: torch.device, sizes: tuple[int, ...], goals: list[Goal], channels: int = CHANNELS
) -> Iterator[str]:
    """Lines of the table of steps. Adds to `goals`."""
    cuda = device.type == "cuda"
    batch, precision = (GPU_BATCH, torch.bfloat16) if cuda else (CPU_BATCH, torch.float32)
    watch = Stopwatch(device)
    x_BD = torch.randn(batch, channels, device=device)
    yield f"batch {batch}, {channels} channels, {str(precision).removeprefix('torch.')} encoder product"
    extra = f"{'tokens/s':>10} {'of matrix rate':>15}" if cuda else ""
    extra += f"{'compiled x':>11} {'graph x':>8}" if cuda else ""
    yield f"{'latents':>8} {'k':>4} {'encoder ms':>11} {'step ms':>9} {'x encoder':>10} {'dense x':>8}{extra}"
    rate = _matrix_rate(watch, device, precision) if cuda else 0.0
    for latents in sizes:
        for k in KS:
            config = TopKConfig(latents=latents, k=k)
            sae_trainer = make_trainer(config, device, precision, channels=channels)
            weight, low = sae_trainer.sae.W_enc.detach().to(precision), x_BD.to(precision)
            encoder = watch.best(lambda low=low, weight=weight: low @ weight.T)  # type: ignore[misc]
            step = watch.best(stepping([sae_trainer], x_BD))
            dense = watch.best(lambda sae_trainer=sae_trainer: dense_step(sae_trainer, x_BD), 1) if k == KS[0] else None  # type: ignore[misc]
            if (latents, k) == GOAL_STEP:
                limit = 1.5 if cuda else 2.0
                name = f"train_step/{device.type}-step-over-encoder-{channels}-channels"
                goals.append(Goal(name, step / encoder, at_most=limit))
            line = f"{latents:>8} {k:>4} {encoder * 1e3:>11.1f} {step * 1e3:>9.1f} {step / encoder:>10.2f} "
            line += f"{dense / encoder:>8.2f}" if dense is not None else " " * 8
            if cuda:
                line += f"{batch / step:>10.0f} {2 * batch * latents * channels / step / rate:>15.1%}"
                for choice in ({"compiled": True}, {"captured": True}):
                    again = make_trainer(config, device, precision, channels=channels)
                    other = stepping([again], x_BD, **choice)
                    for _ in range(WARM_UP):
                        other()
                    line += f"{watch.best(other) / encoder:>{11 if 'compiled' in choice else 9}.2f}"
            yield line


def parts_table(device: torch.device, latents: int, k: int) -> Iterator[str]:
    """Where the time of a step goes."""
    sae_trainer, watch = make_trainer(TopKConfig(latents=latents, k=k), device, torch.float32), Stopwatch(device)
    sae, x_BD = sae_trainer.sae, torch.randn(CPU_BATCH, CHANNELS, device=device)
    stacked, batch = StackedSAEs([sae_trainer], HOOK), batch_of(x_BD)
    stacked.begin(5, batch)
    stacked.compute(batch, x_BD, 5)
    pre_BF = sae.pre_activations(x_BD)
    (forward,), (total,) = stacked.losses(batch, x_BD)
    parts = {
        "encoder product": watch.best(lambda: sae.pre_activations(x_BD)),
        "choosing k": watch.best(lambda: sae.sparsifier(pre_BF)),
        "forward and loss, all": watch.best(lambda: stacked.losses(batch, x_BD)),
        "backward": watch.once(total.loss.backward),
        "project, clip, Adam, unit norm, counts": watch.best(partial(sae_trainer.update, forward, total)),
    }
    yield f"parts of a step, {latents} latents, k {k}: " + ", ".join(f"{n} {s * 1e3:.0f} ms" for n, s in parts.items())


def kinds_table(device: torch.device, latents: int, k: int) -> Iterator[str]:
    """A step of other recipes over the encoder's product."""
    cuda = device.type == "cuda"
    tokens, precision = (GPU_BATCH, torch.bfloat16) if cuda else (CPU_BATCH, torch.float32)
    watch, topk = Stopwatch(device), TopKConfig(latents=latents, k=k)
    kinds: dict[str, tuple[SAEConfig, ObjectiveConfig]] = {
        "TopK": (topk, PLAIN),
        "TopK, half of them dead (AuxK)": (topk, PLAIN),
        "BatchTopK": (BatchTopKConfig(latents=latents, k=k), PLAIN),
        "AbsTopK": (AbsTopKConfig(latents=latents, k=k), PLAIN),
        "Matryoshka TopK, 5 groups": (topk.model_copy(update={"nesting": Groups()}), PLAIN),
        "TopK, contrast in time": (topk, ObjectiveConfig(lambda_t=0.1)),
        "TopK, contrast in time and space": (topk, ObjectiveConfig(lambda_t=0.1, lambda_s=0.1)),
        "JumpReLU (dense codes)": (JumpReLUConfig(latents=latents), PLAIN),
    }
    with tempfile.TemporaryDirectory() as folder:
        clips = -(-2 * tokens // GRID.tokens)
        store = random_store(Path(folder) / "s.zarr", GRID, Hook(name=HOOK, channels=CHANNELS), clips, clips)
        draw = PairDraw(PairsConfig(anchors=tokens // 4), temporal=True, spatial=True)
        source = Source(store, HOOK, GRID.space)
        windows = ActivationLoader(
            source, np.arange(clips), batch_tokens=tokens, window_tokens=2**20, pairs=draw, device=device
        )
        batch = next(iter(windows))
    sae_trainer = make_trainer(topk, device, precision)
    weight, low = sae_trainer.sae.W_enc.detach().to(precision), batch.tokens.to(precision)
    encoder = watch.best(lambda: low @ weight.T)
    yield (
        f"a step of other recipes over the encoder's product, {latents} latents, k {k}, batch {tokens}, "
        f"{tokens // 4} anchors of pairs:"
    )
    for name, (config, objective) in kinds.items():
        sae_trainer = make_trainer(config, device, precision, objective)
        if "dead" in name:
            with torch.no_grad():
                sae_trainer.sae.b_enc[::2] = -1e3
            sae_trainer.dead_latents.silent_tokens_F[::2] = 2**62 + 1
            sae_trainer.dead_latents.dead_count = latents // 2
        sae_group = SAEGroup([sae_trainer], [HOOK], tokens)
        yield f"  {name:<34}{watch.best(partial(sae_group.learn, batch, 5)) / encoder:>7.2f}"


def together_table(device: torch.device) -> Iterator[str]:
    """K SAEs that step together over K that step alone."""
    cuda = device.type == "cuda"
    batch, precision = (GPU_BATCH, torch.bfloat16) if cuda else (CPU_BATCH, torch.float32)
    watch, x_BD = Stopwatch(device), torch.randn(batch, CHANNELS, device=device)
    for latents in TOGETHER_LATENTS:
        alone = watch.best(stepping([make_trainer(TopKConfig(latents=latents, k=KS[0]), device, precision)], x_BD))
        parts = []
        for count in (4, 8):
            configs = [TopKConfig(latents=latents, k=KS[0], seed=seed) for seed in range(count)]
            sae_trainers = [make_trainer(config, device, precision) for config in configs]
            together = watch.best(stepping(sae_trainers, x_BD))
            parts.append(f"{count} together {together / (count * alone):.2f}")
        yield f"SAEs of {latents} latents, k {KS[0]}: {', '.join(parts)} of the time of as many alone"


def feeding_table(device: torch.device, goals: list[Goal]) -> Iterator[str]:
    """Training fed by the store over training fed by a resident tensor. Adds to `goals`."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store.zarr")
        clips = np.arange(store.plan.clips)
        source = Source(store, HOOK)
        precision = torch.bfloat16 if device.type == "cuda" else torch.float32
        sae_group = SAEGroup(
            [make_trainer(TopKConfig(latents=FEED_LATENTS, k=KS[0]), device, precision)], [HOOK], FEED_BATCH
        )
        resident = torch.from_numpy(store.shard_map(HOOK, 0).reshape(-1, CHANNELS).copy()).to(device)

        def from_store() -> None:
            windows = ActivationLoader(
                source,
                clips,
                batch_tokens=FEED_BATCH,
                window_tokens=8 * FEED_BATCH,
                total_tokens=FEED_STEPS * FEED_BATCH,
                device=device,
            )
            for number, batch in enumerate(windows):
                sae_group.learn(batch, number)

        def from_memory() -> None:
            order = torch.randperm(len(resident), device=device)
            for number in range(FEED_STEPS):
                rows = order[number * FEED_BATCH % len(resident) :][:FEED_BATCH]
                sae_group.learn(batch_of(resident[rows].float()), number)

        watch, wall = Stopwatch(device), []
        from_memory()
        processor = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            stored = watch.once(from_store)
            middle = time.perf_counter()
            processor.append(watch.once(from_memory) / stored)
            wall.append((time.perf_counter() - middle) / (middle - start))
    # Processor time where it is a CPU's: the wall depends on what else runs.
    fed = statistics.median(wall if device.type == "cuda" else processor)
    goals.append(Goal(f"train_step/{device.type}-fed-over-resident", fed, at_least=0.97))
    yield (
        f"training fed by the store / by a resident tensor ({FEED_STEPS} steps of {FEED_BATCH}, "
        f"{FEED_LATENTS} latents, k {KS[0]}, windows of {8 * FEED_BATCH} tokens, page cache): "
        f"{statistics.median(wall):.3f} of its speed by the wall, {statistics.median(processor):.3f} by processor time"
    )


def _matrix_rate(watch: Stopwatch, device: torch.device, dtype: torch.dtype) -> float:
    side = 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / watch.best(lambda: a @ a, 10)


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    lines = [
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f} at the start, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    ]

    def tell(part: Iterator[str]) -> None:
        for line in part:
            print(line, flush=True)
            lines.append(line)

    print(lines[0])
    tell(iter(["", "CPU: processor seconds, one thread"]))
    torch.set_num_threads(1)
    keep_memory()
    cpu = torch.device("cpu")
    goals: list[Goal] = []
    tell(steps_table(cpu, tuple(arguments.sizes), goals))
    tell(steps_table(cpu, GOAL_STEP[:1], goals, LARGE_CHANNELS))
    tell(iter([""]))
    tell(parts_table(cpu, 16384, 32))
    tell(kinds_table(cpu, 16384, 32))
    tell(together_table(cpu))
    tell(feeding_table(cpu, goals))
    tell(iter(["", "CUDA: bf16 encoder product, fused Adam, Triton kernels"]))
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        tell(steps_table(gpu, tuple(arguments.sizes), goals))
        tell(steps_table(gpu, GOAL_STEP[:1], goals, LARGE_CHANNELS))
        tell(kinds_table(gpu, 16384, 32))
        tell(together_table(gpu))
        tell(feeding_table(gpu, goals))
    else:
        tell(iter(["not measured: no CUDA device"]))
    tell(iter(goal_lines(goals)))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
