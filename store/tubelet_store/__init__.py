"""What a pipeline writes and a trainer reads: the activation store, its format, its verification.

store = tubelet_store.open_store("demo/videomae.zarr")
store.clips()                       # pyarrow table, one row per clip
store.shard_map("blocks.3", 0)      # the first shard, memory-mapped [clip, time, space, channel]
"""

from tubelet_store.clips import ClipOutcome
from tubelet_store.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_store.plan import Grid, Hook, Plan
from tubelet_store.reader import Store, open_store
from tubelet_store.writer import StoreWriter

__all__ = ["ClipOutcome", "Grid", "Hook", "Moments", "Plan", "Store", "StoreWriter", "TubeletError", "open_store"]
