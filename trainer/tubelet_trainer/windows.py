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
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_store import Grid, TubeletError
from tubelet_trainer.order import ORDER_VERSION, Permutation
from tubelet_trainer.source import Source

_TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Batch:
    """Tokens and where each comes from."""

    tokens: Tensor
    """[B, D] float32, as stored (not normalised)."""
    positions: Tensor
    """[B] int64: (clip x time steps + time) x patches + patch; distance in space and time is arithmetic."""
    grid: Grid

    @property
    def clip(self) -> Tensor:
        """[B] Clip of each token: its row in the store's clip table."""
        return self.positions // self.grid.tokens

    @property
    def time(self) -> Tensor:
        """[B] Time step of each token."""
        return self.positions % self.grid.tokens // self.grid.space

    @property
    def patch(self) -> Tensor:
        """[B] Patch of each token, row-major over the grid."""
        return self.positions % self.grid.space

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class _Slot:
    """Memory of one window: the pinned host side is filled by the stager, the device side is read by the consumer."""

    host: Tensor
    """[window tokens, D] in the store's dtype."""
    device: Tensor
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

    tokens: Tensor
    first_position: Tensor


class Windows:
    """Shuffled batches over some clips of a source, with an exact position. One iteration at a time.

    Args:
        source: Where the tokens lie.
        clips: Clip numbers to serve. Clips that failed are left out.
        batch_tokens: B, tokens per batch.
        window_tokens: Most tokens staged together, rounded down to whole blocks. Two windows are held in memory.
        total_tokens: Length of the stream; None: one epoch.
        seed: Chooses the order.
        device: Where batches are wanted.

    Raises:
        TubeletError: no clip is left.
    """

    def __init__(
        self,
        source: Source,
        clips: NDArray[np.int64],
        *,
        batch_tokens: int,
        window_tokens: int,
        total_tokens: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.source = source
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
        self.tokens_per_epoch = self._blocks * source.block_tokens
        self.total_tokens = self.tokens_per_epoch if total_tokens is None else total_tokens
        self.steps = -(-self.total_tokens // batch_tokens)
        # Windows of one epoch differ by at most one block: a small last window would mix few clips.
        self.windows_per_epoch = -(-self._blocks // max(1, window_tokens // source.block_tokens))
        self._window_blocks = -(-self._blocks // self.windows_per_epoch)
        self.step = 0
        """Number of the next batch."""
        self._slots: list[_Slot] = []
        self._batch: Tensor | None = None

    @property
    def epoch(self) -> int:
        """Epoch in which the next batch begins."""
        return self.step * self.batch_tokens // self.tokens_per_epoch

    @property
    def digest(self) -> str:
        """Identity of the stream: everything but the seed and the position that decides which token comes when."""
        return "sha256:" + hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "store": self.source.store.identity,
            "hook": self.source.hook,
            "clips": hashlib.sha256(self.clips.astype("<i8").tobytes()).hexdigest(),
            "block_patches": self.source.block_patches,
            "windows_per_epoch": self.windows_per_epoch,
            "batch_tokens": self.batch_tokens,
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
                "Resume with the same store, hook, held-out share, seed, batch_tokens, window_tokens and block_patches",
            )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `step` to the end of the stream; `step` counts along.

        Raises:
            TubeletError: a token is not finite, or a shard cannot be read.
        """
        start = self.step * self.batch_tokens
        wanted = min(self.batch_tokens, self.total_tokens - start)
        filled = 0
        scratch_BD = self._scratch()
        positions_B = torch.empty(self.batch_tokens, dtype=torch.int64, device=self.device)
        for window, rows in self._serve(start):
            while len(rows):
                now, rows = rows[: wanted - filled], rows[wanted - filled :]
                part = slice(filled, filled + len(now))
                torch.index_select(window.tokens, 0, now, out=scratch_BD[part])
                positions_B[part] = self._positions(window, now)
                filled = part.stop
                if filled < wanted:
                    continue
                # Copies: the scratch is filled again while the consumer may still hold this batch.
                tokens = scratch_BD[:filled].to(torch.float32, copy=True)
                batch = Batch(tokens, positions_B[:filled].clone(), self.source.grid)
                self.step += 1
                wanted, filled = min(self.batch_tokens, self.total_tokens - self.step * self.batch_tokens), 0
                yield batch

    def _serve(self, start: int) -> Iterator[tuple[_Window, Tensor]]:
        """Windows from stream position `start` on, each with its rows still to be served, shuffled."""
        if start >= self.total_tokens:
            return
        ready: queue.Queue[_Staged | BaseException] = queue.Queue()
        free: queue.Queue[_Slot | None] = queue.Queue()
        for slot in self._memory():
            free.put(slot)
        stager = threading.Thread(target=self._stage, args=(start, free, ready), name="tubelet-stager", daemon=True)
        stager.start()
        position = start
        try:
            while position < self.total_tokens:
                staged = ready.get()
                if isinstance(staged, BaseException):
                    raise staged
                skip = position - self._window_start(position)
                take = min(len(staged.order) - skip, self.total_tokens - position)
                if staged.slot.copied is not None:
                    torch.cuda.current_stream(self.device).wait_event(staged.slot.copied)
                window = _Window(staged.slot.device, torch.from_numpy(staged.first_position).to(self.device))
                yield window, torch.from_numpy(staged.order[skip : skip + take]).to(self.device)
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
            while position < self.total_tokens:
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
        order = Permutation(self._blocks, ("blocks", self.seed, epoch))
        # Ascending, so that pages are touched in the order of the file; the tokens are shuffled afterwards.
        blocks = np.sort(order.slice(self._first_block(window), self._first_block(window + 1)))
        chosen, groups = np.divmod(blocks, source.groups)
        clips = self.clips[chosen]
        tokens = len(blocks) * source.block_tokens
        host = slot.host[:tokens]
        raw = host.view(torch.int16 if source.bits.itemsize == 2 else torch.int32).numpy()
        raw = raw.reshape(len(blocks), grid.time, source.block_patches, source.channels)
        source.copy_blocks(clips, groups, raw)
        source.refuse_nonfinite(clips, groups, raw)
        if stream is not None and slot.copied is not None and slot.released is not None:
            stream.wait_event(slot.released)
            with torch.cuda.stream(stream):
                slot.device[:tokens].copy_(host, non_blocking=True)
                slot.copied.record(stream)
        return _Staged(
            slot=slot,
            order=Permutation(tokens, ("tokens", self.seed, epoch, window)).slice(0, tokens),
            first_position=clips * grid.tokens + groups * source.block_patches,
        )

    def _positions(self, window: _Window, rows: Tensor) -> Tensor:
        """Positions (see `Batch.positions`) of the tokens at `rows`."""
        patches, space = self.source.block_patches, self.source.grid.space
        inside = rows % self.source.block_tokens
        first = window.first_position[rows // self.source.block_tokens]
        return first + inside // patches * space + inside % patches

    def _scratch(self) -> Tensor:
        """[B, D] in the store's dtype, allocated on first use and kept."""
        if self._batch is None:
            shape = (self.batch_tokens, self.source.channels)
            self._batch = torch.empty(shape, dtype=_TORCH_DTYPES[self.source.store.plan.dtype], device=self.device)
        return self._batch

    def _memory(self) -> list[_Slot]:
        """The two slots, allocated on first use and kept."""
        if not self._slots:
            shape = (self._window_blocks * self.source.block_tokens, self.source.channels)
            dtype = _TORCH_DTYPES[self.source.store.plan.dtype]
            cuda = self.device.type == "cuda"
            # With a single window in the whole run there is nothing to stage ahead.
            for _ in range(2 if self.total_tokens > shape[0] else 1):
                host = torch.empty(shape, dtype=dtype, pin_memory=cuda)
                self._slots.append(
                    _Slot(
                        host=host,
                        device=torch.empty(shape, dtype=dtype, device=self.device) if cuda else host,
                        copied=torch.cuda.Event() if cuda else None,
                        released=torch.cuda.Event() if cuda else None,
                    )
                )
        return self._slots

    def _first_block(self, window: int) -> int:
        return window * self._blocks // self.windows_per_epoch

    def _locate(self, position: int) -> tuple[int, int]:
        """Epoch and window that hold stream position `position`."""
        epoch, offset = divmod(position, self.tokens_per_epoch)
        block = offset // self.source.block_tokens
        # The last w with w * blocks // windows <= block.
        return epoch, ((block + 1) * self.windows_per_epoch - 1) // self._blocks

    def _window_start(self, position: int) -> int:
        epoch, window = self._locate(position)
        return epoch * self.tokens_per_epoch + self._first_block(window) * self.source.block_tokens
