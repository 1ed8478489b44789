"""Cache activations of frozen video backbones, train sparse autoencoders on them, analyze what they learned.

    store = tubelet.open_store("catalog.yaml#demo-train")    # a path, s3://..., or a name in a catalog
    sae = tubelet.load_sae("runs/a")

Names are imported when they are first used: `import tubelet` loads neither torch nor dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tubelet.errors import TubeletError
    from tubelet_store.reader import open_store
    from tubelet_trainer.sae.sae_files import load_sae

__all__ = ["TubeletError", "load_sae", "open_store"]

_HOMES = {
    "TubeletError": "tubelet.errors",
    "load_sae": "tubelet_trainer.sae.sae_files",
    "open_store": "tubelet_store.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tubelet' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
