"""What extraction costs compared with its parts, one run: decode, forward, write alone, the pipeline, a plain script.

    python benchmarks/extract.py [--videos 144] [--size 224] [--layers 6] [--width 192]

Ratios count, not seconds. The yardstick is the busiest resource: on a machine without a GPU the cores (CPU seconds of
all three stages over the number of cores), with one the GPU or the cores, whichever is needed longer. A job of minutes
pays for the start of its workers and for its last shards, when not all of them have work; a job of hours hardly does:
the row `steady` is the rate between the first and the last eighth of the shards. Below the table is the use of the
cores meanwhile: this job, other processes, idle.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import zarr

from goals import Goal, goal_lines
from tubelet_pipeline.backbones import load_backbone
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodedClip
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.extract_report import ExtractSummary
from tubelet_pipeline.plan_extraction import make_plan
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.store_writer import StoreWriter

CORES = len(os.sched_getaffinity(0))
# The plain script is slow, and each clip costs it the same: a part of them will do.
_PLAIN_SHARE = 4


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of `work`, children that ended included."""
    cpu, wall = _cpu_s(), time.perf_counter()
    work()
    return time.perf_counter() - wall, _cpu_s() - cpu


def _cpu_s() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _tree_cpu_s() -> float:
    """CPU seconds of this process and all below it that live."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def decode_all(config: ExtractConfig, requests: list[DecodeRequest]) -> list[DecodedClip]:
    """Every clip, by one decode process per core."""
    with DecodePool(config.decode.model_copy(update={"processes": CORES})) as pool:
        return [clip for clip in pool.map_ordered(requests, prefetch=8) if isinstance(clip, DecodedClip)]


def plain_script(config: ExtractConfig, folder: Path, clips: int) -> None:
    """What one writes first: decode, forward, zarr with its defaults, one clip after the other, the first `clips`."""
    planned = make_plan(config)
    backbone = load_backbone(config.backbone, frames=config.sampling.frames)
    torch.set_num_threads(CORES)
    plan = planned.plan
    group = zarr.open_group(str(folder), mode="w")
    arrays = {
        hook.name: group.create_array(
            hook.name, shape=(plan.clips, *plan.clip_shape(hook)), chunks=(1, *plan.clip_shape(hook)), dtype="float16"
        )
        for hook in plan.hooks
    }
    root = str(config.dataset.root)
    with DecodePool(config.decode.model_copy(update={"processes": 1})) as pool:
        requests = (
            DecodeRequest(resolve_uri(root, uri.as_py()), config.sampling) for uri in planned.clips["uri"][:clips]
        )
        for number, clip in enumerate(pool.map_ordered(requests, prefetch=1)):
            assert isinstance(clip, DecodedClip)
            captured = backbone.activations(backbone.preprocess(clip.frames)[0][None], list(arrays))
            for hook, values in captured.items():
                arrays[hook][number] = values.tokens[0].float().cpu().numpy().astype(np.float16)


@dataclass(frozen=True)
class Mark:
    """A moment of the job: wall clock, processor seconds of its processes, idle seconds of the cores, clips done."""

    wall_s: float
    cpu_s: float
    idle_s: float
    clips: int

    @classmethod
    def now(cls, summary: ExtractSummary) -> Mark:
        """This moment."""
        machine = psutil.cpu_times()
        return cls(time.perf_counter(), _tree_cpu_s(), machine.idle + machine.iowait, summary.clips_this_run)


def _who_had_the_cores(warm: Mark, late: Mark) -> str:
    """Shares of all cores' time between two marks."""
    whole = (late.wall_s - warm.wall_s) * len(psutil.cpu_times(percpu=True))
    ours, idle = (late.cpu_s - warm.cpu_s) / whole, (late.idle_s - warm.idle_s) / whole
    others = 1 - ours - idle
    return f"while it ran steadily, the cores were {ours:.1%} this job's, {idle:.1%} idle, {others:.1%} others'"


def _where_workers_were(log: Path) -> str:
    """What the tasks' own threads did with their time, of all shards."""
    events = [json.loads(line) for line in log.open()]
    shards = [event["seconds"] for event in events if event["event"] == "shard"]
    spent = {name: sum(shard[name] for shard in shards) for name in ("decode", "forward", "total", "publish")}
    spent["whole"] = spent["total"] + spent["publish"]
    rest = spent["total"] - spent["decode"] - spent["forward"]
    parts = {
        "waiting for pixels": spent["decode"],
        "in the forward pass or waiting for their turn": spent["forward"],
        "waiting for the writer": rest,
        "publishing": spent["publish"],
    }
    return "tasks were " + ", ".join(f"{seconds / spent['whole']:.1%} {name}" for name, seconds in parts.items())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=144)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--workers", type=int, default=CORES)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tubelet-bench-"))
    try:
        _run(options, folder)
    finally:
        shutil.rmtree(folder)


