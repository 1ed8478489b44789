"""The data of a run: its stores, what is held out of them, and the streams of batches over the rest.

    store, mix ─▶ held-out videos of each ─▶ training stream (ActivationLoader or Mixture), held-out stream

All SAEs of a run read the same streams: the union of their hooks, and pairs if one of them wants pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_store.reader import Store, open_store
from tubelet_trainer.config import PairsConfig, TrainConfig
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.mixture import Mixture, mixed_moments, refuse_other_kind
from tubelet_trainer.data.pairs import PairDraw
from tubelet_trainer.data.shard_prefetch import fitting_shards
from tubelet_trainer.data.source import Source, choose_hook
from tubelet_trainer.process_group import ALONE, ProcessGroup
from tubelet_trainer.specs import Spec, specs

Stream = ActivationLoader | Mixture

# Held-out tokens compared with their neighbors at once: their dense codes are in memory.
_PAIRS_TOGETHER = 1024


class Streams:
    """Streams of batches over the stores of a run.

    Args:
        config: The run's configuration.
        specs: Its SAEs.
        stores: What `open_stores` gave.
        device: Where batches are wanted.
        ranks: Processes that share every batch.

    Raises:
        TubeletError: the configuration does not fit the stores.
    """

    def __init__(
        self,
        config: TrainConfig,
        specs: Sequence[Spec],
        stores: Sequence[Store],
        device: torch.device,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self.config, self.stores, self.device, self.ranks = config, stores, device, ranks
        store = stores[0]
        others: list[Fraction] = [Fraction(share).limit_denominator(1_000_000) for share in config.mix.values()]
        self.shares = [1 - sum(others, Fraction(0)), *others]
        self.hooks = _hooks(specs, store)
        for other in self.stores[1:]:
            refuse_other_kind(store, other, self.hooks)
        temporal = any(spec.config.objective.temporal for spec in specs)
        spatial = any(spec.config.objective.spatial for spec in specs)
        self._draw = PairDraw(config.pairs, temporal, spatial) if temporal or spatial else None
        self.block_patches = config.block_patches
        if spatial and self.block_patches is None:
            # Neighbors above and below are in the same window only if whole frames are.
            self.block_patches = store.plan.grid.space
        splits = [self._split(each) for each in self.stores]
        self._training, self._heldout = [split[0] for split in splits], [split[1] for split in splits]
        tokens = store.plan.grid.tokens
        self.total_tokens = config.total_tokens(sum(len(clips) for clips in self._training) * tokens)
        self.training = self._stream(self._training, config.window_tokens, self.total_tokens, draw=self._draw)
        self.heldout: Stream | None = None
        """The first tokens of a shuffled pass over all held-out ones; its seed is fixed, so always the same tokens."""
        if held := sum(len(clips) for clips in self._heldout) * tokens:
            wanted = min(config.eval_tokens, held)
            # One window, so that they are the same whatever the windows of training are.
            self.heldout = self._stream(self._heldout, wanted, wanted, seed=0, ranks=ALONE)

    def heldout_pairs(self) -> Stream | None:
        """The tokens of `heldout` with their neighbors one latent step later; None where there are none to compare."""
        if self.heldout is None or self.stores[0].plan.grid.time < 2 or len(self.heldout.clips) < 2:
            return None
        tokens = min(self.config.batch_tokens, _PAIRS_TOGETHER)
        draw = PairDraw(PairsConfig(anchors=tokens), temporal=True, spatial=False)
        wanted = self.heldout.total_tokens
        return self._stream(self._heldout, wanted, wanted, batch_tokens=tokens, seed=0, draw=draw, ranks=ALONE)

    def moments(self, hook: str) -> Moments:
        """Of the stores' tokens, held-out videos included, by their share of a batch."""
        if len(self.stores) == 1:
            return self.stores[0].moments(hook)
        return mixed_moments([store.moments(hook) for store in self.stores], [float(share) for share in self.shares])

    def first_tokens(self, hook: str, tokens: int) -> Tensor:
        """The first tokens [N, D] of the training stream, all ranks together."""
        wanted = min(tokens, self.total_tokens)
        stream = self._stream(self._training, self.config.window_tokens, wanted, batch_tokens=wanted, ranks=ALONE)
        return next(iter(stream)).hooks[hook]

    @property
    def identities(self) -> list[str]:
        """Identities of the stores."""
        return [store.identity for store in self.stores]

    @property
    def failed(self) -> int:
        """Clips that hold no activations."""
        return sum(int((~store.ok()).sum()) for store in self.stores)

    def _split(self, store: Store) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Clips to train on and clips held out, without those that failed."""
        table, ok = store.clips(), store.ok()
        out = np.zeros(store.plan.clips, dtype=bool)
        out[table["clip"].to_numpy()] = held_out(table["video_id"].to_pylist(), self.config.holdout)
        if not (ok & ~out).any():
            raise TubeletError(
                f"{store.url}: no clip is left to train on ({int(ok.sum())} of {len(ok)} hold activations, "
                f"{int((ok & out).sum())} of those are held out)",
                "Lower holdout.fraction, or extract more clips",
            )
        return np.flatnonzero(ok & ~out), np.flatnonzero(ok & out)

    def _stream(
        self,
        clips: Sequence[NDArray[np.int64]],
        window_tokens: int,
        total_tokens: int,
        *,
        batch_tokens: int | None = None,
        seed: int | None = None,
        draw: PairDraw | None = None,
        ranks: ProcessGroup | None = None,
    ) -> Stream:
        """Batches over `clips` of each store. A store without any leaves its share to the others."""
        ranks = ranks or self.ranks
        options: dict[str, Any] = {
            "batch_tokens": batch_tokens or self.config.batch_tokens,
            "total_tokens": total_tokens,
            "resident_shards": self.config.resident_shards,
            "seed": self.config.seed if seed is None else seed,
            "device": self.device,
            "pairs": draw,
            "rank": ranks.rank,
            "ranks": ranks.size,
        }
        served = [number for number, chosen in enumerate(clips) if len(chosen)]
        whole = sum((self.shares[number] for number in served), Fraction(0))
        parts, reached, offset = [], Fraction(0), 0
        for number, store in enumerate(self.stores):
            if number in served:
                share = self.shares[number] / whole
                sources = [Source(store, hook, self.block_patches) for hook in self.hooks]
                # Two windows' worth of memory in all, however many stores.
                tokens = max(1, int(window_tokens * share))
                bounds = (reached, reached + share)
                parts.append(
                    ActivationLoader(
                        sources, clips[number], window_tokens=tokens, share=bounds, clip_offset=offset, **options
                    )
                )
                reached += share
            offset += store.plan.clips
        return parts[0] if len(self.stores) == 1 else Mixture(parts)


def open_stores(config: TrainConfig) -> list[Store]:
    """The run's store, and those that are mixed with it.

    Raises:
        TubeletError: one cannot be opened.
    """
    return [open_store(url, cache=config.cache) for url in (config.store, *config.mix)]


def resident_shards(config: TrainConfig, stores: Sequence[Store]) -> int | None:
    """How many shards a run shuffles together where that is not configured: what its cache holds twice; None: all.

    A cache holds the shards of all hooks of the run, and of all its remote stores.
    """
    hooks = _hooks(specs(config), stores[0])
    return fitting_shards([Source(store, hook) for store in stores for hook in hooks])


def _hooks(specs: Sequence[Spec], store: Store) -> list[str]:
    return list(dict.fromkeys(choose_hook(store, spec.config.hook) for spec in specs))
