"""What `tubelet evaluate` costs, by metric, compared with one pass over the store and the SAE's own forward pass.

    python benchmarks/lens.py [--out benchmarks/results/lens.txt]

Per shape a store of tokens with classes, persistence in time and noise, and an SAE trained on it for a few steps. Each
taker of the stream gets the same windows, one after the other; what is measured over clips runs inside the real
`evaluate` with a watch around it. One process and one thread, so that the ratios are of one run. Goal: all streaming
metrics together at most twice the SAE's own forward pass.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from goals import Goal, goal_lines
from tubelet_lens.config import EvaluateConfig, Topic
from tubelet_lens.evaluate import CLIP_METRICS, METRICS, evaluate
from tubelet_lens.inputs.clip_stream import read_clip, windows
from tubelet_lens.inputs.control_encoders import controls
from tubelet_lens.inputs.latent_time import latent_time
from tubelet_lens.inputs.pooled_clips import Pooling
from tubelet_lens.inputs.trained_sae import load_trained
from tubelet_lens.metrics.metric import ClipMetric, ClipResult, ClipSetting, Metric, Setting
from tubelet_store.clip_table import PLANNED, ClipOutcome
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_trainer.config import HoldoutConfig, TrainConfig
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sae_files import load_sae

T = TypeVar("T")

HOOK = "blocks.8"
CLASSES = 8
HOLDOUT = HoldoutConfig(fraction=0.4)
GOAL = 2.0
LEAST_S = 0.01
"""A metric that takes less was left out."""

READ, FORWARD = "reading the store once", "the SAE's forward pass"
STREAM, CONTROLS = "the stream (read, encode, decode)", "pooling, with 3 + 3 control draws"


@dataclass(frozen=True)
class Shape:
    """A backbone's tokens and an SAE on them."""

    name: str
    grid: Grid
    channels: int
    latents: int
    k: int
    clips: int


SHAPES = (
    Shape("VideoMAE-base", Grid(time=8, height=14, width=14), 768, 6144, 32, 24),
    Shape("VideoMAE-large", Grid(time=8, height=14, width=14), 1024, 8192, 32, 16),
    Shape("DINOv2-base, 16 frames", Grid(time=16, height=16, width=16), 768, 6144, 32, 10),
    Shape("demo-sized (smaller than users' backbones)", Grid(time=8, height=8, width=8), 96, 768, 16, 160),
)


