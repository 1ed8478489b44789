"""Shards that all streams of this process read next through a cache: one list, in reading order.

    training, hooks a and b ─▶ groups of shards ─┐
    second store of a mix   ─▶ groups of shards ─┼─▶ first groups of all, then second ones ... ─▶ the cache fetches
    held-out stream         ─▶ its shards       ─┘

A cache keeps a single list of what it should fetch and not evict. Streams that each gave it their own would drop each
other's. Caches of several stores in one directory share its budget, so the list is cut where it is full.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from tubelet.errors import TubeletError
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.cache.shard_object import ShardObject
from tubelet_trainer.data.source import Source


class ShardPrefetch:
    """The list for the caches in one directory."""

    def __init__(self) -> None:
        self._groups: dict[object, list[list[tuple[Source, int]]]] = {}
        self._announced: set[LocalCache] = set()
        self._changing = threading.Lock()

    def announce(self, stream: object, groups: list[list[tuple[Source, int]]]) -> None:
        """Name the groups of shards that `stream` reads from now on, in place of those that it named before."""
        with self._changing:
            self._groups.pop(stream, None)
            self._groups[stream] = groups
            self._announce()

    def withdraw(self, stream: object) -> None:
        """`stream` reads no more."""
        with self._changing:
            if self._groups.pop(stream, None) is not None:
                self._announce()

    def _announce(self) -> None:
        coming: dict[LocalCache, list[ShardObject]] = {cache: [] for cache in self._announced}
        named, held_bytes = set(), 0
        for source, shard in self._merged():
            cache, wanted = source.store.cache, source.store.shard_object(source.hook, shard)
            if cache is None or wanted.stored.sha256 in named:
                continue
            held_bytes += wanted.stored.size_bytes
            if held_bytes > int(cache.config.budget):
                break
            named.add(wanted.stored.sha256)
            coming.setdefault(cache, []).append(wanted)
        for cache, objects in coming.items():
            cache.prefetch(objects)
        self._announced = {cache for cache, objects in coming.items() if objects}

    def _merged(self) -> Iterator[tuple[Source, int]]:
        # The stream that began last, e.g. an evaluation during training, reads first.
        newest_first = list(self._groups.values())[::-1]
        return chain.from_iterable(chain.from_iterable(zip_longest(*newest_first, fillvalue=[])))


_PREFETCHES: dict[Path, ShardPrefetch] = {}


def shard_prefetch(cache: LocalCache) -> ShardPrefetch:
    """What is read next through the directory of `cache`."""
    return _PREFETCHES.setdefault(cache.config.folder, ShardPrefetch())


def refuse_small_cache(needs: Sequence[tuple[Source, int]]) -> None:
    """Refuse a cache that cannot hold what one stream shuffles together: it would fetch shards repeatedly.

    Args:
        needs: Sources read in turns, each with the number of its shards whose blocks are shuffled together.

    Raises:
        TubeletError: they do not fit the budget.
    """
    by_folder: dict[Path, list[tuple[Source, int]]] = {}
    for source, shards in needs:
        if source.store.cache is not None:
            by_folder.setdefault(source.store.cache.config.folder, []).append((source, shards))
    for folder, groups in by_folder.items():
        wanted_bytes = sum(source.shard_bytes * shards for source, shards in groups)
        budget_bytes = min(int(source.store.cache.config.budget) for source, _ in groups if source.store.cache)
        if wanted_bytes > budget_bytes:
            parts = ", ".join(f"{shards} of {source.store.url} hook {source.hook}" for source, shards in groups)
            fitting = budget_bytes // sum(source.shard_bytes for source, _ in groups)
            fewer = f", or resident_shards to at most {fitting} (another order of tokens)" if fitting else ""
            raise TubeletError(
                f"The cache in {folder} may hold {budget_bytes} bytes, but the shards that are shuffled together have"
                f" {wanted_bytes}: {parts}",
                f"Set the cache's budget to at least {wanted_bytes} bytes, better twice that{fewer}",
            )


def fitting_shards(sources: Sequence[Source]) -> int | None:
    """How many shards of each source may be shuffled together; None: all, because all fit or none is cached."""
    remote = [source for source in sources if source.store.cache is not None]
    budget_bytes = min((int(source.store.cache.config.budget) for source in remote if source.store.cache), default=0)
    if sum(source.shard_bytes * source.store.plan.shards for source in remote) <= budget_bytes:
        return None
    # Twice: while the last blocks of one group are read, the next one is fetched.
    return max(1, budget_bytes // (2 * sum(source.shard_bytes for source in remote)))
