"""The group document of a store: its plan, whether it is complete, and where it came from."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.object_keys import GROUP
from tubelet_store.plan import Plan
from tubelet_store.storage.object_root import ObjectRoot

FORMAT_VERSION = 1

_REMOTE_READINGS = 4


class StoreState(Config):
    """attributes["tubelet"] of the store's zarr.json."""

    format_version: Literal[1] = 1
    state: Literal["writing", "complete"] = "writing"
    plan: Plan
    plan_digest: str
    identity: str | None = None
    """Digest of the manifest, once complete: what `catalog.yaml` calls the store by."""
    clips_failed: int | None = None
    """Clips stored as NaN, once complete."""
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    """Who made it, where and with what: informative, in no digest."""

    @property
    def complete(self) -> bool:
        """Every shard is committed and merged."""
        return self.state == "complete"


def state_document(state: StoreState) -> bytes:
    """The group's zarr.json."""
    document = {
        "attributes": {"tubelet": state.model_dump(mode="json")},
        "zarr_format": 3,
        "node_type": "group",
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode()


def read_state(root: ObjectRoot) -> StoreState | None:
    """The state of the store at `root`; None where nothing was begun.

    Raises:
        TubeletError: the Zarr group is not a Tubelet store, is of a later format, or is damaged.
    """
    for reading in range(readings(root), 0, -1):
        try:
            raw = root.read(GROUP)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return _parsed(raw, root)
        except TubeletError:
            if reading == 1:
                raise
    raise AssertionError("the last reading returns or raises")


def readings(root: ObjectRoot) -> int:
    """How often a small object is read before its damage counts: once from a disk, again if a network was between."""
    return 1 if root.local_path(GROUP) is not None else _REMOTE_READINGS


def _parsed(raw: bytes, root: ObjectRoot) -> StoreState:
    attributes = _tubelet_attributes(raw, root.url)
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        raise TubeletError(
            f"{root.url} has store format {version!r}; this Tubelet reads format {FORMAT_VERSION}", "Upgrade Tubelet"
        )
    try:
        state = StoreState.model_validate(attributes)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise TubeletError(
            f"{root.url}/{GROUP} is damaged at '{where}': {fault['msg']}", "Copy it again from its source"
        ) from error
    if state.plan.digest != state.plan_digest:
        raise TubeletError(f"{root.url}/{GROUP}: the plan was edited", "Copy it again from its source")
    return state


def _tubelet_attributes(raw: bytes, url: str) -> dict[str, Any]:
    try:
        attributes = json.loads(raw)["attributes"]["tubelet"]
    except (ValueError, KeyError, TypeError) as error:
        raise TubeletError(
            f"{url} holds a {GROUP} without Tubelet's attributes", "Point at the folder that `tubelet extract` wrote"
        ) from error
    if not isinstance(attributes, dict):
        raise TubeletError(f"{url}/{GROUP} is damaged", "Copy it again from its source")
    return attributes
