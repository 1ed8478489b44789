"""Finishing a store of any size takes the memory of its tables, not of its records."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from stores import planned_table
from tubelet_store.clip_table import ClipOutcome, finished_table, outcomes_of


def test_outcomes_do_not_wait_for_each_other() -> None:
    clips = 20_000
    alive: weakref.WeakSet[ClipOutcome] = weakref.WeakSet()
    most = 0

    def outcomes() -> Iterator[ClipOutcome]:
        nonlocal most
        for clip in range(clips):
            outcome = ClipOutcome(status="ok", frame_indices=(clip, clip + 1), video_frames=clip)
            alive.add(outcome)
            most = max(most, len(alive))
            yield outcome

    table = finished_table(planned_table(clips), outcomes(), clips_per_shard=7)
    assert most < clips / 2
    assert table["video_frames"].to_pylist() == list(range(clips))
    assert table["shard"].to_pylist() == [clip // 7 for clip in range(clips)]
    assert outcomes_of(table.slice(9_000, 1))[0].frame_indices == (9_000, 9_001)


def test_clips_of_some_shards_keep_the_numbers_of_their_shards() -> None:
    some = planned_table(12).take([0, 1, 2, 9, 10, 11])
    table = finished_table(some, (ClipOutcome(status="ok") for _ in range(6)), clips_per_shard=3)
    assert table["shard"].to_pylist() == [0, 0, 0, 3, 3, 3]
