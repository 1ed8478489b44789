"""The device's part of a step recorded once as a CUDA graph, then replayed: one launch instead of some hundred.

    batch ──copied into the recording's own memory──▶ replay ──▶ weights, moments, counts changed in place, metrics

The host's decisions (`StackedSAEs.begin`, `StackedSAEs.finish`) stay outside; inside, what changes from step to step is
read from `DeviceScalar`s. One graph is recorded per batch shape and per choice of the host (k, how many dead latents
AuxK looks for), after a few ordinary steps that initialize the libraries. Recording computes nothing, so no step is
done twice.

[RECON] Written without access to a GPU. The CPU tests check that a step is the same sequence of operations each time,
which a recording relies on; the recording itself is tested only where there is CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tubelet_trainer.data.batch import Batch, Pairs
from tubelet_trainer.losses.objective import Forward
from tubelet_trainer.optim.stacked import StackedSAEs

# As in PyTorch's wrapper (`make_graphed_callables`).
_WARM_UP_STEPS = 3


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    forwards: list[Forward]
    metrics: list[Mapping[str, Tensor]]


class CapturedStack:
    """`StackedSAEs.compute` as CUDA graphs.

    Args:
        stacked: On a GPU.
    """

    def __init__(self, stacked: StackedSAEs) -> None:
        self.stacked = stacked
        self._seen: dict[tuple[object, ...], int] = {}
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def compute(self, batch: Batch, x_BD: Tensor, step: int) -> tuple[list[Forward], list[Mapping[str, Tensor]]]:
        """As `StackedSAEs.compute`; the next step overwrites the metrics."""
        key = signature(self.stacked, batch, x_BD)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= _WARM_UP_STEPS:
            # On a side stream: what a library sets up on first use must not belong to the main one.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                forwards, metrics = self.stacked.compute(batch, x_BD, step)
            torch.cuda.current_stream().wait_stream(self._stream)
            return forwards, metrics
        recording = self._recordings.get(key) or self._record(key, batch, x_BD)
        torch._foreach_copy_(recording.inputs, inputs_of(batch, x_BD))
        recording.graph.replay()
        return [replace(forward, step=step) for forward in recording.forwards], recording.metrics

    def _record(self, key: tuple[object, ...], batch: Batch, x_BD: Tensor) -> _Recording:
        held, tokens = held_batch(batch), x_BD.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            forwards, metrics = self.stacked.compute(held, tokens, 0)
        self._recordings[key] = _Recording(graph, inputs_of(held, tokens), forwards, metrics)
        return self._recordings[key]


def signature(stacked: StackedSAEs, batch: Batch, x_BD: Tensor) -> tuple[object, ...]:
    """All that decides which operations a step consists of: shapes and choices of the host."""
    shapes = tuple(tuple(tensor.shape) for tensor in inputs_of(batch, x_BD))
    pairs = tuple((part.most, part.several_clips) for part in _pairs(batch))
    chosen = tuple((getattr(s.sae.sparsifier, "k", None), s.dead_latents.dead_bound) for s in stacked.sae_trainers)
    return shapes, batch.whole, pairs, chosen


def inputs_of(batch: Batch, x_BD: Tensor) -> list[Tensor]:
    """The tensors of a batch that a step reads, in a fixed order; `x_BD` are its normalized tokens."""
    own = [tensor for part in _pairs(batch) for tensor in (part.rows, part.positions, part.valid, *part.hooks.values())]
    return [x_BD, batch.positions, *own]


def held_batch(batch: Batch) -> Batch:
    """A copy of `batch` in separate memory, without the raw tokens."""
    temporal, spatial = (None if part is None else _held(part) for part in (batch.temporal, batch.spatial))
    return replace(batch, hooks={}, positions=batch.positions.clone(), temporal=temporal, spatial=spatial)


def _pairs(batch: Batch) -> list[Pairs]:
    return [part for part in (batch.temporal, batch.spatial) if part is not None]


def _held(pairs: Pairs) -> Pairs:
    return replace(
        pairs,
        rows=pairs.rows.clone(),
        hooks={hook: tokens.clone() for hook, tokens in pairs.hooks.items()},
        positions=pairs.positions.clone(),
        valid=pairs.valid.clone(),
    )
