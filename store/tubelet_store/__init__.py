"""What a pipeline writes and a trainer reads: the activation store, its format, its verification.

store = open_store("catalog.yaml#demo")     # or a path, or s3://...
store.clips()                       # pyarrow table, one row per clip (.to_pandas() where pandas is installed)
store["blocks.3"]                   # all clips, lazily: [clip, time, space, channel]; .torch(0), .dask(), .xarray()
store.shard_map("blocks.3", 0)      # the first shard, memory-mapped
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tubelet_store.clip_table import ClipOutcome
    from tubelet_store.moments import Moments
    from tubelet_store.plan import Grid, Hook, Plan
    from tubelet_store.reader import Store, open_store
    from tubelet_store.store_writer import StoreWriter

__all__ = ["ClipOutcome", "Grid", "Hook", "Moments", "Plan", "Store", "StoreWriter", "open_store"]

_HOMES = {
    "ClipOutcome": "clip_table",
    "Grid": "plan",
    "Hook": "plan",
    "Moments": "moments",
    "Plan": "plan",
    "Store": "reader",
    "StoreWriter": "store_writer",
    "open_store": "reader",
}


def __getattr__(name: str) -> Any:
    # On first use: zarr and pyarrow take most of a second, and a verb that reads a catalog needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'tubelet_store' has no attribute '{name}'")
    value = getattr(import_module(f"tubelet_store.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
