"""The specification that every shard task gets, and what a worker process keeps between shards, per job.

    shard task ─▶ runtimes.using(job) ─▶ Runtime, shared by the job's shards here ─▶ idle: kept while it is the newest

Several jobs may have shards in progress in one process (a worker with two threads, two clients of one cluster). A
runtime in use is never closed. Of the idle ones only the newest is kept, until another job needs its memory.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet.retry import retry_while_unreachable
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.datasets import resolve_uri
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import Sampling
from tubelet_pipeline.token_selection import AllTokens, Tokens, TokenSelector
from tubelet_pipeline.views import CenterView, View, Views, clip_request, locate
from tubelet_store.spool import Spool, UploadConfig
from tubelet_store.store_writer import StoreWriter


class ShardJob(Config):
    """The specification that every shard task gets. Sent through Dask as JSON, without secrets."""

    store: str
    plan_digest: str
    dataset_root: str
    sampling: Sampling
    views: Views = CenterView()
    tokens: Tokens = AllTokens()
    backbone: BackboneConfig
    hooks: tuple[str, ...]
    decode: DecodeConfig
    batch_size: int | Literal["auto"]
    threads: int
    upload: UploadConfig


_CPU_MOST = 16
_CPU_BYTES = 256 * 2**20

# The rest holds the pixels of the next batch, and fragments of the allocator.
_CUDA_SHARE = 0.8


def find_batch_size(backbone: Backbone, hooks: Iterable[str], most: int) -> int:
    """The largest power of two of clips, at most `most`, that fits into one forward pass.

    On CUDA 1, 2, 4, ... clips are tried until memory is exhausted or fuller than `_CUDA_SHARE`. On a CPU a larger batch
    gains nothing once the cores are busy, so a fixed memory limit decides. Both are reproducible on the same hardware;
    the number is recorded with every shard, because it may change the last bits of a value.

    Raises:
        TubeletError: not even one clip fits into the device's memory.
    """
    names = tuple(hooks)
    if backbone.device.type != "cuda":
        clip_bytes = 4 * (_pixels(backbone) + len(names) * backbone.grid.tokens * max(map(backbone.channels, names)))
        return largest_power(lambda clips: clips == 1 or clips * clip_bytes <= _CPU_BYTES, min(most, _CPU_MOST))
    clips_that_fit = largest_power(lambda clips: _fits_cuda(backbone, names, clips), most)
    if not clips_that_fit:
        raise TubeletError(
            f"One clip of '{backbone.checkpoint.name}' does not fit into {_CUDA_SHARE:.0%} of the memory of "
            f"{torch.cuda.get_device_name(backbone.device)}",
            "Set backbone.precision: float16 (or bfloat16), or batch_size: 1 to try anyway",
        )
    return clips_that_fit


def largest_power(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two up to `most` for which `fits`, as for all smaller ones, is true; 0 if there is none."""
    largest, size = 0, 1
    while size <= most and fits(size):
        largest, size = size, 2 * size
    return largest


def _pixels(backbone: Backbone) -> int:
    height, width = backbone.preprocessing.size
    return backbone.frames * 3 * height * width


def _fits_cuda(backbone: Backbone, hooks: tuple[str, ...], clips: int) -> bool:
    device = backbone.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        backbone.activations(torch.zeros(clips, backbone.frames, 3, *backbone.preprocessing.size), hooks)
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    return bool(torch.cuda.max_memory_reserved(device) <= _CUDA_SHARE * total)


# Forward passes of a process take turns, also those of different jobs: each may fill the device's memory.
_computing = threading.Lock()


class Runtime:
    """What the shards of one job share in this process: backbone, decode processes, clip table, store, spool."""

    def __init__(self, job: ShardJob) -> None:
        self.job = job
        self.backbone: Backbone = load_backbone(job.backbone, frames=job.sampling.frames)
        self.store, table = retry_while_unreachable(lambda: _attach(job), job.upload.patience_s)
        self.spool = Spool(job.upload, job.store, self.store.plan)
        self.spool.discard_partial()
        self.clips = table.select(["uri", "video_id", "view"]).combine_chunks()
        self.selector = TokenSelector(job.tokens, self.backbone.grid)
        with self.computing():
            self.batch_size = (
                find_batch_size(self.backbone, job.hooks, self.store.plan.clips_per_shard)
                if job.batch_size == "auto"
                else job.batch_size
            )
        # Last, because it starts processes, which a later failure would leak.
        self.decoder = DecodePool(job.decode)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Exclusive use of the device, with the job's number of threads."""
        with _computing:
            torch.set_num_threads(self.job.threads)
            yield

    def of_clip(self, column: str, clip: int) -> Any:
        """Value of a column of the clip table."""
        return self.clips[column][clip].as_py()

    def view(self, clip: int) -> View:
        """The clip's view of its video."""
        return locate(self.job.views, self.of_clip("view", clip))

    def _request(self, clip: int) -> DecodeRequest:
        job, uri = self.job, resolve_uri(self.job.dataset_root, self.of_clip("uri", clip))
        return clip_request(uri, job.sampling, job.views, self.view(clip), self.backbone.tubelet_frames)

    def decoded(self, clips: Iterable[int], prefetch: int) -> Iterator[tuple[int, DecodedClip | DecodeFailure]]:
        """Clips with their frames, in order. Consecutive crops of the same frames are decoded once."""
        grouped = ((request, list(group)) for request, group in itertools.groupby(clips, self._request))
        groups, requested = itertools.tee(grouped)
        results = self.decoder.map_ordered((request for request, _ in requested), prefetch)
        for (_, group), result in zip(groups, results, strict=True):
            for clip in group:
                yield clip, result


def _attach(job: ShardJob) -> tuple[StoreWriter, pa.Table]:
    store = StoreWriter.attach(job.store, job.plan_digest)
    return store, store.planned_clips()


class Runtimes:
    """The runtimes of a process: those in use, and the newest idle one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_job: dict[str, _Shared] = {}

    @contextlib.contextmanager
    def using(self, job_json: str) -> Iterator[Runtime]:
        """The runtime of a job, created if needed; it stays open inside the context."""
        with self._lock:
            # Idle runtimes are closed before another backbone is loaded.
            idle = [] if job_json in self._by_job else self._take_idle()
            shared = self._by_job.setdefault(job_json, _Shared())
            shared.users += 1
        try:
            _close(idle)
            with shared.creating:
                if shared.runtime is None:
                    shared.runtime = Runtime(ShardJob.model_validate_json(job_json))
            yield shared.runtime
        finally:
            with self._lock:
                idle = [] if shared.users > 1 else self._take_idle()
                shared.users -= 1
            _close(idle)

    def _take_idle(self) -> list[_Shared]:
        return [self._by_job.pop(job) for job, shared in list(self._by_job.items()) if not shared.users]


@dataclass(eq=False)
class _Shared:
    """A job's runtime, created by its first user."""

    users: int = 0
    runtime: Runtime | None = None
    creating: threading.Lock = field(default_factory=threading.Lock)


def _close(runtimes: list[_Shared]) -> None:
    for shared in runtimes:
        if shared.runtime is not None:
            shared.runtime.decoder.close()
            shared.runtime = None


runtimes = Runtimes()
"""The runtimes of this process."""
