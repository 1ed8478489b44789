"""What a pipeline writes and a trainer reads: the activation store, its format, its verification.

store = tubelet_store.open("catalog.yaml#demo")     # or a path, or s3://...
store.clips()                       # pyarrow table, one row per clip (.to_pandas() where pandas is installed)
store["blocks.3"]                   # all clips, lazily: [clip, time, space, channel]; .torch(0), .dask(), .xarray()
store.shard_map("blocks.3", 0)      # the first shard, memory-mapped
"""

from tubelet_store.clips import ClipOutcome
from tubelet_store.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.writer import StoreWriter

open = open_store

__all__ = ["ClipOutcome", "Grid", "Hook", "Moments", "Plan", "Store", "StoreWriter", "TubeletError", "open_store"]
