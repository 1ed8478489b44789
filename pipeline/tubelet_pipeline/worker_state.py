"""What every shard task is told, and what a worker process keeps between shards, per job.

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
    """What every shard task is told. Sent through Dask as JSON, without secrets."""

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

# Beside a pass there are the pixels of the next batch, and blocks the allocator could not use.
_CUDA_SHARE = 0.8


def find_batch_size(backbone: Backbone, hooks: Iterable[str], most: int) -> int:
    """The largest power of two, at most `most`, of clips that `backbone` takes at once.

    Raises:
        TubeletError: not even one clip fits into the device's memory.
    """
    names = tuple(hooks)
    if backbone.device.type != "cuda":
        clip_bytes = 4 * (_pixels(backbone) + len(names) * backbone.grid.tokens * max(map(backbone.channels, names)))
        return largest_power(lambda clips: clips == 1 or clips * clip_bytes <= _CPU_BYTES, min(most, _CPU_MOST))
    found = largest_power(lambda clips: _fits_cuda(backbone, names, clips), most)
    if not found:
        raise TubeletError(
            f"One clip of '{backbone.checkpoint.name}' does not fit into {_CUDA_SHARE:.0%} of the memory of "
            f"{torch.cuda.get_device_name(backbone.device)}",
            "Set backbone.precision: float16 (or bfloat16), or batch_size: 1 to try anyway",
        )
    return found


def largest_power(fits: Callable[[int], bool], most: int) -> int:
    """The largest power of two up to `most` that fits, if all smaller ones do; 0: not even 1 fits."""
    found, size = 0, 1
    while size <= most and fits(size):
        found, size = size, 2 * size
    return found


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


# Forward passes of a process take turns, whichever job they are of: each may fill the device's memory.
_computing = threading.Lock()


class Runtime:
    """What the shards of one job share: backbone, decode processes, clip table, store, spool."""

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
        # Last: it starts processes, and nothing after it may fail.
        self.decoder = DecodePool(job.decode)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """The device is the caller's inside the context, and has the job's number of threads."""
        with _computing:
            torch.set_num_threads(self.job.threads)
            yield

    def of_clip(self, column: str, clip: int) -> Any:
        """What the clip table says."""
        return self.clips[column][clip].as_py()

    def view(self, clip: int) -> View:
        """Which part of its video the clip is."""
        return locate(self.job.views, self.of_clip("view", clip))

    def _request(self, clip: int) -> DecodeRequest:
        job, uri = self.job, resolve_uri(self.job.dataset_root, self.of_clip("uri", clip))
        return clip_request(uri, job.sampling, job.views, self.view(clip), self.backbone.tubelet_frames)

    def decoded(self, clips: Iterable[int], prefetch: int) -> Iterator[tuple[int, DecodedClip | DecodeFailure]]:
        """Clips with their frames, in order. Neighbors that are crops of the same frames are decoded once."""
        counted = ((request, list(run)) for request, run in itertools.groupby(clips, self._request))
        ahead, asked = itertools.tee(counted)
        results = self.decoder.map_ordered((request for request, _ in asked), prefetch)
        for (_, run), result in zip(ahead, results, strict=True):
            for clip in run:
                yield clip, result


def _attach(job: ShardJob) -> tuple[StoreWriter, pa.Table]:
    store = StoreWriter.attach(job.store, job.plan_digest)
    return store, store.planned_clips()


class Runtimes:
    """The runtimes of a process: those that are used, and the newest of the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}

    @contextlib.contextmanager
    def using(self, job_json: str) -> Iterator[Runtime]:
        """The runtime of a job, made where there is none; it stays open inside the context."""
        with self._lock:
            # Before another backbone is loaded, those that nobody uses make room.
            idle = [] if job_json in self._slots else self._take_idle()
            slot = self._slots.setdefault(job_json, _Slot())
            slot.users += 1
        try:
            _close(idle)
            with slot.making:
                if slot.runtime is None:
                    slot.runtime = Runtime(ShardJob.model_validate_json(job_json))
            yield slot.runtime
        finally:
            with self._lock:
                idle = [] if slot.users > 1 else self._take_idle()
                slot.users -= 1
            _close(idle)

    def _take_idle(self) -> list[_Slot]:
        return [self._slots.pop(job) for job, slot in list(self._slots.items()) if not slot.users]


@dataclass(eq=False)
class _Slot:
    """A job's runtime, made by the first of its users."""

    users: int = 0
    runtime: Runtime | None = None
    making: threading.Lock = field(default_factory=threading.Lock)


def _close(slots: list[_Slot]) -> None:
    for slot in slots:
        if slot.runtime is not None:
            slot.runtime.decoder.close()
            slot.runtime = None


runtimes = Runtimes()
"""Those of this process."""
