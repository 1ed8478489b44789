"""The loader: shuffled batches of tokens from memory-mapped shards.

    blocks of an epoch ──permutation(seed, epoch)──▶ windows ──background thread──▶ staging (pinned) ──▶ device
                                                                       window w+1 is staged while w is consumed
    window on the device ──permutation(seed, epoch, window)──▶ rows ──slices──▶ batches [B, D]

The host only copies long runs; the random gather happens on the device, where memory is fast. What it costs: two
windows of memory, and batches mix only the blocks of one window. Many small blocks make a window nearly as good as
the whole store (see `Source`).

The tokens of all epochs form one endless stream; batch i is its tokens [i B, (i + 1) B). So a batch may begin in one
window and end in the next, or in the next epoch: its size is constant, and every epoch sees every token exactly once.
Only the last batch of the whole run is short, if the run does not end on a multiple of B. The position in the stream
is all the state there is: resuming at step k costs one window, and gives the tail of the uninterrupted run.

Several hooks of one store share the order: their tokens lie side by side. Several ranks share the stream: rank r takes
rows r, r + ranks, ... of every batch, so the batches, their number and where to resume do not depend on how many there
are. What that costs: each rank stages the whole window.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_store import Grid, TubeletError
from tubelet_trainer.order import ORDER_VERSION, EpochOrder, Permutation
from tubelet_trainer.pairs import PairArithmetic, PairDraw, Pairs
from tubelet_trainer.source import Source

_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Batch:
    """Tokens and where each comes from."""

    hooks: Mapping[str, Tensor]
    """Per hook [B, D] float32, as stored (not normalised)."""
    positions: Tensor
    """[B] int64: (clip x time steps + time) x patches + patch; distance in space and time is arithmetic."""
    grid: Grid
    whole: int
    """Tokens of the batch over all ranks."""
    temporal: Pairs | None = None
    """Neighbours in time of some of the tokens, where they are drawn."""
    spatial: Pairs | None = None
    """Neighbours in the same frame."""

    @property
    def tokens(self) -> Tensor:
        """[B, D] Tokens at the first (or only) hook."""
        return next(iter(self.hooks.values()))

    @property
    def clip(self) -> Tensor:
        """[B] Clip of each token: its row in the store's clip table (in a mixture, counted through all stores)."""
        return self.positions // self.grid.tokens

    @property
    def time(self) -> Tensor:
        """[B] Time step of each token."""
        return self.positions % self.grid.tokens // self.grid.space

    @property
    def patch(self) -> Tensor:
        """[B] Patch of each token: its place on axis `space`, row-major over the grid (see `Store.patch_positions`)."""
        return self.positions % self.grid.space

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class _Slot:
    """Memory of one window: the pinned host side is filled by the stager, the device side is read by the consumer."""

    host: tuple[Tensor, ...]
    """Per hook [window tokens, D] in the store's dtype."""
    device: tuple[Tensor, ...]
    """The same on the device; on the CPU it *is* `host`."""
    copied: torch.cuda.Event | None
    """The copy to the device is done."""
    released: torch.cuda.Event | None
    """The consumer's last read of the device side is done."""


@dataclass(frozen=True)
class _Staged:
    """A window ready for use."""

    slot: _Slot
    order: NDArray[np.int64]
    """[tokens] Rows of the window in the order they are served."""
    first_position: NDArray[np.int64]
    """[blocks] Position (see `Batch.positions`) of each block's first token."""


@dataclass(frozen=True)
class _Window:
    """A window on the device. Row (block x time steps + time) x block_patches + patch is a token."""

    tokens: tuple[Tensor, ...]
    first_position: Tensor
    host_first_position: NDArray[np.int64]


