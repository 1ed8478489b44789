"""Cache activations of frozen video backbones, train sparse autoencoders on them, analyze what they learned.

    store = tubelet.open_store("catalog.yaml#demo-train")    # a path, s3://..., or a name in a catalog
    run = tubelet.train(store=store, out="runs/a", sae={"kind": "batchtopk", "k": 16}, epochs=2)
    sae = tubelet.load_sae("runs/a")
    codes = sae.encode(store["blocks.2"][:4])                # any leading dimensions
    report = tubelet.evaluate(run=run, store=store)

`extract`, `train`, `evaluate`, `edit`, `gallery`, `study` and `estimate` take the fields of their verb's YAML: as
keywords, as the path of a YAML file, or as a configuration object. `dir(tubelet)` lists everything.

Names are imported when they are first used: `import tubelet` loads neither torch nor dask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tubelet.api import edit, estimate, evaluate, extract, gallery, study, train
    from tubelet.errors import TubeletError
    from tubelet_store.reader import open_store
    from tubelet_trainer.sae.sae_files import load_sae

    __version__: str

__all__ = [
    "TubeletError",
    "__version__",
    "edit",
    "estimate",
    "evaluate",
    "extract",
    "gallery",
    "load_sae",
    "open_store",
    "study",
    "train",
]

# Module and extra of each name; strings, so that no package is imported before it is used.
_HOMES = {
    "TubeletError": ("tubelet.errors", ""),
    "edit": ("tubelet.api", ""),
    "estimate": ("tubelet.api", ""),
    "evaluate": ("tubelet.api", ""),
    "extract": ("tubelet.api", ""),
    "gallery": ("tubelet.api", ""),
    "load_sae": ("tubelet_trainer.sae.sae_files", "trainer"),
    "open_store": ("tubelet_store.reader", ""),
    "study": ("tubelet.api", ""),
    "train": ("tubelet.api", ""),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("tubelet")
    elif name in _HOMES:
        module, extra = _HOMES[name]
        if extra:
            from tubelet.extras import require_extra

            require_extra(extra, f"tubelet.{name}")
        value = getattr(import_module(module), name)
    else:
        raise AttributeError(f"module 'tubelet' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
