"""The loader: shuffled batches of tokens from memory-mapped shards.

    blocks of an epoch ──permutation(seed, epoch)──▶ windows ──background thread──▶ pinned buffer ──▶ device
                                                                      window w+1 is read while w is consumed
    window on the device ──permutation(seed, epoch, window)──▶ rows ──slices──▶ batches [B, D]

The host copies long runs only; the random gather is done on the device, where memory is fast. The cost: two windows of
memory, and batches mix only the blocks of one window. With many small blocks a window is nearly as diverse as the whole
store (see `Source`).

The tokens of all epochs form one endless stream; batch i is its tokens [i B, (i + 1) B). So a batch may begin in one
window and end in the next, or in the next epoch: its size is constant, and every epoch has every token exactly once.
Only the last batch of the run may be short, down to a single token; `Batch.whole` gives its size, and a consumer must
skip what needs a spread (an explained variance, a contrast). The position in the stream is the only state: resuming at
step k reads one window, and continues exactly like the uninterrupted run.

Several hooks of one store share the order. Several ranks share the stream: rank r takes rows r, r + ranks, ... of every
batch, so batches, their number and positions to resume at do not depend on the number of ranks. The cost: each rank
reads the whole window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.data.buffers import BatchMemory, Buffer
from tubelet_trainer.data.order import ORDER_VERSION, WindowOrder
from tubelet_trainer.data.pairs import DrawnPairs, PairArithmetic, PairDraw, Part
from tubelet_trainer.data.prefetcher import Prefetcher
from tubelet_trainer.data.shard_prefetch import refuse_small_cache, shard_prefetch
from tubelet_trainer.data.source import Source

_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# On the CPU, rows gathered and converted together: they stay in the cache in between.
_CACHED_ROWS = 512


class ActivationLoader:
    """Shuffled batches over some clips of a source, with an exact position. One iteration at a time.

    Args:
        source: Source of the tokens; several: hooks of one store, in the same blocks.
        clips: Clip numbers to serve. Clips that failed are left out.
        batch_tokens: B, tokens per batch.
        window_tokens: Maximum tokens of a window, rounded down to whole blocks. Two windows are held in memory.
        total_tokens: Length of the stream; None: one epoch.
        resident_shards: Shards whose blocks are shuffled together, for stores that do not fit on local disk; None: all.
        seed: Seed of the order.
        device: Device of the batches.
        dtype: Type of the tokens in batches; None: as stored.
        pairs: Neighbors to draw with every batch; None: none.
        rank: Which of `ranks` strided parts of every batch to serve.
        ranks: In how many parts batches are served.
        share: Part of every batch that this stream fills, as an interval in [0, 1] (see `Mixture`).
        clip_offset: Added to clip numbers in positions.

    Raises:
        TubeletError: no clip is left, pairs are wanted and there is none, or a cache is too small for the shards that
            are shuffled together.
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        clips: NDArray[np.int64],
        *,
        batch_tokens: int,
        window_tokens: int,
        total_tokens: int | None = None,
        resident_shards: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        pairs: PairDraw | None = None,
        rank: int = 0,
        ranks: int = 1,
        share: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1)),
        clip_offset: int = 0,
    ) -> None:
        self.sources = (source,) if isinstance(source, Source) else tuple(source)
        self.source = source = self.sources[0]
        self.clips = np.sort(np.asarray(clips, dtype=np.int64)[source.usable()[clips]])
        if len(self.clips) == 0:
            raise TubeletError(
                f"{source.store.url}: none of the {len(clips)} chosen clips holds activations",
                "See `tubelet info` for what failed; lower the held-out share if the store is small",
            )
        self.batch_tokens = batch_tokens
        self.seed = seed
        self.device = torch.device(device)
        self._stored_dtype = _TORCH_DTYPES[source.store.plan.dtype]
        self._dtype = dtype or self._stored_dtype
        self._order = WindowOrder(source, self.clips, window_tokens, resident_shards, seed)
        refuse_small_cache(self.needs)
        self.tokens_per_epoch = self._order.tokens
        self.total_tokens = self.tokens_per_epoch if total_tokens is None else total_tokens
        self.steps = -(-self.total_tokens // batch_tokens)
        self.step = 0
        """Number of the next batch."""
        self.rank, self.ranks, self._share, self.clip_offset = rank, ranks, share, clip_offset
        self._end = self._cut(self.steps)
        self._draw = pairs
        self._anchors = 0
        if pairs is not None:
            if len(self.clips) < 2:
                raise TubeletError(
                    f"{source.store.url}: pairs need at least two clips to compare, and one is left to train on",
                    "Extract more clips, lower holdout.fraction, or set the objective's weights to 0",
                )
            self._arithmetic = PairArithmetic(pairs, source.store, source.block_patches, seed, self.device)
            self._anchors = self._part(min(pairs.config.anchors, batch_tokens))
        self._shard_prefetch = None if source.store.cache is None else shard_prefetch(source.store.cache)
        self._announced: tuple[int, int] | None = None
        self._prefetcher = Prefetcher(self.sources, self._order, self.device, clip_offset, self._announce)
        self._buffers: list[Buffer] = []
        # A share of a batch varies by one token, and so does a rank's part of it.
        self._memory = BatchMemory(-(-(self._part(batch_tokens) + 1) // ranks), self.device)

    @property
    def needs(self) -> list[tuple[Source, int]]:
        """Each source, with the number of its shards whose blocks are shuffled together."""
        return [(source, self._order.together) for source in self.sources]

    @property
    def memory_bytes(self) -> int:
        """Size of the windows held: on the device, and with a GPU as much on the host."""
        channels = sum(source.channels for source in self.sources)
        return self._held * self._order.window_tokens * channels * self._stored_dtype.itemsize

    @property
    def epoch(self) -> int:
        """Epoch in which the next batch begins."""
        return self._cut(self.step) // self.tokens_per_epoch

    @property
    def strata(self) -> list[tuple[int, int]]:
        """Tokens of a batch and the clips they are drawn from."""
        return [(self._part(self.batch_tokens), len(self.clips))]

    def clips_of(self, step: int) -> NDArray[np.int64]:
        """Clip of each token of batch `step`, all ranks together, from the order alone: nothing is read."""
        position, stop = self._cut(step), self._cut(step + 1)
        parts = []
        while position < stop:
            place = self._order.locate(position)
            rows = self._order.rows(*place)[position - self._order.start(*place) :][: stop - position]
            parts.append(self._order.window(*place).clips[rows // self.source.block_tokens] + self.clip_offset)
            position += len(rows)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _part(self, tokens: int) -> int:
        """How many of the first `tokens` tokens of the whole run's batches this stream serves."""
        lower, upper = self._share
        return tokens * upper.numerator // upper.denominator - tokens * lower.numerator // lower.denominator

    def _cut(self, step: int) -> int:
        """Position in this stream at which batch `step` begins."""
        return self._part(min(step * self.batch_tokens, self.total_tokens))

    def _rows_before(self, step: int) -> int:
        """Rows of batch `step` that the streams before this one fill."""
        lower = self._share[0]
        ends = (min(s * self.batch_tokens, self.total_tokens) for s in (step, step + 1))
        start, stop = (end * lower.numerator // lower.denominator for end in ends)
        return stop - start

    @property
    def digest(self) -> str:
        """Identity of the stream: all that decides the order of tokens, without seed and position."""
        return "sha256:" + hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "store": self.source.store.identity,
            "hooks": [source.hook for source in self.sources],
            "clips": hashlib.sha256(self.clips.astype("<i8").tobytes()).hexdigest(),
            "block_patches": self.source.block_patches,
            "windows_per_epoch": self._order.windows,
            "batch_tokens": self.batch_tokens,
            "share": [str(bound) for bound in self._share],
            # Absent where all shards are shuffled together, as it was before there was a choice.
            **({"resident_shards": self._order.resident_shards} if self._order.resident_shards else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch: `digest`, `seed`, `epoch`, `step`. JSON-able, of constant size."""
        return {"digest": self.digest, "seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            TubeletError: the state belongs to another stream (store, hook, clips, batch or window size) or seed.
        """
        current = self.state_dict()
        if wrong := [name for name in ("digest", "seed") if state.get(name) != current[name]]:
            differing = ", ".join(f"{name} {state.get(name)} (here {current[name]})" for name in wrong)
            raise TubeletError(
                f"The loader's state belongs to another order of tokens: {differing}",
                "Resume with the same store, hook, held-out share, seed, batch_tokens, window_tokens, block_patches, "
                "resident_shards, hooks and mix",
            )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `step` to the end of the stream; `step` counts along.

        Raises:
            TubeletError: a token is not finite, or a shard cannot be read.
        """
        if self.step >= self.steps:
            return
        start = self._cut(self.step)
        try:
            with self._prefetcher.windows(self._held_buffers(), start, self._end) as windows:
                rows, host_rows = torch.empty(0, dtype=torch.int64), np.empty(0, dtype=np.int64)
                skip = start - self._order.start(*self._order.locate(start))
                while self.step < self.steps:
                    wanted = self._cut(self.step + 1) - self._cut(self.step)
                    offset = self._rows_before(self.step)
                    most = -(-wanted // self.ranks)
                    hooks = [self._memory.empty(most, source.channels, self._dtype) for source in self.sources]
                    positions_B = torch.empty(most, dtype=torch.int64, device=self.device)
                    drawn = None if self._draw is None else self._begin_pairs(self._draw, wanted, offset)
                    seen = filled = 0
                    while seen < wanted:
                        if not len(host_rows):
                            window = next(windows)
                            rows, host_rows, skip = window.rows[skip:], window.order[skip:], 0
                        taken = min(wanted - seen, len(host_rows))
                        now = rows[:taken][(self.rank - offset - seen) % self.ranks :: self.ranks]
                        part = slice(filled, filled + len(now))
                        for tokens, out in zip(window.tokens, hooks, strict=True):
                            self._gather(tokens, now, out[part])
                        positions_B[part] = window.locations.positions(now)
                        if drawn is not None:
                            drawn.add(window, rows[:taken], host_rows[:taken], filled)
                        seen, filled = seen + taken, part.stop
                        rows, host_rows = rows[taken:], host_rows[taken:]
                    names = [source.hook for source in self.sources]
                    temporal, spatial = (None, None) if drawn is None else drawn.pairs(names)
                    tokens_of = {name: out[:filled] for name, out in zip(names, hooks, strict=True)}
                    self.step += 1
                    yield Batch(tokens_of, positions_B[:filled], self.source.grid, wanted, temporal, spatial)
        finally:
            self._announced = None
            self._buffers = []
            if self._shard_prefetch is not None:
                self._shard_prefetch.withdraw(self)

    def _begin_pairs(self, draw: PairDraw, wanted: int, offset: int) -> DrawnPairs:
        """Pairs of the next batch, of which this stream fills `wanted` rows from `offset` on."""
        part = Part(
            rank=self.rank,
            ranks=self.ranks,
            step=self.step,
            offset=offset,
            anchors=min(self._anchors, wanted),
            most=-(-min(self._anchors, wanted) // self.ranks),
            short=(self.step + 1) * self.batch_tokens > self.total_tokens,
        )
        return DrawnPairs(draw, self._arithmetic, part)

    def _gather(self, tokens: Tensor, rows: Tensor, out: Tensor) -> None:
        """Fill `out` with the `rows` of a window's `tokens`, in the type of batches."""
        if out.dtype == tokens.dtype:
            torch.index_select(tokens, 0, rows, out=out)
            return
        together = _CACHED_ROWS if self.device.type == "cpu" else max(1, len(rows))
        for some, into in zip(rows.split(together), out.split(together), strict=True):
            into.copy_(tokens.index_select(0, some))

    def _announce(self, epoch: int, window: int) -> None:
        """When a group of shards begins, announce its shards and those of the groups that follow."""
        group = self._order.group(epoch, window)
        if self._shard_prefetch is None or self._announced == (epoch, group):
            return
        self._announced = (epoch, group)
        groups = self._order.groups_from(epoch, group)
        if self._order.start(epoch + 1, 0) < self._end:
            groups += self._order.groups_from(epoch + 1, 0)
        self._shard_prefetch.announce(
            self, [[(source, int(shard)) for shard in shards for source in self.sources] for shards in groups]
        )

    @property
    def _held(self) -> int:
        """Windows held at once: one if the whole run has only one."""
        return 2 if self._end > self._order.window_tokens else 1

    def _held_buffers(self) -> list[Buffer]:
        """The two buffers, held while batches are served."""
        if not self._buffers:
            channels = [source.channels for source in self.sources]
            for _ in range(self._held):
                buffer = Buffer.allocate(self._order.window_tokens, channels, self._stored_dtype, self.device)
                self._buffers.append(buffer)
        return self._buffers
