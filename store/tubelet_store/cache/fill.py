"""Filling a cache ahead of a job: `tubelet cache`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tubelet.errors import TubeletError, nearest
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.shard_object import ShardObject

if TYPE_CHECKING:
    from tubelet_store.reader import Store

# Shards fetched at once; the connections are shared, so the second only fills the gaps of the first.
_AT_ONCE = 2


class FillConfig(CacheConfig):
    """What `tubelet cache` fetches, and where it keeps it."""

    store: str
    """URL of the store."""
    hooks: tuple[str, ...] | None = None
    """Hooks to fetch, e.g. `[blocks.3, blocks.6]`; none: all."""


def wanted_shards(store: Store, hooks: tuple[str, ...] | None) -> list[ShardObject]:
    """The shard objects of `hooks` in order, shard by shard.

    Raises:
        TubeletError: the store is local, or has no such hook.
    """
    if store.cache is None:
        raise TubeletError(f"{store.url} is local", "Only remote stores need the cache; use this store directly")
    names = [hook.name for hook in store.plan.hooks]
    for hook in hooks or ():
        if hook not in names:
            raise TubeletError(f"{store.url} has no hook '{hook}'", nearest(hook, names))
    return [store.shard_object(hook, shard) for shard in store.committed for hook in hooks or names]


def fill(store: Store, wanted: list[ShardObject]) -> Iterator[ShardObject]:
    """Fetch `wanted` into the store's cache as far as its budget goes; yields objects as they are there.

    Raises:
        TubeletError: an object cannot be fetched; see `LocalCache.open`.
    """
    cache = store.cache
    if cache is None:
        return
    room_bytes = int(cache.config.budget)
    fitting: list[ShardObject] = []
    for each in wanted:
        room_bytes -= each.stored.size_bytes
        if room_bytes < 0 and fitting:
            break
        fitting.append(each)

    def fetch(each: ShardObject) -> ShardObject:
        cache.open(each).close()
        return each

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            yield from pool.map(fetch, fitting)
        finally:
            pool.shutdown(cancel_futures=True)
