"""Token selection: whole time series, truthful places, the values that an unselected store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from in_process import extract_here
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.token_selection import AllTokens, PatchSubset, PooledGrid, TokenSelector
from tubelet_store.moments import Moments
from tubelet_store.plan import Grid
from tubelet_store.reader import Store, open_store

GRID = Grid(time=4, height=6, width=4)


def numbered(batch: int) -> torch.Tensor:
    """[B, T, S, 3] whose channels are clip, time and patch."""
    tokens = torch.zeros(batch, GRID.time, GRID.space, 3)
    tokens[..., 0] += torch.arange(batch)[:, None, None]
    tokens[..., 1] += torch.arange(GRID.time)[:, None]
    tokens[..., 2] += torch.arange(GRID.space)
    return tokens


@given(keep=st.integers(1, GRID.space - 1), seed=st.integers(0, 99))
def test_a_subset_keeps_the_same_patches_at_every_time(keep, seed):
    selector = TokenSelector(PatchSubset(keep=keep, seed=seed), GRID)
    patches = [selector.patches(video, view) for video in "ab" for view in (0, 1)]
    kept = selector(numbered(4), patches)
    assert tuple(kept.shape) == (4, GRID.time, keep, 3)
    for clip, chosen in enumerate(patches):
        assert list(chosen) == sorted(set(chosen))
        for time in range(GRID.time):
            expected = torch.tensor([[clip, time, patch] for patch in chosen], dtype=torch.float32)
            assert torch.equal(kept[clip, time], expected)


def test_the_choice_is_by_seed_video_and_view_and_never_changes():
    def chosen(video: str, view: int, seed: int) -> tuple[int, ...]:
        return TokenSelector(PatchSubset(keep=8, seed=seed), GRID).patches(video, view)

    assert chosen("v", 0, 0) == chosen("v", 0, 0) == (2, 4, 5, 6, 8, 14, 15, 20)
    assert len({chosen("v", 0, 0), chosen("w", 0, 0), chosen("v", 1, 0), chosen("v", 0, 1)}) == 4
    drawn = Counter(patch for video in range(3000) for patch in chosen(str(video), 0, 0))
    assert min(drawn.values()) > 880
    assert max(drawn.values()) < 1120


def test_pooling_averages_boxes():
    selector = TokenSelector(PooledGrid(height=3, width=2, time=2), GRID)
    assert selector.grid == Grid(time=2, height=3, width=2)
    tokens = torch.randn(2, GRID.time, GRID.space, 5)
    pooled = selector(tokens, [None, None])
    boxes = tokens.unflatten(2, (GRID.height, GRID.width))
    for t, h, w in np.ndindex(2, 3, 2):
        box = boxes[:, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2]
        torch.testing.assert_close(pooled[:, t, 2 * h + w], box.flatten(1, 3).mean(1))


@pytest.mark.parametrize(
    "config", [AllTokens(), PatchSubset(keep=GRID.space), PooledGrid(height=GRID.height, width=GRID.width)]
)
def test_selecting_everything_is_no_selection(config):
    selector = TokenSelector(config, GRID)
    assert (selector.grid, selector.selection, selector.patches("v", 0)) == (GRID, None, None)
    tokens = numbered(1)
    assert selector(tokens, [None]) is tokens


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PatchSubset(keep=25), "tokens.keep to at most 24"),
        (PooledGrid(height=4, width=2), r"tokens.height to one of 1, 2, 3, 6"),
        (PooledGrid(height=3, width=2, time=3), r"tokens.time to one of 1, 2, 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(config, words):
    with pytest.raises(TubeletError, match=words):
        TokenSelector(config, GRID)


@pytest.fixture(scope="module")
def stores(job_settings, tmp_path_factory) -> dict[str, Store]:
    """The same four videos, one of them broken, stored whole, in part and pooled."""
    folder: Path = tmp_path_factory.mktemp("tokens")
    stores = {}
    for name, tokens in {
        "all": {"kind": "all"},
        "patches": {"kind": "patches", "keep": 5},
        "pooled": {"kind": "pooled", "height": 2, "width": 2, "time": 2},
    }.items():
        tree = {
            **job_settings,
            "dataset": {"kind": "folder", "root": job_settings["dataset"]["root"], "limit": 7},
            "sampling": {"kind": "dense", "frames": 8, "clips": 2},
            "hooks": ["blocks.-1"],
            "dtype": "float32",
            "tokens": tokens,
            "store": str(folder / f"{name}.zarr"),
        }
        extract_here(validate(ExtractConfig, tree, "the test"))
        stores[name] = open_store(tree["store"])
    return stores


def values(store: Store) -> np.ndarray:
    return np.concatenate([store.shard_map("blocks.1", shard) for shard in range(store.plan.shards)])


def test_stored_patches_are_the_whole_store_s_at_their_places(stores):
    whole, part = stores["all"], stores["patches"]
    assert part.plan.grid == Grid(time=4, height=1, width=5)
    assert part.plan.position_grid == whole.plan.grid == Grid(time=4, height=4, width=4)
    everything, kept = values(whole), values(part)
    assert part.ok().tolist() == whole.ok().tolist()
    assert not part.ok().all()
    for clip in np.flatnonzero(part.ok()):
        row, column = part.patch_positions(clip).T
        np.testing.assert_array_equal(kept[clip], everything[clip][:, 4 * row + column])
    assert len({tuple(patches) for patches in part.kept_patches}) > 5
    with pytest.raises(TubeletError, match="holds no activations"):
        part.patch_positions(int(np.flatnonzero(~part.ok())[0]))
    assert whole.kept_patches is None
    assert whole.patch_positions(0).tolist() == [[row, column] for row in range(4) for column in range(4)]


def test_stored_boxes_are_the_whole_store_s_means(stores):
    whole, pooled = values(stores["all"]), values(stores["pooled"])
    boxes = whole.reshape(-1, 2, 2, 2, 2, 2, 2, whole.shape[-1]).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(pooled, boxes.reshape(pooled.shape), rtol=1e-5, atol=1e-5)
    assert stores["pooled"].patch_positions(0).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize("name", ["patches", "pooled"])
def test_moments_are_of_the_tokens_that_are_stored(stores, name):
    store = stores[name]
    tokens = values(store)[store.ok()].reshape(-1, 32)
    expected, stored = Moments.of(tokens), store.moments("blocks.1")
    assert stored.count == len(tokens)
    np.testing.assert_allclose(stored.mean, expected.mean, rtol=1e-10, atol=1e-12)


def test_a_part_of_such_a_store_keeps_the_places(stores, tmp_path):
    from tubelet_store.compose import Composition, Part

    store = stores["patches"]
    clips = np.array([1, 4, 8])
    composition = Composition(str(tmp_path / "part.zarr"), [Part(store, clips)])
    list(composition.run())
    part = composition.store()
    for number, clip in enumerate(clips):
        assert part.patch_positions(number).tolist() == store.patch_positions(clip).tolist()


def test_wrong_places_are_refused(stores, tmp_path):
    from tubelet_store.clip_table import ClipOutcome
    from tubelet_store.store_writer import StoreWriter

    store = stores["patches"]
    writer = StoreWriter.begin(str(tmp_path / "s.zarr"), store.plan, store.clips(), {})
    tokens = {"blocks.1": np.zeros((4, 5, 32), np.float32)}
    for patches in (None, (0, 1, 2, 3), (0, 1, 2, 3, 3), (0, 1, 2, 3, 16), (4, 3, 2, 1, 0)):
        with writer.shard(0) as shard, pytest.raises(ValueError, match="5 of 16, ascending"):
            shard.append(ClipOutcome(status="ok", patches=patches), tokens)