class Windows:
    """Shuffled batches over some clips of a source, with an exact position. One iteration at a time.

    Args:
        source: Where the tokens lie; several: hooks of one store, cut into the same blocks.
        clips: Clip numbers to serve. Clips that failed are left out.
        batch_tokens: B, tokens per batch.
        window_tokens: Most tokens staged together, rounded down to whole blocks. Two windows are held in memory.
        total_tokens: Length of the stream; None: one epoch.
        resident_shards: Shards whose blocks are shuffled together, for stores that are not at hand whole; None: all.
        seed: Chooses the order.
        device: Where batches are wanted.
        pairs: Neighbours to draw with every batch; None: none.
        rank: Which of `ranks` strided parts of every batch to serve.
        ranks: In how many parts batches are served.
        share: Part of every batch that this stream fills, as an interval in [0, 1] (see `Mixture`).
        clip_offset: Added to clip numbers in positions.

    Raises:
        TubeletError: no clip is left, or pairs are wanted and there is none.
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
        self._blocks = len(self.clips) * source.groups
        shards, first_clip = np.unique(self.clips // source.store.plan.clips_per_shard, return_index=True)
        self._shards = shards
        self._first_block = np.append(first_clip, len(self.clips)) * source.groups
        self.resident_shards = None if resident_shards is None or resident_shards >= len(shards) else resident_shards
        self.tokens_per_epoch = self._blocks * source.block_tokens
        self.total_tokens = self.tokens_per_epoch if total_tokens is None else total_tokens
        self.steps = -(-self.total_tokens // batch_tokens)
        # Windows of one epoch differ by at most one block: a small last window would mix few clips.
        self.windows_per_epoch = -(-self._blocks // max(1, window_tokens // source.block_tokens))
        self._window_blocks = -(-self._blocks // self.windows_per_epoch)
        self.step = 0
        """Number of the next batch."""
        self.rank, self.ranks, self._share, self.clip_offset = rank, ranks, share, clip_offset
        self._end = self._cut(self.steps)
        self._draw = pairs
        self._anchors = 0
        if pairs is not None:
            if len(self.clips) < 2:
                raise TubeletError(
                    f"{source.store.url}: pairs need at least two clips to compare, and there is one",
                    "Extract more clips, or set the objective's weights to 0",
                )
            self._arithmetic = PairArithmetic(pairs, source.store, source.block_patches, seed, self.device)
            self._anchors = self._part(min(pairs.config.anchors, batch_tokens))
        self._expected: tuple[int, int] | None = None
        self._slots: list[_Slot] = []
        self._batch: tuple[Tensor, ...] = ()

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
        found = []
        while position < stop:
            clips, _, order = self._plan(*self._locate(position))
            skip = position - self._window_start(position)
            rows = order[skip : skip + stop - position]
            found.append(clips[rows // self.source.block_tokens] + self.clip_offset)
            position += len(rows)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

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
        """Identity of the stream: everything but the seed and the position that decides which token comes when."""
        return "sha256:" + hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "store": self.source.store.identity,
            "hooks": [source.hook for source in self.sources],
            "clips": hashlib.sha256(self.clips.astype("<i8").tobytes()).hexdigest(),
            "block_patches": self.source.block_patches,
            "windows_per_epoch": self.windows_per_epoch,
            "batch_tokens": self.batch_tokens,
            "share": [str(bound) for bound in self._share],
            # Absent where all shards are shuffled together, as it was before there was a choice.
            **({"resident_shards": self.resident_shards} if self.resident_shards else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch: `digest`, `seed`, `epoch`, `step`. JSON-able, of constant size."""
        return {"digest": self.digest, "seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            TubeletError: the state belongs to another stream (store, hook, clips, batch or window size) or seed.
        """
        mine = self.state_dict()
        if wrong := [name for name in ("digest", "seed") if state.get(name) != mine[name]]:
            found = ", ".join(f"{name} {state.get(name)} (here {mine[name]})" for name in wrong)
            raise TubeletError(
                f"The loader's state belongs to another order of tokens: {found}",
                "Resume with the same store, hook, held-out share, seed, batch_tokens, window_tokens, block_patches, "
                "resident_shards, hooks and mix",
            )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `step` to the end of the stream; `step` counts along.

        Raises:
            TubeletError: a token is not finite, or a shard cannot be read.
        """
        scratch = self._scratch()
        positions_B = torch.empty(len(scratch[0]), dtype=torch.int64, device=self.device)
        with closing(self._serve(self._cut(self.step))) as stream:
            host_rows = np.empty(0, dtype=np.int64)
            rows, window = torch.from_numpy(host_rows), _Window((), torch.from_numpy(host_rows), host_rows)
            while self.step < self.steps:
                wanted, offset = self._cut(self.step + 1) - self._cut(self.step), self._rows_before(self.step)
                drawn = None if self._draw is None else _Drawn(self, min(self._anchors, wanted), offset)
                seen = filled = 0
                while seen < wanted:
                    if not len(rows):
                        window, rows, host_rows = next(stream)
                    taken = min(wanted - seen, len(rows))
                    mine = slice((self.rank - offset - seen) % self.ranks, taken, self.ranks)
                    now = rows[:taken][mine]
                    part = slice(filled, filled + len(now))
                    for tokens, out in zip(window.tokens, scratch, strict=True):
                        torch.index_select(tokens, 0, now, out=out[part])
                    positions_B[part] = self._positions(window, now)
                    if drawn is not None:
                        drawn.add(window, rows[:taken], host_rows[:taken], filled)
                    seen, filled = seen + taken, part.stop
                    rows, host_rows = rows[taken:], host_rows[taken:]
                # Copies: the scratch is filled again while the consumer may still hold this batch.
                tokens_of = {
                    source.hook: out[:filled].to(torch.float32, copy=True)
                    for source, out in zip(self.sources, scratch, strict=True)
                }
                temporal, spatial = (None, None) if drawn is None else drawn.pairs()
                batch = Batch(tokens_of, positions_B[:filled].clone(), self.source.grid, wanted, temporal, spatial)
                self.step += 1
                yield batch

    def _serve(self, start: int) -> Generator[tuple[_Window, Tensor, NDArray[np.int64]], None, None]:
        """Windows from stream position `start` on, with their rows still to be served, on the device and the host."""
        if start >= self._end:
            return
        ready: queue.Queue[_Staged | BaseException] = queue.Queue()
        free: queue.Queue[_Slot | None] = queue.Queue()
        for slot in self._memory():
            free.put(slot)
        stager = threading.Thread(target=self._stage, args=(start, free, ready), name="tubelet-stager", daemon=True)
        stager.start()
        position = start
        try:
            while position < self._end:
                staged = ready.get()
                if isinstance(staged, BaseException):
                    raise staged
                skip = position - self._window_start(position)
                take = min(len(staged.order) - skip, self._end - position)
                if staged.slot.copied is not None:
                    torch.cuda.current_stream(self.device).wait_event(staged.slot.copied)
                first_position = torch.from_numpy(staged.first_position).to(self.device)
                window = _Window(staged.slot.device, first_position, staged.first_position)
                rows = staged.order[skip : skip + take]
                yield window, torch.from_numpy(rows).to(self.device), rows
                position += take
                self._release(staged.slot)
                free.put(staged.slot)
        finally:
            for slot in self._slots:
                self._release(slot)
            free.put(None)
            stager.join()

    def _release(self, slot: _Slot) -> None:
        if slot.released is not None:
            slot.released.record(torch.cuda.current_stream(self.device))

    def _stage(self, start: int, free: queue.Queue[_Slot | None], ready: queue.Queue[_Staged | BaseException]) -> None:
        """Body of the background thread: fill free slots with the windows from stream position `start` on."""
        try:
            stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
            position = self._window_start(start)
            while position < self._end:
                slot = free.get()
                if slot is None:
                    return
                staged = self._fill(slot, *self._locate(position), stream)
                position += len(staged.order)
                ready.put(staged)
        except BaseException as error:  # the consumer raises it
            ready.put(error)

    def _fill(self, slot: _Slot, epoch: int, window: int, stream: torch.cuda.Stream | None) -> _Staged:
        source, grid = self.source, self.source.grid
        if slot.copied is not None:
            slot.copied.synchronize()  # the host side may still be on its way to the device
        self._expect(epoch, self._order(epoch).group(self._first_block_of(window)))
        clips, groups, order = self._plan(epoch, window)
        for each, host in zip(self.sources, slot.host, strict=True):
            raw = host[: len(order)].view(torch.int16 if each.bits.itemsize == 2 else torch.int32).numpy()
            raw = raw.reshape(len(clips), grid.time, each.block_patches, each.channels)
            each.copy_blocks(clips, groups, raw)
            each.refuse_nonfinite(clips, groups, raw)
        if stream is not None and slot.copied is not None and slot.released is not None:
            stream.wait_event(slot.released)
            with torch.cuda.stream(stream):
                for host, device in zip(slot.host, slot.device, strict=True):
                    device[: len(order)].copy_(host[: len(order)], non_blocking=True)
                slot.copied.record(stream)
        first_position = (clips + self.clip_offset) * grid.tokens + groups * source.block_patches
        return _Staged(slot=slot, order=order, first_position=first_position)

    def _plan(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Clip and patch group of each block of a window, as they lie in it, and the order [tokens] of its rows."""
        first, last = self._first_block_of(window), self._first_block_of(window + 1)
        # Ascending, so that pages are touched in the order of the file; the tokens are shuffled afterwards.
        blocks = np.sort(self._order(epoch).slice(first, last))
        chosen, groups = np.divmod(blocks, self.source.groups)
        tokens = len(blocks) * self.source.block_tokens
        return self.clips[chosen], groups, Permutation(tokens, ("tokens", self.seed, epoch, window)).slice(0, tokens)

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._first_block, self.resident_shards, (self.seed, epoch))

    def _expect(self, epoch: int, group: int) -> None:
        """Name the shards of this group and of what follows, into the next epoch, when a group begins."""
        if self._expected != (epoch, group):
            self._expected = (epoch, group)
            following = (self._order(epoch + 1), 0) if (epoch + 1) * self.tokens_per_epoch < self._end else None
            shards = [self._shards[o.shards_from(g)] for o, g in filter(None, [(self._order(epoch), group), following])]
            for source in self.sources:
                source.expect([int(shard) for shard in np.concatenate(shards)])

    def _positions(self, window: _Window, rows: Tensor) -> Tensor:
        """Positions (see `Batch.positions`) of the tokens at `rows`."""
        patches, space = self.source.block_patches, self.source.grid.space
        inside = rows % self.source.block_tokens
        first = window.first_position[rows // self.source.block_tokens]
        return first + inside // patches * space + inside % patches

    def _scratch(self) -> tuple[Tensor, ...]:
        """Per hook [largest part of a batch, D] in the store's dtype, allocated on first use and kept."""
        if not self._batch:
            # A share of a batch varies by one token, and so does a rank's part of it.
            rows = -(-(self._part(self.batch_tokens) + 1) // self.ranks)
            dtype = _TORCH_DTYPES[self.source.store.plan.dtype]
            self._batch = tuple(torch.empty((rows, s.channels), dtype=dtype, device=self.device) for s in self.sources)
        return self._batch

    def _memory(self) -> list[_Slot]:
        """The two slots, allocated on first use and kept."""
        if not self._slots:
            tokens = self._window_blocks * self.source.block_tokens
            dtype = _TORCH_DTYPES[self.source.store.plan.dtype]
            cuda = self.device.type == "cuda"
            # With a single window in the whole run there is nothing to stage ahead.
            for _ in range(2 if self._end > tokens else 1):
                shapes = [(tokens, source.channels) for source in self.sources]
                host = tuple(torch.empty(shape, dtype=dtype, pin_memory=cuda) for shape in shapes)
                on_device = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes if cuda)
                slot = _Slot(
                    host=host,
                    device=on_device if cuda else host,
                    copied=torch.cuda.Event() if cuda else None,
                    released=torch.cuda.Event() if cuda else None,
                )
                if slot.released is not None:
                    # The allocator may hand out memory that earlier work on this stream still reads.
                    slot.released.record()
                self._slots.append(slot)
        return self._slots

    def _first_block_of(self, window: int) -> int:
        return window * self._blocks // self.windows_per_epoch

    def _locate(self, position: int) -> tuple[int, int]:
        """Epoch and window that hold stream position `position`."""
        epoch, offset = divmod(position, self.tokens_per_epoch)
        block = offset // self.source.block_tokens
        # The last w with w * blocks // windows <= block.
        return epoch, ((block + 1) * self.windows_per_epoch - 1) // self._blocks

    def _window_start(self, position: int) -> int:
        epoch, window = self._locate(position)
        return epoch * self.tokens_per_epoch + self._first_block_of(window) * self.source.block_tokens


class _Drawn:
    """Collects the pairs of one batch while its windows are at hand. The first rows of a batch are its anchors."""

    def __init__(self, windows: Windows, anchors: int, offset: int) -> None:
        self._windows, self._anchors, self._offset = windows, anchors, offset
        self._short = (windows.step + 1) * windows.batch_tokens > windows.total_tokens
        self._seen = 0
        self._clips: set[int] = set()
        self._rows: list[Tensor] = []
        self._found: dict[str, list[tuple[Tensor, Tensor, tuple[Tensor, ...]]]] = {"temporal": [], "spatial": []}

    def add(self, window: _Window, rows: Tensor, host_rows: NDArray[np.int64], filled: int) -> None:
        """Draw for the anchors among the next `rows` of the whole batch; this rank's begin at `filled` of its part."""
        of = self._windows
        taken = min(len(rows), self._anchors - self._seen)
        if taken <= 0:
            return
        blocks = host_rows[:taken] // of.source.block_tokens
        ends = window.host_first_position[blocks] // of.source.grid.tokens
        self._clips |= {int(ends.min()), int(ends.max())}
        first = (of.rank - self._offset - self._seen) % of.ranks
        mine = rows[first : taken : of.ranks]
        self._rows.append(torch.arange(filled, filled + len(mine), device=of.device))
        places = self._offset + self._seen + first + of.ranks * torch.arange(len(mine), device=of.device)
        clips = of._positions(window, mine) // of.source.grid.tokens - of.clip_offset
        for kind, wanted in (("temporal", of._draw.temporal), ("spatial", of._draw.spatial)) if of._draw else ():
            if wanted:
                neighbours, valid = getattr(of._arithmetic, kind)(mine, clips, of.step, places)
                tokens = tuple(t.index_select(0, neighbours).float() for t in window.tokens)
                self._found[kind].append((of._positions(window, neighbours), valid, tokens))
        self._seen += taken

    def pairs(self) -> tuple[Pairs | None, Pairs | None]:
        """Temporal and spatial pairs of the batch."""
        return self._of("temporal"), self._of("spatial")

    def _of(self, kind: str) -> Pairs | None:
        if not self._found[kind]:
            return None
        positions, valid, tokens = zip(*self._found[kind], strict=True)
        names = [source.hook for source in self._windows.sources]
        hooks = {hook: torch.cat(parts) for hook, parts in zip(names, zip(*tokens, strict=True), strict=True)}
        return Pairs(
            rows=torch.cat(self._rows),
            hooks=hooks,
            positions=torch.cat(positions),
            valid=torch.cat(valid),
            most=-(-self._anchors // self._windows.ranks),
            several_clips=len(self._clips) > 1 or self._short,
        )