class Watch:
    """Processor and wall seconds, by what they were spent on."""

    def __init__(self) -> None:
        self.processor: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Do it and count it."""
        began, at = time.process_time(), time.perf_counter()
        done = work()
        self.processor[name] = self.processor.get(name, 0.0) + time.process_time() - began
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - at
        return done


def make_store(path: Path, shape: Shape) -> Store:
    """A store whose tokens are class + patch + step, so that codes are sparse, coherent and say something."""
    clips = shape.clips
    plan = Plan(
        dataset={"kind": "random"},
        clip_table="sha256:benchmark",
        clips=clips,
        clips_per_shard=8,
        sampling={"kind": "dense"},
        preprocessing={},
        backbone={"id": "random"},
        grid=shape.grid,
        hooks=(Hook(name=HOOK, channels=shape.channels),),
    )
    columns = {
        "clip": list(range(clips)),
        "video_id": [f"video-{clip}" for clip in range(clips)],
        "uri": [f"{clip}.mp4" for clip in range(clips)],
        "view": [0] * clips,
        "label": [clip % CLASSES for clip in range(clips)],
        "label_name": [f"class {clip % CLASSES}" for clip in range(clips)],
        "caption": [f"doing thing {clip % CLASSES} with object {clip}" for clip in range(clips)],
    }
    table = pa.table({name: columns.get(name, [None] * clips) for name in PLANNED.names}, schema=PLANNED)
    writer = StoreWriter.begin(str(path), plan, table, {})
    rng = np.random.default_rng(0)
    time_, space, width = shape.grid.time, shape.grid.space, shape.channels
    of_class = rng.standard_normal((CLASSES, 1, 1, width), dtype=np.float32)
    outcome = ClipOutcome(status="ok", frame_indices=tuple(range(2 * time_)), padded_frames=0)
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                of_patch = rng.standard_normal((1, space, width), dtype=np.float32)
                of_step = rng.standard_normal((time_, space, width), dtype=np.float32)
                shard_writer.append(outcome, {HOOK: of_class[clip % CLASSES] + of_patch + 0.7 * of_step})
            shard_writer.commit()
    writer.finish()
    return open_store(str(path))


def trained(folder: Path, shape: Shape, store: Store) -> SAE:
    """A TopK SAE after a few steps, in `folder`/run."""
    out = train(
        TrainConfig(
            store=store.url,
            out=folder / "run",
            steps=12,
            batch_tokens=1024,
            eval_every=12,
            eval_tokens=1024,
            holdout=HOLDOUT,
            sae={"k": shape.k, "latents": shape.latents},
            device="cpu",
        )
    ).out
    return load_sae(out)


def streaming(watch: Watch, folder: Path, store: Store, sae: SAE, clips: NDArray[np.int64]) -> None:
    """The clips through each taker of the stream alone, and through what they are compared with."""
    device = torch.device("cpu")
    setting = Setting(
        store=store,
        hook=HOOK,
        clips=clips,
        latents=sae.latents,
        time=latent_time(store, clips),
        lags=4,
        null_draws=4,
        seed=0,
        device=device,
    )
    standing_in = controls(load_trained(folder / "run", "cpu"), store, clips, draws=3, seed=0, device=device)
    takers: dict[str, Metric | Pooling] = {topic: make(setting) for topic, make in METRICS.items()}
    takers |= {"pooling": Pooling({}), CONTROLS: Pooling(standing_in)}
    passing = windows(store, HOOK, sae, clips, setting.time.valid_CT, clips_per_window=4, device=device)
    while (window := watch(STREAM, lambda: next(passing, None))) is not None:
        for name, taker in takers.items():
            watch(name, lambda taker=taker, window=window: taker.add(window))  # type: ignore[misc]
        for clip in window.clips.tolist():
            x_ND = watch(READ, lambda clip=clip: read_clip(store, HOOK, clip)).flatten(0, 1)  # type: ignore[misc]
            with torch.no_grad():
                watch(FORWARD, lambda x_ND=x_ND: sae(x_ND))  # type: ignore[misc]


def over_clips(watch: Watch, folder: Path, store: Store) -> None:
    """The real evaluation, each metric over clips under `watch`."""
    kept = dict(CLIP_METRICS)

    def watched(topic: Topic, measure: ClipMetric) -> ClipMetric:
        def measured(clips: ClipSetting, /) -> ClipResult | None:
            return watch(topic, lambda: measure(clips))

        return measured

    try:
        CLIP_METRICS.update({topic: watched(topic, measure) for topic, measure in kept.items()})
        evaluate(EvaluateConfig(run=folder / "run", store=store.url, control_draws=1, device="cpu"))
    finally:
        CLIP_METRICS.update(kept)


def table(shape: Shape, goals: list[Goal]) -> Iterator[str]:
    """Lines of one shape's table. Adds to `goals`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder / "s.zarr", shape)
        sae = trained(folder, shape, store)
        out = held_out([f"video-{clip}" for clip in range(shape.clips)], HOLDOUT)
        clips, watch = np.flatnonzero(out), Watch()
        streaming(watch, folder, store, sae, clips)
        million = len(clips) * shape.grid.tokens / 1e6
        yield (
            f"{shape.name}: {shape.grid.tokens:,} tokens of {shape.channels} channels, {sae.latents:,} latents, "
            f"k {shape.k}; {len(clips)} clips"
        )
        yield f"{'per million tokens':<34}{'processor s':>12}{'wall s':>9}{'x forward':>11}{'x reading':>11}"

        def row(name: str, spent: tuple[float, float]) -> str:
            processor, wall = (seconds / million for seconds in spent)
            ratios = (spent[0] / watch.processor[other] for other in (FORWARD, READ))
            return f"{name:<34}{processor:>12.2f}{wall:>9.2f}" + "".join(f"{ratio:>11.2f}" for ratio in ratios)

        def spent(*names: str) -> tuple[float, float]:
            return sum(watch.processor[name] for name in names), sum(watch.wall[name] for name in names)

        for part in (READ, FORWARD, *METRICS):
            yield row(part, spent(part))
        yield row("all streaming metrics", spent(*METRICS))
        ratio = spent(*METRICS)[0] / watch.processor[FORWARD]
        goals.append(Goal(f"lens/{shape.name.split()[0]}-streaming-over-forward", ratio, at_most=GOAL))
        for part in (STREAM, "pooling", CONTROLS):
            yield row(part, spent(part))
        over_clips(watch, folder, store)
        yield f"over {len(clips)} clips, fitted on {shape.clips - len(clips)} others: seconds, whatever the tokens"
        for topic in CLIP_METRICS:
            if watch.processor[topic] > LEAST_S:
                yield f"{topic:<34}{watch.processor[topic]:>12.2f}{watch.wall[topic]:>9.2f}"


def main() -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.0f} at the start, one thread, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    ]
    print(lines[0])
    goals: list[Goal] = []
    for shape in SHAPES:
        for line in ("", *table(shape, goals)):
            print(line, flush=True)
            lines.append(line)
    lines += goal_lines(goals)
    print("\n".join(goal_lines(goals)))
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
