"""Maps the names of files in format 1 (British spelling) to current ones: run YAML, sae.json, checkpoints.

Everything that reads such a file calls one of the functions below; files are written with current names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIELDS = {
    "normalisation": "normalization",
    "centre": "center",
    "optimiser": "optimizer",
    "neighbours": "neighbors",
    "mirror": "cache",
    "transport": "client",
}

# Last parts of the names of tensors, in sae.safetensors and in a checkpoint.
_TENSORS = (
    (re.compile(r"(^|/)normalisation\.(mean|scale|whiten|unwhiten)$"), r"\1normalization.\2"),
    (re.compile(r"(^|/)clock/(silent_tokens|dead_counts)$"), r"\1dead_latents/\2"),
)


def current_fields(tree: Any) -> Any:
    """A configuration, or a part of one, with current field names; dotted names (of a sweep) too."""
    if isinstance(tree, Mapping):
        return {_current(name): current_fields(value) for name, value in tree.items()}
    return [current_fields(part) for part in tree] if isinstance(tree, list | tuple) else tree


def current_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """`sae.json` or a checkpoint's `state.json` with current names. Entries that describe the store are unchanged."""
    current = dict(record)
    if "broken" in current:
        current["diverged"] = current.pop("broken")
    if "config" in current:
        current["config"] = current_fields(current["config"])
    if isinstance(current.get("provenance"), Mapping):
        own = {
            name: current_fields(current["provenance"][name]) for name in ("pairs",) if name in current["provenance"]
        }
        current["provenance"] = {**current["provenance"], **own}
    return current


def current_tensor(name: str) -> str:
    """Current name of a tensor."""
    for pattern, replacement in _TENSORS:
        name = pattern.sub(replacement, name)
    return name


def _current(name: Any) -> Any:
    return ".".join(_FIELDS.get(part, part) for part in name.split(".")) if isinstance(name, str) else name
