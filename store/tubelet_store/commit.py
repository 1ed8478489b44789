"""The durable record of one finished shard: what was written, what it held, and its moments.

Readers see a shard once its record exists. The record is created last and never replaced, so of two writers of the same
shard one wins, and a killed writer leaves no visible shard.
"""

from __future__ import annotations

import hashlib
import re
from typing import Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import Field

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.moments import Moments
from tubelet_store.object_keys import COMMITS, commit_key, commit_moments_key
from tubelet_store.plan import canonical_json
from tubelet_store.storage.object_root import ObjectRoot

# A key stays inside its store wherever that is copied: no empty segment, none that begins with a dot.
KEY_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$"

_RECORD = re.compile(r"(\d{6,})\.json")


class StoredObject(Config):
    """One object, with what is needed to check it."""

    key: str = Field(pattern=KEY_PATTERN)
    size_bytes: int
    sha256: str
    """Hex digest of the whole object."""
    crc32c: tuple[int, ...] = ()
    """Checksum of each clip, in order; empty for objects that hold no clips."""

    @classmethod
    def of(cls, key: str, data: bytes) -> StoredObject:
        """The object at `key` that holds `data`, and no clips."""
        return cls(key=key, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


class Commit(Config):
    """Commit record of one shard."""

    format_version: Literal[1] = 1
    plan: str
    """Digest of the plan the shard was written for."""
    shard: int
    objects: tuple[StoredObject, ...]
    moments: StoredObject
    clips: tuple[ClipOutcome, ...]
    software: dict[str, str] = Field(default_factory=dict)
    """Versions that made the shard."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Time spent per stage."""


def read_commit(root: ObjectRoot, shard: int) -> Commit | None:
    """The record of `shard`, None where it is not committed.

    Raises:
        TubeletError: the record is damaged.
    """
    try:
        raw = root.read(commit_key(shard))
    except FileNotFoundError:
        return None
    try:
        commit = Commit.model_validate_json(raw)
        if commit.shard != shard:
            raise ValueError(f"it is the record of shard {commit.shard}")
    except ValueError as error:
        detail = " ".join(str(error).split())
        raise TubeletError(
            f"{root.url}/{commit_key(shard)} is damaged: {detail[:200]}",
            "Copy it again from the store's source; while extracting, delete it and run again",
        ) from error
    return commit


def committed_shards(root: ObjectRoot) -> list[int]:
    """Numbers of the shards that have a record, ascending."""
    names = [_RECORD.fullmatch(key.removeprefix(f"{COMMITS}/")) for key in root.list_keys(COMMITS)]
    return sorted(int(name[1]) for name in names if name)


def write_commit(root: ObjectRoot, commit: Commit) -> bool:
    """Create the record; False where another writer of the same shard was first."""
    return root.create(commit_key(commit.shard), canonical_json(commit.model_dump(mode="json")))


def encode_commit_moments(moments: dict[str, Moments]) -> bytes:
    """The shard's moments, stored with its record, to be merged when the store is finished."""
    flat: dict[str, NDArray[np.generic]] = {
        f"{hook}/{name}": np.asarray(values, order="C")
        for hook, of_hook in moments.items()
        for name, values in of_hook.arrays().items()
    }
    return bytes(safetensors.numpy.save(flat))


def stored_moments(shard: int, data: bytes) -> StoredObject:
    """What a record says of the moments `data` of `shard`."""
    return StoredObject(key=commit_moments_key(shard), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def read_commit_moments(root: ObjectRoot, commit: Commit) -> dict[str, Moments]:
    """Moments of a committed shard, by hook.

    Raises:
        TubeletError: they are missing, or not what the record says.
    """
    key = commit_moments_key(commit.shard)
    try:
        data = root.read(key)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != commit.moments.sha256:
        raise TubeletError(
            f"{root.url}/{key} is {'damaged' if data else 'missing'}",
            f"Copy it again from the store's source; while extracting, delete {commit_key(commit.shard)} and run again",
        )
    return decode_commit_moments(data)


def decode_commit_moments(data: bytes) -> dict[str, Moments]:
    """Inverse of `encode_commit_moments`."""
    hooks: dict[str, dict[str, NDArray[np.generic]]] = {}
    for name, values in safetensors.numpy.load(data).items():
        hook, _, statistic = name.rpartition("/")
        hooks.setdefault(hook, {})[statistic] = values
    return {hook: Moments.from_arrays(arrays) for hook, arrays in hooks.items()}
