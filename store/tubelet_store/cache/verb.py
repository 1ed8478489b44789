"""The verb `tubelet cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_store.cache.fill import FillConfig


def _config() -> type[FillConfig]:
    from tubelet_store.cache.fill import FillConfig

    return FillConfig


def _cache(config: FillConfig) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from tubelet.formats import human_bytes
    from tubelet_store.cache.config import CacheConfig
    from tubelet_store.cache.fill import fill, wanted_shards
    from tubelet_store.reader import open_store

    settings = {name: getattr(config, name) for name in CacheConfig.model_fields}
    store = open_store(config.store, allow_unfinished=True, cache=CacheConfig.model_validate(settings))
    wanted = wanted_shards(store, config.hooks)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    count = size_bytes = 0
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=sum(each.stored.size_bytes for each in wanted))
        for each in fill(store, wanted):
            count, size_bytes = count + 1, size_bytes + each.stored.size_bytes
            progress.advance(bar, each.stored.size_bytes)
    print(f"{count} of {len(wanted)} shard objects, {human_bytes(size_bytes)}, verified in {config.folder}")
    if count < len(wanted):
        missing = sum(each.stored.size_bytes for each in wanted) - size_bytes
        print(f"The budget of {human_bytes(config.budget)} is reached: {human_bytes(missing)} more are wanted.")
    return 0


CACHE = Verb("cache", "Fetch a remote store's shards to this machine ahead of a job.", _config, _cache, ("store",))
