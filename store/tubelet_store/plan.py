"""The plan of a store, made before the first video is decoded.

The plan is hashed. Two machines that plan the same extraction get the same digest, so a plan holds no local paths,
secrets or times; those (data set root, user, software versions) are provenance, outside the hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config
from tubelet.errors import TubeletError

if TYPE_CHECKING:
    import numpy as np

_LONGEST_VALUE = 80
_DIGEST_SHOWN = len("sha256:") + 12

DTypeName = Literal["float16", "bfloat16", "float32"]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype called `name`, `bfloat16` (of ml_dtypes) included."""
    # Imported on use: NumPy takes a third of the start of a verb that reads a plan and no array.
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Grid(Config):
    """Token grid of one clip: `time` latent steps of `height` x `width` patches."""

    time: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)

    @property
    def space(self) -> int:
        """Patches per time step."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens per clip."""
        return self.time * self.space


class TokenSelection(Config):
    """Which of the backbone's tokens are stored, where not all are.

    The same patches are kept at every time step, so that temporal pairs are always complete.
    """

    kind: Literal["patches", "pooled"]
    """patches: some patches of each clip, which the clip table names; the plan's grid is then one row of them.
    pooled: averages over equal boxes of tokens; the plan's grid is the smaller one."""
    grid: Grid
    """Grid of the backbone, before the selection."""
    seed: int | None = None
    """patches: seed of the choice, which differs per clip."""


class Hook(Config):
    """A place in the backbone whose activations are stored."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")
    """For example `blocks.3`: the residual stream after block 3 (0-based)."""
    channels: int = Field(gt=0)


class Plan(Config):
    """Everything that decides the bytes of a store."""

    format_version: Literal[1] = 1
    dataset: dict[str, JsonValue]
    """Kind, name and split of the data set."""
    clip_table: str
    """Digest of the clip table: which videos and views, in which order."""
    clips: int = Field(gt=0)
    clips_per_shard: int = Field(gt=0)
    sampling: dict[str, JsonValue]
    """Which frames make a clip, with the formula's name."""
    preprocessing: dict[str, JsonValue]
    backbone: dict[str, JsonValue]
    """Family, id, revision, digest of the weights, precision."""
    grid: Grid
    """Tokens of a clip as they are stored."""
    tokens: TokenSelection | None = Field(default=None, exclude_if=lambda tokens: tokens is None)
    """How `grid` comes from the backbone's; None, and then absent: it is the backbone's."""
    hooks: tuple[Hook, ...] = Field(min_length=1)
    special_tokens: tuple[str, ...] = ()
    """Names of the tokens outside the grid (`cls`, `register.0`, ...), in order."""
    special_time: int = Field(default=1, gt=0)
    """Time steps of the special tokens: the grid's for a frame-wise backbone, 1 for a video backbone."""
    dtype: DTypeName = "float16"

    @model_validator(mode="after")
    def _selection_fits(self) -> Plan:
        if self.tokens is not None and self.tokens.kind == "patches":
            whole = self.tokens.grid
            if self.grid.height != 1 or self.grid.width > whole.space or self.grid.time != whole.time:
                raise ValueError(f"{self.grid} is no row of patches of {whole}")
        return self

    @model_validator(mode="after")
    def _hooks_are_distinct(self) -> Plan:
        names = [hook.name for hook in self.hooks]
        if len(set(names)) != len(names):
            raise ValueError(f"hooks repeat: {names}")
        return self

    @property
    def digest(self) -> str:
        """Identity of the plan: `sha256:` over its canonical JSON."""
        return sha256_of_json(self.model_dump(mode="json"))

    @property
    def position_grid(self) -> Grid:
        """Grid in which stored tokens have their places: the backbone's where only some patches are stored."""
        return self.tokens.grid if self.tokens is not None and self.tokens.kind == "patches" else self.grid

    @property
    def shards(self) -> int:
        """Number of shards; the last may hold fewer clips."""
        return math.ceil(self.clips / self.clips_per_shard)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored activations."""
        return numpy_dtype(self.dtype)

    def shard_range(self, shard: int) -> range:
        """Clip numbers that shard `shard` holds."""
        if not 0 <= shard < self.shards:
            raise IndexError(f"shard {shard} of {self.shards}")
        start = shard * self.clips_per_shard
        return range(start, min(start + self.clips_per_shard, self.clips))

    def hook(self, name: str) -> Hook:
        """The hook called `name`.

        Raises:
            TubeletError: the store has no such hook; lists the ones it has.
        """
        for hook in self.hooks:
            if hook.name == name:
                return hook
        stored = ", ".join(h.name for h in self.hooks)
        raise TubeletError(f"The store has no hook '{name}'", f"It holds: {stored}")

    def clip_shape(self, hook: Hook) -> tuple[int, int, int]:
        """Shape [time, space, channel] of one clip at `hook`."""
        return (self.grid.time, self.grid.space, hook.channels)

    def special_shape(self, hook: Hook) -> tuple[int, int, int]:
        """Shape [time or 1, token, channel] of one clip's special tokens at `hook`."""
        return (self.special_time, len(self.special_tokens), hook.channels)

    def differences(self, other: Plan) -> list[str]:
        """Fields in which `other` departs from this plan, as `field: here -> there` lines."""
        return differences(self.model_dump(mode="json"), other.model_dump(mode="json"))


def differences(before: JsonValue, after: JsonValue) -> list[str]:
    """Entries of two JSON values that differ, as short lines: `backbone.family: videomae -> dinov2`."""
    left, right = _flatten(before), _flatten(after)
    lines = []
    for field in sorted(left.keys() | right.keys()):
        if (old := left.get(field)) != (new := right.get(field)):
            texts = (_short(old), _short(new))
            if texts[0] == texts[1]:
                texts = (str(old), str(new))
            lines.append(f"{field}: {texts[0]} -> {texts[1]}")
    return lines


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_of_json(value: Any) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def _short(value: JsonValue) -> str:
    if isinstance(value, list):
        value = ", ".join(str(item.get("name", item)) if isinstance(item, dict) else _short(item) for item in value)
    text = "none" if value in (None, "") else str(value)
    if text.startswith("sha256:"):
        return text[:_DIGEST_SHOWN]
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _flatten(value: JsonValue, prefix: str = "") -> dict[str, JsonValue]:
    if isinstance(value, dict) and value:
        return {k: v for name, below in value.items() for k, v in _flatten(below, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
