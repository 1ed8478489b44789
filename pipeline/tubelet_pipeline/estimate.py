"""The cost of an extraction before it runs: bytes, objects and requests from its plan, time from a short calibration.

the job's configuration ─▶ plan ─▶ sizes and counts (exact)
                           └─▶ a few clips decoded, computed, hashed and written on this machine ─▶ time
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from pydantic import Field

from tubelet.errors import TubeletError
from tubelet.formats import human_bytes, human_seconds
from tubelet.tables import Table, Tabular
from tubelet_pipeline.backbones import Backbone, load_backbone
from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodedClip
from tubelet_pipeline.decode.pool import DecodePool
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.plan_extraction import Planned, make_plan
from tubelet_pipeline.token_selection import TokenSelector
from tubelet_pipeline.views import clip_request, locate
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.format import array_kinds, clip_bytes, index_bytes, metadata_documents, shard_bytes
from tubelet_store.plan import DTypeName, Plan, numpy_dtype
from tubelet_store.shard_writer import ShardWriter
from tubelet_store.storage.local import LocalRoot
from tubelet_store.storage.upload import part_count

T = TypeVar("T")

# Group, arrays and one chunk each of six statistics, as `format.moments_documents` writes them.
_MOMENTS_DOCUMENTS = 15
# For `batch_size: auto`.
_BATCH = 8


class EstimateConfig(ExtractConfig):
    """The job to estimate, and the effort of measuring."""

    # The extraction's, less where it runs.
    COMMON: ClassVar[tuple[str, ...]] = (
        *(field for field in ExtractConfig.COMMON if not field.startswith("cluster.")),
        "calibration_clips",
        "format",
    )

    calibration_clips: int = Field(default=8, ge=1)
    """Clips decoded and computed on this machine to measure the time."""
    patch_fraction: float = Field(default=0.25, gt=0, le=1)
    """Share of the patches in the estimate of what a subset of patches would save."""
    format: Literal["text", "json"] = "text"
    """`json`: machine-readable, with all figures."""


@dataclass(frozen=True)
class Calibration:
    """Seconds per clip of each stage on this machine, measured one at a time."""

    clips: int
    """Number of clips decoded."""
    failed: int
    """Number of sampled clips that could not be decoded."""
    decode_s: float
    """One decode process."""
    forward_s: float
    """One worker: preprocessing and forward pass, `cluster.threads` threads."""
    write_s: float
    """Statistics, digests and writing to the local disk, one thread."""
    forward_on: str
    """Device of the forward pass."""


@dataclass(frozen=True, repr=False)
class Estimate(Tabular):
    """The costs of one extraction."""

    clips: int
    shards: int
    clips_per_shard: int
    bytes_per_hook: dict[str, int]
    total_bytes: int
    objects: int
    """Number of objects of the finished store, including records and metadata."""
    requests: dict[str, int]
    """Requests to object storage for the whole job without faults: `put` (and parts), `get` (and HEAD, listings)."""
    workers: int
    calibration: Calibration
    seconds: float
    """Time of the whole job with `workers` workers like this machine."""
    limited_by: str
    """The slowest stage: `decode`, `forward`, `write`, or `cores`, which the workers of one machine share."""
    alternatives: dict[str, int] = field(default_factory=dict)
    """Total bytes with one setting changed."""

    def table(self) -> Table:
        """Size, requests and time, as `tubelet estimate` prints them."""
        rows = [(line[:12].strip(), line[12:].strip()) for line in estimate_lines(self)]
        return Table.of_rows(("estimate", "value"), rows)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def estimate(config: EstimateConfig) -> Estimate:
    """Plan the job and measure a small part of it; nothing is written to its store.

    Raises:
        TubeletError: the configuration is invalid, or none of the sampled clips can be decoded.
    """
    planned = make_plan(config)
    plan = planned.plan
    calibration = calibrate(config, planned)
    cluster = config.workers_from
    local = not cluster.lasting and cluster.class_ is None
    cores = len(os.sched_getaffinity(0))
    workers = cluster.expected_workers or max(1, cores // 2)
    stages = {
        "decode": calibration.decode_s / config.decode.processes / workers,
        "forward": calibration.forward_s / workers,
        "write": calibration.write_s / workers,
    }
    if local:
        forward_cores = min(cluster.threads, cores) if calibration.forward_on == "cpu" else 0
        busy_s = calibration.decode_s + calibration.forward_s * forward_cores + calibration.write_s
        stages["cores"] = busy_s / cores
    limited_by = max(stages, key=lambda stage: stages[stage])
    return Estimate(
        clips=plan.clips,
        shards=plan.shards,
        clips_per_shard=plan.clips_per_shard,
        bytes_per_hook=bytes_per_hook(plan),
        total_bytes=sum(bytes_per_hook(plan).values()),
        objects=count_objects(plan),
        requests=count_requests(plan),
        workers=workers,
        calibration=calibration,
        seconds=stages[limited_by] * plan.clips,
        limited_by=limited_by,
        alternatives=alternatives(plan, config.patch_fraction),
    )


def calibrate(config: EstimateConfig, planned: Planned) -> Calibration:
    """Measure the time of each stage on clips spread over the data set."""
    backbone = load_backbone(config.backbone, frames=config.sampling.frames)
    rows = np.unique(
        np.linspace(0, planned.plan.clips - 1, min(config.calibration_clips, planned.plan.clips)).astype(int)
    )
    uris, views = planned.clips["uri"], planned.clips["view"]
    root = str(config.dataset.root)
    requests = [
        clip_request(
            resolve_uri(root, uris[int(i)].as_py()),
            config.sampling,
            config.views,
            locate(config.views, views[int(i)].as_py()),
            backbone.tubelet_frames,
        )
        for i in rows
    ]
    with DecodePool(config.decode.model_copy(update={"processes": 1})) as pool:
        # The first clip includes the start of the process.
        list(pool.map_ordered(requests[:1], prefetch=1))
        decode_s, results = _timed(lambda: list(pool.map_ordered(requests, prefetch=1)))
    clips = [result for result in results if isinstance(result, DecodedClip)]
    if not clips:
        raise TubeletError(
            f"None of {len(results)} clips spread over the data set can be decoded; the first: {results[0]}",
            "Check the videos and dataset.root",
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(config.workers_from.threads)
    size = config.batch_size if isinstance(config.batch_size, int) else _BATCH
    try:
        batch = list(itertools.islice(itertools.cycle(clips), size))
        selector = TokenSelector(config.tokens, backbone.grid)
        _forward(backbone, selector, batch[:1], config.hooks)
        forward_s, activations = _timed(lambda: _forward(backbone, selector, batch, config.hooks))
    finally:
        torch.set_num_threads(threads)
    names = dict(zip(config.hooks, (backbone.resolve_hook(name) for name in config.hooks), strict=True))
    write_s = _time_writing(planned.plan, {names[h]: v for h, v in activations.items()}, len(batch))
    return Calibration(
        clips=len(clips),
        failed=len(results) - len(clips),
        decode_s=decode_s / len(results),
        forward_s=forward_s / len(batch),
        write_s=write_s / len(batch),
        forward_on=backbone.device.type,
    )


def bytes_per_hook(plan: Plan) -> dict[str, int]:
    """Bytes of all shard objects of each hook, special tokens and indexes included."""
    last = plan.shards - 1
    return {
        hook.name: sum(
            last * shard_bytes(plan, kind, hook, 0) + shard_bytes(plan, kind, hook, last) for kind in array_kinds(plan)
        )
        for hook in plan.hooks
    }


def count_objects(plan: Plan) -> int:
    """Objects of the finished store: shard objects, a record and moments per shard, metadata, tables."""
    arrays = len(plan.hooks) * len(array_kinds(plan))
    merged = len(metadata_documents(plan, {})) + len(plan.hooks) * _MOMENTS_DOCUMENTS + 1
    return plan.shards * (arrays + 2) + merged + 3


def count_requests(plan: Plan) -> dict[str, int]:
    """Requests of a job without faults."""
    put = get = 0
    for kind in array_kinds(plan):
        for hook in plan.hooks:
            put += plan.shards * part_count(shard_bytes(plan, kind, hook, 0))
            # Existence, arrival and size, and again when the store is finished.
            get += plan.shards * 4
    # Record and moments are written once; the record is read twice and its existence checked twice, the moments are
    # read once.
    put += plan.shards * 2
    get += plan.shards * 5
    documents = count_objects(plan) - plan.shards * (len(plan.hooks) * len(array_kinds(plan)) + 2)
    return {"put": put + documents, "get": get + 2 * documents}


def alternatives(plan: Plan, patch_fraction: float) -> dict[str, int]:
    """Total bytes with another dtype, a subset of patches, or fewer hooks."""
    total = sum(bytes_per_hook(plan).values())
    tails = plan.shards * index_bytes(plan) * len(plan.hooks) * len(array_kinds(plan))
    payload = total - tails
    size = plan.numpy_dtype.itemsize
    totals = {
        f"dtype {name}": payload * numpy_dtype(name).itemsize // size + tails
        for name in get_args(DTypeName)
        if name != plan.dtype
    }
    grid = plan.clips * sum(clip_bytes(plan, array_kinds(plan)[0], hook) for hook in plan.hooks)
    kept = math.ceil(plan.grid.space * patch_fraction) / plan.grid.space
    totals[f"{math.ceil(plan.grid.space * patch_fraction)} of {plan.grid.space} patches"] = int(
        total - grid * (1 - kept)
    )
    for hook, hook_bytes in bytes_per_hook(plan).items() if len(plan.hooks) > 1 else ():
        totals[f"without {hook}"] = total - hook_bytes
    return totals


def _forward(
    backbone: Backbone, selector: TokenSelector, clips: list[DecodedClip], hooks: tuple[str, ...]
) -> dict[str, list[np.ndarray]]:
    patches = [selector.patches("", 0)] * len(clips)
    pixels = torch.stack([backbone.preprocess(clip.frames)[0] for clip in clips])
    captured = backbone.activations(pixels, hooks)
    # Copying to the CPU waits for the device.
    return {
        hook: [t.float().cpu().numpy() for t in (selector(c.tokens, patches), c.special) if t is not None]
        for hook, c in captured.items()
    }


def _time_writing(plan: Plan, activations: dict[str, list[np.ndarray]], clips: int) -> float:
    small = plan.model_copy(update={"clips": clips, "clips_per_shard": clips})
    # Any patches will do: only the time is measured.
    ok = ClipOutcome(status="ok", patches=tuple(range(plan.grid.space)) if plan.position_grid != plan.grid else None)
    with tempfile.TemporaryDirectory(prefix="tubelet-estimate-") as folder:

        def write() -> None:
            with ShardWriter(LocalRoot(Path(folder)), small, 0) as writer:
                for clip in range(clips):
                    tokens = {hook: arrays[0][clip] for hook, arrays in activations.items()}
                    special = {hook: arrays[1][clip] for hook, arrays in activations.items() if len(arrays) > 1}
                    writer.append(ok, tokens, special or None)
                writer.commit()

        return _timed(write)[0]


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def estimate_lines(costs: Estimate) -> Iterator[str]:
    """Lines of text."""
    timing = costs.calibration
    yield f"clips       {costs.clips} in {costs.shards} shards of {costs.clips_per_shard}"
    for hook, size in costs.bytes_per_hook.items():
        yield f"            {hook}: {human_bytes(size)}"
    yield f"store       {human_bytes(costs.total_bytes)} in {costs.objects} objects"
    yield f"requests    {costs.requests['put']} PUT, {costs.requests['get']} GET (on object storage, without faults)"
    failed = f", {timing.failed} failed" if timing.failed else ""
    yield f"measured    on {timing.clips} clips{failed}, seconds per clip, each stage by itself on this machine:"
    yield f"            decode {timing.decode_s:.3f} (one process), write {timing.write_s:.3f} (one thread),"
    yield f"            forward {timing.forward_s:.3f} (one worker, {timing.forward_on})"
    workers = f"{costs.workers} worker{'s' if costs.workers > 1 else ''}"
    limit = "the cores they share" if costs.limited_by == "cores" else f"the {costs.limited_by} stage"
    yield f"time        {human_seconds(costs.seconds)} with {workers} like this machine, limited by {limit}"
    yield "instead"
    for choice, size in costs.alternatives.items():
        change = 100 * (size / costs.total_bytes - 1)
        yield f"            {choice}: {human_bytes(size)} ({change:+.0f} %)"
