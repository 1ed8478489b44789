"""The one Dask task: decode the clips of a shard, run the backbone once, write every hook, commit.

    decode processes ─▶ frames, in order ─▶ pixels (a thread) ─▶ forward pass (this thread) ─▶ writer thread ─▶ publish

The stages overlap; what is in flight is bounded by `batch_size`. Where a worker has two threads, the decoding of the
next shard overlaps the end of this one; forward passes take turns. The task gets the store and the number of the
shard, and returns a few counts: no array travels through Dask. A bad clip is a row of the clip table, not an exception.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from distributed import get_worker
from distributed.comm import get_address_host
from numpy.typing import NDArray

from tubelet.concurrency import prefetched
from tubelet.errors import StoreUnreachable
from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.plan_extraction import software_versions
from tubelet_pipeline.views import place
from tubelet_pipeline.worker_state import Runtime, runtimes
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.commit import Commit
from tubelet_store.shard_writer import ShardWriter


@dataclass(frozen=True)
class ShardReport:
    """The outcome of a shard task: small enough for a scheduler to keep."""

    shard: int
    clips: dict[str, int]
    """Number of clips by `ok` or failure code."""
    size_bytes: int
    seconds: dict[str, float]
    """Seconds this thread waited for pixels (`decode`), computed (`forward`), in `total`, and then published."""
    spooled: bool = False
    """Finished, but kept on the worker's machine, because object storage was unreachable."""
    host: str = ""
    """The machine that keeps it, by Dask's name for it."""


def run_shard(job_json: str, shard: int) -> ShardReport:
    """Extract one shard. Idempotent: a shard that is already committed is reported, not extracted again.

    While object storage is unreachable, the finished shard is kept on this machine and reported as `spooled`; every
    later task on this machine tries to upload the waiting shards.
    """
    with runtimes.using(job_json) as runtime:
        store, spool = runtime.store, runtime.spool
        # If storage is unreachable here, the shard counts as not committed.
        with contextlib.suppress(StoreUnreachable):
            store.drain(spool)
            if (commit := store.committed(shard)) is not None:
                return report_of(commit)
        if shard in spool.shards():
            return ShardReport(shard, {}, 0, {}, spooled=True, host=_host())
        with store.shard(shard) as writer:
            seconds = _write_clips(writer, runtime, shard)
            software = {**software_versions(), "batch_size": str(runtime.batch_size)}
            finished = writer.finish(software, _rounded(seconds))
            with _timed(seconds, "publish"):
                commit = store.publish(finished, spool)
        report = report_of(commit or finished.commit)
        return dataclasses.replace(report, seconds=_rounded(seconds), spooled=commit is None, host=_host())


def report_of(commit: Commit) -> ShardReport:
    """The report that a commit record amounts to."""
    counts = Counter("ok" if o.status == "ok" else str(o.error).partition(":")[0] for o in commit.clips)
    return ShardReport(commit.shard, dict(counts), sum(o.size_bytes for o in commit.objects), commit.seconds)


def _write_clips(writer: ShardWriter, runtime: Runtime, shard: int) -> dict[str, float]:
    """Decode, compute and append every clip of `shard`; seconds by stage."""
    began = time.perf_counter()
    clips = runtime.store.plan.shard_range(shard)
    seconds = {"decode": 0.0, "forward": 0.0}
    size = runtime.batch_size
    # Decoding runs two batches ahead: one is being decoded while one is preprocessed or waits for the forward pass.
    decoded = runtime.decoded(clips, prefetch=2 * size)
    batches = (_prepare(runtime, list(itertools.islice(decoded, size))) for _ in range(0, len(clips), size))
    with ThreadPoolExecutor(1, thread_name_prefix="write") as executor:
        writing: Future[None] | None = None
        prepared = prefetched(batches, 1, "prepare")
        for _ in range(0, len(clips), size):
            with _timed(seconds, "decode"):
                batch = next(prepared)
            with _timed(seconds, "forward"), runtime.computing():
                rows = _forward(runtime, batch)
            if writing is not None:
                writing.result()
            writing = executor.submit(_append, writer, rows)
        if writing is not None:
            writing.result()
    seconds["total"] = time.perf_counter() - began
    return seconds


@dataclass(frozen=True)
class _Row:
    """One clip, ready to be appended."""

    outcome: ClipOutcome
    activations: dict[str, NDArray[Any]] | None = None
    special_tokens: dict[str, NDArray[Any]] | None = None


def _append(writer: ShardWriter, rows: list[_Row]) -> None:
    for row in rows:
        writer.append(row.outcome, row.activations, row.special_tokens)


@dataclass(frozen=True)
class _Batch:
    """Clips in order, ready for the forward pass: pixels of those that could be decoded."""

    outcomes: list[ClipOutcome]
    pixels: torch.Tensor | None
    patches: list[tuple[int, ...] | None]
    """Patches to keep of each clip that could be decoded."""


def _prepare(runtime: Runtime, batch: list[tuple[int, DecodedClip | DecodeFailure]]) -> _Batch:
    outcomes: list[ClipOutcome] = []
    pixels: list[torch.Tensor] = []
    patches: list[tuple[int, ...] | None] = []
    backbone, views = runtime.backbone, runtime.job.views
    for number, clip in batch:
        if isinstance(clip, DecodeFailure):
            # Without the root, so that the clip table does not depend on the location of the data set.
            message = clip.message.replace(resolve_uri(runtime.job.dataset_root, ""), "")
            outcomes.append(ClipOutcome.failure(clip.code, message))
            continue
        crop_place = place(views, runtime.view(number), backbone.patch_size)
        clip_pixels, crop = backbone.preprocess(clip.frames, crop_place)
        pixels.append(clip_pixels)
        video_id, view = runtime.of_clip("video_id", number), runtime.of_clip("view", number)
        patches.append(runtime.selector.patches(video_id, view))
        outcomes.append(_outcome(clip, (crop.top, crop.left, crop.height, crop.width), patches[-1]))
    stacked = torch.stack(pixels) if pixels else None
    if stacked is not None and runtime.backbone.device.type == "cuda":
        stacked = stacked.pin_memory()
    return _Batch(outcomes, stacked, patches)


def _forward(runtime: Runtime, batch: _Batch) -> list[_Row]:
    hooks = runtime.job.hooks
    captured = runtime.backbone.activations(batch.pixels, hooks) if batch.pixels is not None else {}
    tokens = {hook: _to_numpy(runtime.selector(c.tokens, batch.patches)) for hook, c in captured.items()}
    special = {hook: _to_numpy(c.special) for hook, c in captured.items() if c.special is not None}
    rows, position = [], 0
    for outcome in batch.outcomes:
        if outcome.status == "failed":
            rows.append(_Row(outcome))
            continue
        rows.append(
            _Row(
                outcome,
                {hook: values[position] for hook, values in tokens.items()},
                {hook: values[position] for hook, values in special.items()} or None,
            )
        )
        position += 1
    return rows


def _outcome(
    clip: DecodedClip, crop: tuple[float, float, float, float], patches: tuple[int, ...] | None
) -> ClipOutcome:
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
        patches=patches,
        decoder=clip.decoder,
        truncated=clip.truncated,
        corrupt_frames=clip.corrupt_frames,
    )


def _to_numpy(values: torch.Tensor) -> NDArray[Any]:
    # As float32: the shard writer checks the range before it rounds to the store's dtype.
    return values.float().cpu().numpy()


def _host() -> str:
    return get_address_host(get_worker().address)


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(value, 4) for stage, value in seconds.items()}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
