"""Where Tubelet keeps what it can make again: cached shards, the progress of a verification, spooled uploads."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in $TUBELET_CACHE, else in $XDG_CACHE_HOME/tubelet, else in ~/.cache/tubelet; absolute."""
    given = os.environ.get("TUBELET_CACHE")
    home = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tubelet"
    return home.expanduser().absolute() / name
