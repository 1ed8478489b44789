"""The pairs of one batch, collected while its windows are at hand. The first rows of a batch are its anchors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_trainer.data.pairs import PairArithmetic, PairDraw, Pairs
from tubelet_trainer.data.prefetcher import Window


@dataclass(frozen=True)
class Part:
    """This rank's part of a batch, and which batch it is."""

    rank: int
    ranks: int
    step: int
    """Number of the batch."""
    offset: int
    """Rows of the batch that other streams fill before this one."""
    anchors: int
    """Rows of this stream, over all ranks, that get a pair."""
    most: int
    """Most anchors that a rank has in any batch."""
    short: bool
    """It is the batch that ends the run."""


@dataclass
class _Found:
    positions: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)
    tokens: list[tuple[Tensor, ...]] = field(default_factory=list)


class DrawnPairs:
    """Collects the pairs of one batch.

    Args:
        draw: What to draw.
        arithmetic: Finds the neighbors.
        part: Of which batch.
    """

    def __init__(self, draw: PairDraw, arithmetic: PairArithmetic, part: Part) -> None:
        self._arithmetic, self._part = arithmetic, part
        self._seen = 0
        self._clips: set[int] = set()
        self._rows: list[Tensor] = []
        self._temporal = _Found() if draw.temporal else None
        self._spatial = _Found() if draw.spatial else None

    def add(self, window: Window, rows: Tensor, host_rows: NDArray[np.int64], filled: int) -> None:
        """Draw for the anchors among the next `rows` of the whole batch; this rank's begin at `filled` of its part."""
        part, where = self._part, window.locations
        taken = min(len(rows), part.anchors - self._seen)
        if taken <= 0:
            return
        clips = where.clips_on_host(host_rows[:taken])
        self._clips |= {int(clips.min()), int(clips.max())}
        first = (part.rank - part.offset - self._seen) % part.ranks
        mine = rows[first : taken : part.ranks]
        self._rows.append(torch.arange(filled, filled + len(mine), device=rows.device))
        places = part.offset + self._seen + first + part.ranks * torch.arange(len(mine), device=rows.device)
        for found, neighbors_of in (
            (self._temporal, self._arithmetic.temporal),
            (self._spatial, self._arithmetic.spatial),
        ):
            if found is not None:
                neighbors, valid = neighbors_of(mine, where.clips(mine), part.step, places)
                found.positions.append(where.positions(neighbors))
                found.valid.append(valid)
                found.tokens.append(tuple(tokens.index_select(0, neighbors).float() for tokens in window.tokens))
        self._seen += taken

    def pairs(self, hooks: Sequence[str]) -> tuple[Pairs | None, Pairs | None]:
        """Temporal and spatial pairs of the batch; `hooks` names what windows hold."""
        return self._of(self._temporal, hooks), self._of(self._spatial, hooks)

    def _of(self, found: _Found | None, hooks: Sequence[str]) -> Pairs | None:
        if found is None or not found.positions:
            return None
        tokens = {hook: torch.cat(parts) for hook, parts in zip(hooks, zip(*found.tokens, strict=True), strict=True)}
        return Pairs(
            rows=torch.cat(self._rows),
            hooks=tokens,
            positions=torch.cat(found.positions),
            valid=torch.cat(found.valid),
            whole=self._part.anchors,
            most=self._part.most,
            several_clips=len(self._clips) > 1 or self._part.short,
        )
