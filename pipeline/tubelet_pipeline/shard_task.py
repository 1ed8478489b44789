"""The one Dask task: decode the clips of a shard, run the backbone once, write every hook, commit.

    decode processes ─▶ frames, in order ─▶ forward pass (this thread) ─▶ writer thread ─▶ commit record

The three stages overlap; what is in flight is bounded by `batch_size`. The task is told the store and the shard's
number and returns a few counts: no array travels through Dask. A bad clip is a row of the clip table, not an exception.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.clips import resolve_uri
from tubelet_pipeline.decode.clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.config import DecodeConfig
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.planning import software_versions
from tubelet_pipeline.sampling import Sampling
from tubelet_store import ClipOutcome, StoreWriter
from tubelet_store.commit import Commit
from tubelet_store.config import Config
from tubelet_store.shard import ShardWriter


class ShardJob(Config):
    """What every shard task of an extraction is told; travels through Dask as JSON, without secrets."""

    store: str
    plan_digest: str
    dataset_root: str
    sampling: Sampling
    backbone: BackboneConfig
    hooks: tuple[str, ...]
    decode: DecodeConfig
    batch_size: int
    threads: int


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: small enough for a scheduler to keep."""

    shard: int
    clips: dict[str, int]
    """Clips by `ok` or failure code."""
    size_bytes: int
    seconds: dict[str, float]
    """Seconds this thread waited for frames (`decode`), computed (`forward`), and in total."""


def run_shard(job_json: str, shard: int) -> ShardReport:
    """Extract one shard. Idempotent: a shard that is already committed is reported, not redone."""
    job = ShardJob.model_validate_json(job_json)
    writer = StoreWriter.attach(job.store, job.plan_digest)
    commit = writer.committed(shard)
    if commit is None:
        commit = _extract(writer, _runtime(job), shard)
    return report(commit)


def report(commit: Commit) -> ShardReport:
    """The report that a commit record amounts to."""
    counts = Counter("ok" if o.status == "ok" else str(o.error).partition(":")[0] for o in commit.clips)
    return ShardReport(commit.shard, dict(counts), sum(o.size_bytes for o in commit.objects), commit.seconds)


class _Runtime:
    """What a worker process keeps between shards: backbone, decode processes, clip table."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        torch.set_num_threads(job.threads)
        self.backbone: Backbone = load_backbone(job.backbone, frames=job.sampling.frames)
        self.decoder = DecodePool(job.decode)
        table = StoreWriter.attach(job.store, job.plan_digest).planned_clips()
        self.uris: list[str] = table["uri"].to_pylist()
        self.views: list[int] = table["view"].to_pylist()

    def request(self, clip: int) -> DecodeRequest:
        return DecodeRequest(resolve_uri(self.job.dataset_root, self.uris[clip]), self.job.sampling, self.views[clip])


_current: _Runtime | None = None
_current_lock = threading.Lock()


def _runtime(job: ShardJob) -> _Runtime:
    # One extraction at a time per worker process: a new job's backbone replaces the last one's.
    global _current
    with _current_lock:
        if _current is None or _current.job != job:
            if _current is not None:
                _current.decoder.close()
            _current = _Runtime(job)
        return _current


def _extract(store: StoreWriter, runtime: _Runtime, shard: int) -> Commit:
    began = time.perf_counter()
    clips = store.plan.shard_range(shard)
    seconds = {"decode": 0.0, "forward": 0.0}
    size = runtime.job.batch_size
    # Decoding runs two batches ahead: one being decoded while one waits for the forward pass.
    decoded = runtime.decoder.map_ordered((runtime.request(clip) for clip in clips), prefetch=2 * size)
    with store.shard(shard) as writer, ThreadPoolExecutor(1, thread_name_prefix="write") as executor:
        writing: Future[None] | None = None
        for _ in range(0, len(clips), size):
            with _timed(seconds, "decode"):
                batch = list(itertools.islice(decoded, size))
            with _timed(seconds, "forward"):
                rows = list(_forward(runtime, batch))
            if writing is not None:
                writing.result()
            writing = executor.submit(_append, writer, rows)
        if writing is not None:
            writing.result()
        seconds["total"] = time.perf_counter() - began
        return writer.commit(software_versions(), {name: round(s, 4) for name, s in seconds.items()})


@dataclass(frozen=True)
class _Row:
    """One clip on its way to the shard."""

    outcome: ClipOutcome
    activations: dict[str, NDArray[Any]] | None = None
    special_tokens: dict[str, NDArray[Any]] | None = None


def _append(writer: ShardWriter, rows: list[_Row]) -> None:
    for row in rows:
        writer.append(row.outcome, row.activations, row.special_tokens)


def _forward(runtime: _Runtime, batch: list[DecodedClip | DecodeFailure]) -> Iterator[_Row]:
    backbone = runtime.backbone
    outcomes: list[ClipOutcome] = []
    pixels: list[torch.Tensor] = []
    for clip in batch:
        if isinstance(clip, DecodeFailure):
            # The clip table is the same wherever the data set lies.
            message = clip.message.replace(resolve_uri(runtime.job.dataset_root, ""), "")
            outcomes.append(ClipOutcome.failure(clip.code, message))
            continue
        clip_pixels, crop = backbone.preprocess(clip.frames)
        pixels.append(clip_pixels)
        outcomes.append(_outcome(clip, (crop.top, crop.left, crop.height, crop.width)))
    captured = backbone.activations(torch.stack(pixels), runtime.job.hooks) if pixels else {}
    tokens = {hook: _to_numpy(c.tokens) for hook, c in captured.items()}
    special = {hook: _to_numpy(c.special) for hook, c in captured.items() if c.special is not None}
    position = 0
    for outcome in outcomes:
        if outcome.status == "failed":
            yield _Row(outcome)
            continue
        yield _Row(
            outcome,
            {hook: values[position] for hook, values in tokens.items()},
            {hook: values[position] for hook, values in special.items()} or None,
        )
        position += 1


def _outcome(clip: DecodedClip, crop: tuple[float, float, float, float]) -> ClipOutcome:
    return ClipOutcome(
        status="ok",
        frame_indices=tuple(clip.frame_indices.tolist()),
        timestamps_s=None if np.isnan(clip.timestamps_s).any() else tuple(clip.timestamps_s.tolist()),
        fps=None if np.isnan(clip.fps) else clip.fps,
        video_frames=clip.video_frames,
        padded_frames=clip.padded_frames,
        width=clip.width,
        height=clip.height,
        crop=crop,
        decoder=clip.decoder,
        truncated=clip.truncated,
        corrupt_frames=clip.corrupt_frames,
    )


def _to_numpy(values: torch.Tensor) -> NDArray[Any]:
    # As float32: the shard writer checks the range before it rounds to the store's dtype.
    return values.float().cpu().numpy()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start
