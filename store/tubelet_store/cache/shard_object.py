"""A shard object to fetch, cut into parts that can be checked as they arrive."""

from __future__ import annotations

from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from tubelet_store.commit import StoredObject

# A part is a whole number of clips, so that it can be checked when it arrives; see benchmarks/results/remote.txt.
_PART_BYTES = 8 << 20


@dataclass(frozen=True)
class Part:
    """A range of whole clips of an object."""

    number: int
    clips: range
    """Clips within the shard."""
    start: int
    stop: int


@dataclass(frozen=True)
class ShardObject:
    """A shard object to fetch, with what proves that it is right."""

    stored: StoredObject
    clip_bytes: int
    first_clip: int
    tail: bytes
    """The bytes after the clips: the index that the plan implies."""

    def parts(self) -> list[Part]:
        """The object cut into ranges of whole clips; the tail is in the last."""
        clips = len(self.stored.crc32c)
        each = max(1, _PART_BYTES // self.clip_bytes)
        firsts = range(0, clips, each)
        stops = [min(first + each, clips) for first in firsts]
        ends = [stop * self.clip_bytes for stop in stops[:-1]] + [self.stored.size_bytes]
        return [
            Part(number, range(first, stop), first * self.clip_bytes, end)
            for number, (first, stop, end) in enumerate(zip(firsts, stops, ends, strict=True))
        ]

    def damaged(self, part: Part, data: NDArray[np.uint8]) -> str | None:
        """What is wrong with the bytes of `part`; None: nothing."""
        for clip in part.clips:
            start = clip * self.clip_bytes - part.start
            if int(google_crc32c.value(data[start : start + self.clip_bytes])) != self.stored.crc32c[clip]:
                return f"clip {self.first_clip + clip}"
        end_of_clips = part.clips.stop * self.clip_bytes - part.start
        if part.stop == self.stored.size_bytes and data[end_of_clips:].tobytes() != self.tail:
            return "the index"
        return None


def most_parts(size_bytes: int) -> int:
    """No object of `size_bytes` has more parts: each but the last is longer than half of the longest."""
    return 2 * size_bytes // _PART_BYTES + 1
