"""A cohort's step recorded once as a CUDA graph, then repeated: one launch instead of some hundred.

    batch ──copied into the recording's own memory──▶ replay ──▶ weights, moments, counts changed in place, metrics

What the host decides (`Cohort.begin`, `Cohort.finish`) stays outside; inside, what changes from step to step is read
from knobs. A recording is made per shape of the batch and per choice of the host (k, how many dead latents AuxK looks
for), after a few steps that run as usual and bring every library into its working state. Recording computes nothing, so
no step is done twice.

[RECON] Written without a GPU at hand: that a step is the same sequence of operations each time, which is what a
recording relies on, is tested on the CPU; the recording itself only where there is CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.data.pairs import Pairs
from tubelet_trainer.losses.objective import Forward
from tubelet_trainer.optim.stacked import StackedSAEs
from tubelet_trainer.run.process_group import ProcessGroup
from tubelet_trainer.run.specs import specs
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, RandomPrefixes, TopKConfig

# As many as PyTorch's own wrapper (`make_graphed_callables`) runs.
_WARM_UP = 3


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    forwards: list[Forward]
    metrics: list[Mapping[str, Tensor]]


class CapturedStack:
    """`Cohort.compute` as CUDA graphs.

    Args:
        cohort: On a GPU.
    """

    def __init__(self, stacked: StackedSAEs) -> None:
        self.stacked = stacked
        self._seen: dict[tuple[object, ...], int] = {}
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def learn(self, batch: Batch, x_BD: Tensor, step: int) -> list[Mapping[str, Tensor]]:
        """As `Cohort.learn`; the metrics are overwritten by the next step."""
        self.stacked.begin(step, batch)
        key = signature(self.stacked, batch, x_BD)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= _WARM_UP:
            # On a stream of its own: what a library sets up on first use must not belong to the main one.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                forwards, metrics = self.stacked.compute(batch, x_BD, step)
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            recording = self._recordings.get(key) or self._record(key, batch, x_BD)
            torch._foreach_copy_(recording.inputs, inputs_of(batch, x_BD))
            recording.graph.replay()
            forwards = [replace(forward, step=step) for forward in recording.forwards]
            metrics = recording.metrics
        self.stacked.finish(forwards)
        return metrics

    def _record(self, key: tuple[object, ...], batch: Batch, x_BD: Tensor) -> _Recording:
        held, tokens = held_batch(batch), x_BD.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            forwards, metrics = self.stacked.compute(held, tokens, 0)
        self._recordings[key] = _Recording(graph, inputs_of(held, tokens), forwards, metrics)
        return self._recordings[key]


def signature(stacked: StackedSAEs, batch: Batch, x_BD: Tensor) -> tuple[object, ...]:
    """Everything but the numbers on the device that decides what a step does."""
    shapes = tuple(tuple(tensor.shape) for tensor in inputs_of(batch, x_BD))
    pairs = tuple((part.most, part.several_clips) for part in _pairs(batch))
    chosen = tuple((getattr(s.sae.sparsifier, "k", None), s.clock.dead_bound) for s in stacked.sae_trainers)
    return shapes, batch.whole, pairs, chosen


def inputs_of(batch: Batch, x_BD: Tensor) -> list[Tensor]:
    """The tensors of a batch that a step reads, in a fixed order; `x_BD` are its normalized tokens."""
    own = [tensor for part in _pairs(batch) for tensor in (part.rows, part.positions, part.valid, *part.hooks.values())]
    return [x_BD, batch.positions, *own]


def held_batch(batch: Batch) -> Batch:
    """A copy of `batch` with memory of its own, without the raw tokens."""
    temporal, spatial = (None if part is None else _held(part) for part in (batch.temporal, batch.spatial))
    return replace(batch, hooks={}, positions=batch.positions.clone(), temporal=temporal, spatial=spatial)


def refuse_unrepeatable(config: TrainConfig, device: torch.device, ranks: ProcessGroup) -> None:
    """Refuse to record or compile steps that differ from one to the next.

    Raises:
        TubeletError: there is no GPU, several processes, or an SAE whose shapes change.
    """
    if config.cuda_graphs and device.type != "cuda":
        raise TubeletError(f"cuda_graphs needs a GPU, and device is {device.type}", "Set cuda_graphs false")
    if config.cuda_graphs and ranks.size > 1:
        raise TubeletError("cuda_graphs does not go with several processes", "Set cuda_graphs false")
    sparse = (TopKConfig, BatchTopKConfig, AbsTopKConfig)
    for spec in specs(config) if config.cuda_graphs or config.compile else []:
        sae = spec.config.sae
        if isinstance(sae.nesting, RandomPrefixes) and not isinstance(sae, sparse):
            raise TubeletError(
                "Random prefixes of a kind without k are products of another shape in every step",
                "Set compile and cuda_graphs false, or choose sae.kind topk, batchtopk or abstopk",
            )


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