def _run(options: argparse.Namespace, folder: Path) -> None:
    make_dataset(
        VideosConfig(
            out=folder / "videos", videos=options.videos, frames=64, height=240, width=320, validation_share=0.0
        )
    )
    model = write_tiny_videomae(
        folder / "model",
        image_size=options.size,
        patch_size=16,
        hidden=options.width,
        layers=options.layers,
        heads=options.width // 64,
    )
    config = ExtractConfig.model_validate(
        {
            "dataset": {"kind": "ssv2", "root": str(folder / "videos"), "split": "train"},
            "sampling": {"kind": "dense", "frames": 16, "stride": 2},
            "backbone": {"id": str(model)},
            "hooks": [f"blocks.{options.layers // 2}", f"blocks.{options.layers - 1}"],
            "store": str(folder / "store.zarr"),
            "batch_size": 4,
            "clips_per_shard": 8,
            "decode": {"processes": 1},
            "cluster": {"workers": options.workers, "threads": 1},
        }
    )
    planned = make_plan(config)
    root = str(config.dataset.root)
    requests = [DecodeRequest(resolve_uri(root, uri.as_py()), config.sampling) for uri in planned.clips["uri"]]
    backbone = load_backbone(config.backbone, frames=16)
    torch.set_num_threads(CORES)
    on_gpu = backbone.device.type == "cuda"

    clips: list[DecodedClip] = []
    decode = measured(lambda: clips.extend(decode_all(config, requests)))

    batches = [clips[i : i + 4] for i in range(0, len(clips), 4)]
    activations: list[dict[str, np.ndarray]] = []

    def forward() -> None:
        for batch in batches:
            pixels = torch.stack([backbone.preprocess(clip.frames)[0] for clip in batch])
            captured = backbone.activations(pixels, config.hooks)
            values = {hook: c.tokens.float().cpu().numpy() for hook, c in captured.items()}
            activations.extend({hook: v[i] for hook, v in values.items()} for i in range(len(batch)))

    forward_cost = measured(forward)

    def write() -> None:
        writer = StoreWriter.begin(str(folder / "alone.zarr"), planned.plan, planned.clips, {})
        for shard in writer.pending():
            with writer.shard(shard) as shard_writer:
                for clip in planned.plan.shard_range(shard):
                    shard_writer.append(ClipOutcome(status="ok"), activations[clip])
                shard_writer.commit()
        writer.finish()

    write_cost = measured(write)

    # Starting workers and planning are paid once a job, not per clip.
    marks: list[Mark] = []
    whole_wall, _ = measured(lambda: extract(config, lambda summary: marks.append(Mark.now(summary))))
    begun, last = marks[0], marks[-1]
    eighth = max(1, len(marks) // 8)
    warm, late = marks[eighth], marks[-1 - eighth]
    per_all = len(clips) / (late.clips - warm.clips)
    steady = np.array([late.wall_s - warm.wall_s, late.cpu_s - warm.cpu_s])
    few = max(1, len(clips) // _PLAIN_SHARE)
    plain_wall, plain_cpu = measured(lambda: plain_script(config, folder / "plain.zarr", few))

    cpu = decode[1] + forward_cost[1] + write_cost[1]
    need = max(forward_cost[0], (decode[1] + write_cost[1]) / CORES) if on_gpu else cpu / CORES
    rows = [
        ("decode alone", *decode),
        ("forward alone", *forward_cost),
        ("write alone", *write_cost),
        (f"busiest resource ({'GPU or cores' if on_gpu else 'cores'}) needs", need, cpu),
        ("pipeline, steady, scaled to all clips", *(per_all * steady)),
        ("pipeline, workers there to last shard", last.wall_s - begun.wall_s, last.cpu_s - begun.cpu_s),
        ("pipeline, from nothing to complete", whole_wall, float("nan")),
        (f"plain script, zarr defaults ({few} clips)", plain_wall * len(clips) / few, plain_cpu * len(clips) / few),
    ]
    shape = f"16x{options.size}x{options.size}"
    small = "" if options.width >= 768 else " (smaller than the backbones that users have)"
    print(f"{len(clips)} clips {shape}, {options.layers} layers of {options.width}{small}, {CORES} cores")
    print(f"load average {os.getloadavg()[0]:.1f}: other work on the machine makes walls longer, CPU seconds less so")
    print(f"{'':41}{'seconds':>9}{'CPU s':>9}{'wall/need':>11}{'CPU/CPU':>9}")
    for name, wall, used in rows:
        print(f"{name:41}{wall:9.2f}{used:9.2f}{wall / need:11.2f}{used / cpu:9.2f}")
    print(_who_had_the_cores(warm, late))
    print(_where_workers_were(Path(f"{config.store}.log.jsonl")))
    if on_gpu:
        print(f"GPU busy fraction {forward_cost[0] / (last.wall_s - begun.wall_s):.2f}")
        print(f"decode cores that feed one GPU {decode[1] / forward_cost[0]:.1f}")
    else:
        print("GPU busy fraction, decode cores per GPU: not measured: no GPU")
    goals = [Goal("extract/steady-over-need", per_all * float(steady[0]) / need, at_most=1.15)]
    if on_gpu:
        busy = forward_cost[0] / (per_all * float(steady[0]))
        goals.append(Goal("extract/gpu-busy", busy, at_least=0.9))
    else:
        goals.append(Goal("extract/steady-cpu-over-need", per_all * float(steady[1]) / cpu, at_most=1.15))
    print("\n".join(goal_lines(goals)))


if __name__ == "__main__":
    main()
