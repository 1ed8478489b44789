"""Laws of the loader."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_trainer.data import prefetcher
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.source import Source

GRID = (4, 3, 5)
TOKENS = 60
CLIPS = 11
FAILED = (2, 7)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """11 clips, two failed; channel 0 and 1 of a token carry its clip and its place within the clip."""
    x = np.zeros((CLIPS, GRID[0], GRID[1] * GRID[2], 3), dtype=np.float32)
    x[..., 0] = np.arange(CLIPS)[:, None, None]
    x[..., 1] = np.arange(TOKENS).reshape(GRID[0], -1)
    x[..., 2] = np.random.default_rng(0).standard_normal(x.shape[:3])
    plan = make_plan(clips=CLIPS, clips_per_shard=4, grid=GRID, hooks={"h": 3})
    return make_store(tmp_path_factory.mktemp("windows") / "s.zarr", plan, {"h": x}, failed=FAILED)


def loader_of(store, *, batch=16, window=130, total=None, seed=0, block_patches=5, clips=None):
    source = Source(store, "h", block_patches)
    clips = np.arange(CLIPS) if clips is None else clips
    return ActivationLoader(source, clips, batch_tokens=batch, window_tokens=window, total_tokens=total, seed=seed)


def served(loader):
    """Everything a loader serves: positions of each batch, and tokens."""
    batches = list(loader)
    return [batch.positions for batch in batches], [batch.tokens for batch in batches]


GOOD = sorted(set(range(CLIPS)) - set(FAILED))
ALL = sorted(clip * TOKENS + token for clip in GOOD for token in range(TOKENS))


@given(
    batch=st.integers(1, 700),
    window=st.integers(1, 700),
    block_patches=st.sampled_from([1, 3, 5, 15]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_every_epoch_sees_every_token_of_every_good_clip_once(store, batch, window, block_patches, seed):
    loader = loader_of(store, batch=batch, window=window, total=2 * len(ALL), seed=seed, block_patches=block_patches)
    positions = torch.cat(served(loader)[0])
    assert sorted(positions[: len(ALL)].tolist()) == ALL
    assert sorted(positions[len(ALL) :].tolist()) == ALL


@given(batch=st.integers(1, 100), window=st.integers(20, 700))
@settings(max_examples=20, deadline=None)
def test_all_batches_are_full_but_the_last(store, batch, window):
    sizes = [len(positions) for positions in served(loader_of(store, batch=batch, window=window))[0]]
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert sum(sizes) == len(ALL)
    assert len(sizes) == loader_of(store, batch=batch, window=window).steps


def test_tokens_are_the_stored_ones_at_their_positions(store):
    for batch in loader_of(store):
        assert torch.equal(batch.tokens[:, 0].long(), batch.clip)
        assert torch.equal(batch.tokens[:, 1].long(), batch.time * 15 + batch.patch)


@given(step=st.integers(0, 70), window=st.integers(20, 700), batch=st.integers(5, 40))
@settings(max_examples=30, deadline=None)
def test_resuming_gives_the_tail_of_the_full_run(store, step, window, batch):
    full = loader_of(store, batch=batch, window=window, total=1300)
    positions, tokens = served(full)
    step = min(step, full.steps)
    again = loader_of(store, batch=batch, window=window, total=1300)
    again.load_state_dict({**full.state_dict(), "step": step})
    tail_positions, tail_tokens = served(again)
    assert all(torch.equal(a, b) for a, b in zip(positions[step:], tail_positions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tokens[step:], tail_tokens, strict=True))


def test_state_taken_between_batches_names_the_next_one(store):
    loader = loader_of(store, total=1300)
    stream = iter(loader)
    for _ in range(7):
        next(stream)
    state = loader.state_dict()
    assert state["step"] == 7
    expected = next(stream)
    again = loader_of(store, total=1300)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).positions, expected.positions)


def test_the_second_window_and_the_second_epoch_are_new(store):
    loader = loader_of(store, batch=60, window=120, total=2 * len(ALL))
    positions = served(loader)[0]
    assert not set(positions[0].tolist()) & set(positions[2].tolist())
    assert positions[0].tolist() != positions[len(ALL) // 60].tolist()


def test_each_epoch_and_seed_puts_other_tokens_together(store):
    loader = loader_of(store, batch=120, window=120, total=2 * len(ALL))
    positions = served(loader)[0]
    first_windows = [positions[0], served(loader_of(store, batch=120, window=120, seed=1))[0][0]]
    first_windows.append(torch.cat(positions)[len(ALL) : len(ALL) + 120])
    sets = [frozenset(window.tolist()) for window in first_windows]
    assert len(set(sets)) == 3


def test_each_epoch_and_window_has_its_own_order_inside(store):
    whole = torch.cat(served(loader_of(store, window=len(ALL), total=2 * len(ALL)))[0])
    assert not torch.equal(whole[: len(ALL)], whole[len(ALL) :])
    thirds = torch.cat(served(loader_of(store, window=len(ALL) // 3))[0]).split(len(ALL) // 3)
    # The row of a token within its window is its rank among the window's positions, up to the order of its block.
    rows = {tuple(third.argsort().argsort().tolist()) for third in thirds}
    assert len(rows) == 3


def test_seeds_give_other_orders_and_the_same_seed_the_same(store):
    one, same, other = (served(loader_of(store, seed=seed))[0] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])


def test_a_batch_mixes_clips(store):
    mixed = [len(batch.clip.unique()) for batch in loader_of(store, batch=32, window=len(ALL))]
    assert min(mixed[:-1]) >= 5


def test_state_of_another_stream_is_refused(store):
    state = loader_of(store).state_dict()
    for other in (loader_of(store, batch=17), loader_of(store, window=250), loader_of(store, clips=np.arange(5))):
        with pytest.raises(TubeletError, match="digest"):
            other.load_state_dict(state)
    with pytest.raises(TubeletError, match="seed"):
        loader_of(store, seed=1).load_state_dict(state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_dtypes_come_out_as_the_stored_value_in_float32(tmp_path, dtype):
    store = make_store(tmp_path / "s.zarr", make_plan(clips=6, dtype=dtype, hooks={"h": 4}))
    source = Source(store)
    stored = np.concatenate([np.asarray(store.shard_map("h", s)) for s in range(store.plan.shards)])
    flat = torch.from_numpy(stored.astype(np.float32).reshape(-1, 4))
    # A list: a batch keeps its tokens when later ones are served.
    for batch in list(ActivationLoader(source, np.arange(6), batch_tokens=50, window_tokens=130)):
        assert batch.tokens.dtype == torch.float32
        assert torch.equal(batch.tokens, flat[batch.positions])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_token_is_refused_and_named(tmp_path, dtype, value):
    store = make_store(
        tmp_path / "s.zarr", make_plan(clips=6, clips_per_shard=3, dtype=dtype, hooks={"h": 4}, grid=GRID)
    )
    damage(store, clip=4, token=2 * 15 + 7, channel=3, value=value)
    loader = ActivationLoader(Source(store, "h", 5), np.arange(6), batch_tokens=64, window_tokens=100)
    with pytest.raises(TubeletError, match=r"clip 4 \(shard 1, hook h\).*time 2, patch 7, channel 3"):
        list(loader)
    assert not [thread for thread in threading.enumerate() if thread.name == "tubelet-prefetcher"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_finite_values_are_served(tmp_path, dtype):
    store = make_store(
        tmp_path / "s.zarr", make_plan(clips=6, clips_per_shard=3, dtype=dtype, hooks={"h": 4}, grid=GRID)
    )
    largest = float(torch.finfo(getattr(torch, dtype)).max)
    damage(store, clip=1, token=0, channel=0, value=largest)
    damage(store, clip=1, token=0, channel=1, value=-largest)
    batches = list(ActivationLoader(Source(store, "h", 5), np.arange(6), batch_tokens=64, window_tokens=100))
    assert max(float(batch.tokens.max()) for batch in batches) == largest


def damage(store, clip, token, channel, value):
    shard, inside = divmod(clip, store.plan.clips_per_shard)
    mapped = store.shard_map("h", shard)
    path = Path(mapped.filename)
    writable = np.memmap(path, dtype=mapped.dtype, mode="r+", shape=mapped.shape)
    writable[inside].reshape(-1, mapped.shape[-1])[token, channel] = value
    writable.flush()


def test_leaving_early_stops_the_background_thread(store):
    for batch in loader_of(store, total=10_000):
        assert len(batch) == 16
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "tubelet-prefetcher"]


def test_buffers_are_allocated_once(store):
    loader = loader_of(store, total=5 * len(ALL))
    list(loader)
    first = [buffer.host[0].data_ptr() for buffer in loader._buffers]
    loader.step = 0
    list(loader)
    assert [buffer.host[0].data_ptr() for buffer in loader._buffers] == first
    assert sum(buffer.host[0].nbytes for buffer in loader._buffers) <= 2 * 130 * 3 * 2


def test_a_batch_keeps_its_tokens_while_referenced_and_its_memory_is_reused(store):
    stream = iter(loader_of(store, total=50 * 16))
    kept = next(stream).tokens[3:5]
    before, places = kept.clone(), []
    for batch in stream:
        places.append(batch.tokens.data_ptr())
        del batch
    assert torch.equal(kept, before)
    assert kept.data_ptr() - 3 * 3 * 4 not in places
    assert len(set(places)) <= 3


def test_several_threads_copy_the_same_windows(store, monkeypatch):
    alone = served(loader_of(store, window=400))
    monkeypatch.setattr(prefetcher, "_COPIERS", 3)
    together = served(loader_of(store, window=400))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_in_the_stored_type_hold_the_same_tokens(store):
    source = Source(store, "h", 5)
    options = {"batch_tokens": 16, "window_tokens": 130}
    as_stored = ActivationLoader(source, np.arange(CLIPS), dtype=None, **options)
    for one, other in zip(as_stored, ActivationLoader(source, np.arange(CLIPS), **options), strict=True):
        assert one.tokens.dtype == torch.float16
        assert torch.equal(one.tokens.float(), other.tokens)


def test_a_last_batch_of_one_token_is_served_and_says_that_it_is_short(store):
    batches = list(loader_of(store, batch=len(ALL) - 1, window=130))
    assert [len(batch) for batch in batches] == [batch.whole for batch in batches] == [len(ALL) - 1, 1]


def test_memory_is_held_only_while_batches_are_served(store):
    loader = ActivationLoader(Source(store, "h"), np.arange(CLIPS), batch_tokens=16, window_tokens=100)
    # Two windows of at most 100 tokens, 3 channels of 2 bytes.
    assert 0 < loader.memory_bytes <= 2 * 100 * 3 * 2
    batches = iter(loader)
    next(batches)
    memory = [weakref.ref(buffer.host[0]) for buffer in loader._buffers]
    assert sum(ref().nbytes for ref in memory) == loader.memory_bytes
    list(batches)
    gc.collect()
    assert [ref() for ref in memory] == [None, None]


def test_kernel_read_ahead_changes_nothing_and_a_missing_file_is_an_error_of_the_reader(store, tmp_path):
    source = Source(store, "h", 5)
    clips, groups = np.divmod(np.arange(CLIPS * source.groups), source.groups)
    out = np.empty((len(clips), GRID[0], 5, 3), source.bits)
    source.copy_blocks(clips, groups, out)
    before = out.copy()
    source.read_ahead(clips, groups)
    source.copy_blocks(clips, groups, out)
    assert np.array_equal(out, before)
    other = make_store(tmp_path / "s.zarr", make_plan(clips=6, hooks={"h": 4}))
    Path(other.shard_map("h", 0).filename).unlink()
    with pytest.raises(TubeletError, match="is missing"):
        list(ActivationLoader(Source(other, "h"), np.arange(6), batch_tokens=50, window_tokens=130))


def test_wrong_choices_are_named(store, tmp_path):
    with pytest.raises(TubeletError, match=r"Choose one of \[1, 3, 5, 15\]"):
        Source(store, "h", 4)
    several = make_store(tmp_path / "two.zarr", make_plan(hooks={"blocks.1": 4, "blocks.3": 4}))
    with pytest.raises(TubeletError, match=r"Did you mean 'blocks\.3'"):
        Source(several, "block.3")
    with pytest.raises(TubeletError, match="--hook"):
        Source(several)
    with pytest.raises(TubeletError, match="none of the 2 chosen clips"):
        loader_of(store, clips=np.array(FAILED))
