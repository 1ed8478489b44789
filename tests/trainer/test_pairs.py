"""Laws of pair batches, mixtures, several hooks and ranks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import make_plan, make_store, planned_table
from tubelet.errors import TubeletError
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.moments import Moments
from tubelet_store.plan import Grid, TokenSelection
from tubelet_store.reader import open_store
from tubelet_store.store_writer import StoreWriter
from tubelet_trainer.config import PairsConfig
from tubelet_trainer.data.clip_mixing import measure_mixing
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.mixture import Mixture, mixed_moments
from tubelet_trainer.data.pairs import PairDraw, fresh_steps, neighbor_table
from tubelet_trainer.data.source import Source

TIME, HEIGHT, WIDTH = GRID = (4, 3, 5)
SPACE = HEIGHT * WIDTH
CLIPS = 12
FAILED = (2, 7)
# Clip 4 has three good frames of eight, clip 5 six: two frames make a latent step.
PADDED = {4: 5, 5: 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Channel 0, 1, 2 of a token: its clip, time, patch. Two hooks, the second with the values negated."""
    x = np.zeros((CLIPS, TIME, SPACE, 3), dtype=np.float32)
    x[..., 0] = np.arange(CLIPS)[:, None, None]
    x[..., 1] = np.arange(TIME)[:, None]
    x[..., 2] = np.arange(SPACE)
    plan = make_plan(clips=CLIPS, clips_per_shard=5, grid=GRID, hooks={"h": 3, "g": 3})
    path = tmp_path_factory.mktemp("pairs") / "s.zarr"
    writer = StoreWriter.begin(str(path), plan, planned_table(CLIPS), {})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                if clip in FAILED:
                    shard_writer.append(ClipOutcome.failure("open_failed", "broken on purpose"))
                    continue
                padded = PADDED.get(clip, 0)
                frames = [min(frame, 2 * TIME - padded - 1) for frame in range(2 * TIME)]
                outcome = ClipOutcome(status="ok", frame_indices=tuple(frames), padded_frames=padded)
                shard_writer.append(outcome, {"h": x[clip], "g": -x[clip]})
            shard_writer.commit()
    writer.finish()
    return open_store(str(path))


def windows(store, *, hooks=("h",), draw=None, seed=0, batch=64, total=None, **options):
    sources = [Source(store, hook, SPACE) for hook in hooks]
    return ActivationLoader(
        sources, np.arange(store.plan.clips), batch_tokens=batch, window_tokens=400, seed=seed, pairs=draw,
        total_tokens=total, **options,
    )  # fmt: skip


def place(positions):
    clip, inside = np.divmod(positions.numpy(), TIME * SPACE)
    return clip, *np.divmod(inside, SPACE)


@given(
    seed=st.integers(0, 99), delta=st.integers(1, 3), neighbors=st.sampled_from([4, 8, "random"]),
    anchors=st.integers(2, 80),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_pairs_are_the_neighbors_and_nothing_else(store, seed, delta, neighbors, anchors):
    config = PairsConfig(max_delta=delta, neighbors=neighbors, anchors=anchors)
    fresh = fresh_steps(store)
    for batch in windows(store, draw=PairDraw(config, temporal=True, spatial=True), seed=seed):
        for pairs, kind in ((batch.temporal, "t"), (batch.spatial, "s")):
            assert len(pairs) == min(anchors, len(batch))
            clip, time, patch = place(batch.positions[pairs.rows])
            clip2, time2, patch2 = place(pairs.positions)
            # The tokens are those of the positions.
            expected = np.stack([clip2, time2, patch2], axis=1)
            assert np.array_equal(pairs.hooks["h"].numpy(), expected)
            assert np.array_equal(clip, clip2)
            assert not set(clip) & set(FAILED)
            valid = pairs.valid.numpy()
            assert np.all(fresh[clip, time][valid])
            assert np.all(fresh[clip2, time2][valid])
            if kind == "t":
                assert np.array_equal(patch, patch2)
                assert np.all((time2 - time)[valid] >= 1)
                assert np.all((time2 - time)[valid] <= delta)
                inside = time + delta < TIME
                whole = ~np.isin(clip, list(PADDED))
                assert np.all(valid[inside & whole])
                continue
            assert np.array_equal(time, time2)
            dy, dx = np.abs(patch // WIDTH - patch2 // WIDTH), np.abs(patch % WIDTH - patch2 % WIDTH)
            assert np.all(patch != patch2)
            assert neighbors == "random" or np.all(np.maximum(dy, dx) == 1)
            assert neighbors != 4 or np.all(dy + dx == 1)
            assert np.array_equal(valid, fresh[clip, time])


def test_steps_of_repeated_frames_are_found(store):
    fresh = fresh_steps(store)
    assert fresh[4].tolist() == [True, False, False, False]
    assert fresh[5].tolist() == [True, True, True, False]
    assert fresh[[0, 1, 3, 6]].all()


def test_neighbors_are_drawn_evenly():
    for kind, most in ((4, 4), (8, 8), ("random", 14)):
        table, counts = neighbor_table(Grid(time=1, height=HEIGHT, width=WIDTH), kind)
        assert counts.max() == most
        assert counts[0] == {4: 2, 8: 3, "random": 14}[kind]
        assert all(len(set(row[:count])) == count for row, count in zip(table.tolist(), counts, strict=True))


def test_every_pair_of_the_set_comes_up(store):
    config = PairsConfig(max_delta=2, neighbors=8, anchors=64)
    draw = PairDraw(config, temporal=True, spatial=True)
    deltas, offsets = [], []
    for batch in windows(store, draw=draw, total=6000):
        _, time, patch = place(batch.positions[batch.temporal.rows])
        _, time2, _ = place(batch.temporal.positions)
        deltas += (time2 - time)[batch.temporal.valid.numpy() & (time < 2)].tolist()
        _, _, patch2 = place(batch.spatial.positions)
        inner = np.isin(patch, [6, 7, 8])
        offsets += (patch2 - patch)[inner].tolist()
    assert abs(np.mean(np.array(deltas) == 1) - 0.5) < 0.05
    shares = np.unique(offsets, return_counts=True)[1] / len(offsets)
    assert len(shares) == 8
    assert np.all(np.abs(shares - 1 / 8) < 0.04)


def test_drawing_pairs_changes_no_batch_and_resuming_gives_the_same_pairs(store):
    draw = PairDraw(PairsConfig(anchors=20), temporal=True, spatial=True)
    plain, paired = list(windows(store, total=900)), list(windows(store, draw=draw, total=900))
    assert all(torch.equal(a.positions, b.positions) for a, b in zip(plain, paired, strict=True))
    again = windows(store, draw=draw, total=900)
    again.step = 5
    for one, other in zip(paired[5:], again, strict=True):
        assert torch.equal(one.spatial.positions, other.spatial.positions)
        assert torch.equal(one.temporal.hooks["h"], other.temporal.hooks["h"])


def test_impossible_pairs_are_named(store, tmp_path):
    def loader(config, block_patches=SPACE, clips=CLIPS, **kinds):
        draw = PairDraw(PairsConfig(**config), **{"temporal": False, "spatial": False, **kinds})
        return ActivationLoader(
            Source(store, "h", block_patches), np.arange(clips), batch_tokens=8, window_tokens=99, pairs=draw
        )

    with pytest.raises(TubeletError, match=r"max_delta 4 does not fit the 4 latent steps"):
        loader({"max_delta": 4}, temporal=True)
    with pytest.raises(TubeletError, match="whole frames"):
        loader({}, block_patches=5, spatial=True)
    with pytest.raises(TubeletError, match="at least two clips"):
        loader({}, clips=1, temporal=True)
    loader({}, block_patches=5, temporal=True)


@given(ranks=st.integers(1, 5), batch=st.integers(5, 70), step=st.integers(0, 9), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_ranks_hold_strided_parts_of_the_same_batches_and_pairs(store, ranks, batch, step, seed):
    draw = PairDraw(PairsConfig(anchors=17), temporal=True, spatial=True)
    whole = windows(store, batch=batch, draw=draw, seed=seed)
    step = whole.step = min(step, whole.steps - 1)
    parts = [windows(store, batch=batch, draw=draw, seed=seed, rank=rank, ranks=ranks) for rank in range(ranks)]
    for part in parts:
        part.load_state_dict({**whole.state_dict(), "step": step})
    streams = [list(part) for part in parts]
    expected = list(whole)
    assert {len(stream) for stream in streams} == {len(expected)}
    for number, batch_ in enumerate(expected):
        assert batch_.whole == len(batch_)
        found = [torch.full((1,), -1).new_empty(len(batch_)) for _ in range(2)]
        for rank in range(ranks):
            mine = streams[rank][number]
            assert mine.whole == len(batch_)
            found[0][rank::ranks] = mine.positions
            assert torch.equal(mine.tokens, batch_.tokens[rank::ranks])
            anchors = batch_.temporal.rows[rank::ranks]
            assert torch.equal(batch_.positions[anchors], mine.positions[mine.temporal.rows])
            assert torch.equal(batch_.spatial.positions[rank::ranks], mine.spatial.positions)
            assert torch.equal(batch_.temporal.valid[rank::ranks], mine.temporal.valid)
            assert len(mine.temporal) <= mine.temporal.most
        assert torch.equal(found[0], batch_.positions)


def test_hooks_of_one_batch_are_of_the_same_tokens(store):
    draw = PairDraw(PairsConfig(anchors=9), temporal=True, spatial=False)
    one = list(windows(store, hooks=("g",), draw=draw))
    for both, alone in zip(windows(store, hooks=("h", "g"), draw=draw), one, strict=True):
        assert list(both.hooks) == ["h", "g"]
        assert torch.equal(both.hooks["h"], -both.hooks["g"])
        assert torch.equal(both.hooks["g"], alone.hooks["g"])
        assert torch.equal(both.temporal.hooks["h"], -both.temporal.hooks["g"])


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    plan = make_plan(clips=9, clips_per_shard=4, grid=GRID, hooks={"h": 3})
    return make_store(tmp_path_factory.mktemp("mix") / "a.zarr", plan, seed=1)


def mixture(store, others, share=Fraction(1, 4), batch=64, total=3000, **options):
    loaders = [
        windows(store, batch=batch, total=total, share=(Fraction(0), 1 - share), **options),
        windows(others, batch=batch, total=total, share=(1 - share, Fraction(1)), clip_offset=CLIPS, **options),
    ]
    return Mixture(loaders)


@given(share=st.fractions(Fraction(1, 50), Fraction(49, 50)), batch=st.integers(2, 90))
@settings(max_examples=10, deadline=None)
def test_a_mixture_keeps_its_shares_exactly(store, others, share, batch):
    loader = mixture(store, others, share, batch)
    first = 0
    for number, served in enumerate(loader, 1):
        first += int((served.clip < CLIPS).sum())
        tokens = min(number * batch, 3000)
        assert len(served) == served.whole == tokens - (number - 1) * batch
        assert abs(first - float((1 - share) * tokens)) < 1
    assert loader.step == loader.steps == number


def test_each_store_of_a_mixture_repeats_by_itself(store, others):
    loader = mixture(store, others)
    positions = torch.cat([batch.positions for batch in loader])
    mine, theirs = positions[positions < CLIPS * TIME * SPACE], positions[positions >= CLIPS * TIME * SPACE]
    assert len(mine.unique()) == 10 * TIME * SPACE
    assert len(theirs.unique()) == 9 * TIME * SPACE
    assert len(theirs[: 9 * TIME * SPACE].unique()) == 9 * TIME * SPACE


def test_a_mixture_resumes_and_is_shared_by_ranks(store, others):
    draw = PairDraw(PairsConfig(anchors=21), temporal=True, spatial=True)
    whole = list(mixture(store, others, draw=draw))
    again = mixture(store, others, draw=draw)
    again.load_state_dict({**again.state_dict(), "step": 11})
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[11:], again, strict=True))
    parts = [list(mixture(store, others, draw=draw, rank=rank, ranks=3)) for rank in range(3)]
    for number, batch in enumerate(whole):
        for rank in range(3):
            mine = parts[rank][number]
            assert torch.equal(mine.positions, batch.positions[rank::3])
            assert torch.equal(mine.tokens, batch.tokens[rank::3])
        anchors = torch.cat([parts[rank][number].positions[parts[rank][number].temporal.rows] for rank in range(3)])
        assert torch.equal(anchors.sort().values, batch.positions[batch.temporal.rows].sort().values)
    state = mixture(store, others, batch=63).state_dict()
    with pytest.raises(TubeletError, match="digest"):
        again.load_state_dict(state)


def test_moments_of_a_mixture_are_those_of_its_tokens():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 4)) + 3, 2 * rng.standard_normal((1200, 4)) - 1
    mixed = mixed_moments([Moments.of(a), Moments.of(b)], [0.5, 0.5])
    expected = Moments.of(np.concatenate([a, a, a, a, b]))
    np.testing.assert_allclose(mixed.mean, expected.mean)
    np.testing.assert_allclose(mixed.covariance, expected.covariance)
    assert mixed.norm_mean == pytest.approx(expected.norm_mean)


def test_clips_of_a_batch_are_known_without_reading(store, others):
    for loader in (windows(store, total=2000), mixture(store, others)):
        known = [loader.clips_of(step) for step in range(loader.steps)]
        for batch, clips in zip(loader, known, strict=True):
            assert np.array_equal(batch.clip.numpy(), clips)


def test_mixing_is_measured_against_independent_draws(tmp_path):
    plan = make_plan(clips=400, clips_per_shard=100, grid=(2, 2, 2), hooks={"h": 2})
    store = make_store(tmp_path / "s.zarr", plan)

    def mixing(window_tokens):
        loader = ActivationLoader(Source(store, "h"), np.arange(400), batch_tokens=256, window_tokens=window_tokens)
        return measure_mixing(loader)

    good, poor = mixing(3200), mixing(64)
    # 256 draws from 400 clips hit 400 (1 - (1 - 1/400)^256) of them.
    assert good.clips_iid == pytest.approx(400 * (1 - (1 - 1 / 400) ** 256), rel=0.03)
    assert good.clips == pytest.approx(good.clips_iid, rel=0.05)
    assert good.entropy == pytest.approx(good.entropy_iid, rel=0.02)
    assert poor.clips == pytest.approx(256 / 8, rel=0.1)
    assert poor.entropy == pytest.approx(np.log(32), rel=0.05)
    assert "clips" in str(poor)


@pytest.mark.parametrize("neighbors", [4, 8])
def test_of_a_store_that_keeps_some_patches_pairs_are_true_neighbors(tmp_path, neighbors):
    whole, keep = Grid(time=TIME, height=HEIGHT, width=WIDTH), 6
    plan = make_plan(
        clips=8, clips_per_shard=3, grid=(TIME, 1, keep), hooks={"h": 2},
        tokens=TokenSelection(kind="patches", grid=whole, seed=0),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    kept = [np.sort(rng.choice(SPACE, keep, replace=False)) for _ in range(8)]
    kept[5] = np.array([0, 2, 4, 6, 8, 10])  # with 4 neighbors no patch has one
    writer = StoreWriter.begin(str(tmp_path / "s.zarr"), plan, planned_table(8), {})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                outcome = ClipOutcome(
                    status="ok", frame_indices=tuple(range(2 * TIME)), padded_frames=0, patches=tuple(kept[clip])
                )
                shard_writer.append(outcome, {"h": np.zeros((TIME, keep, 2), np.float32)})
            shard_writer.commit()
    writer.finish()
    store = open_store(str(tmp_path / "s.zarr"))

    reach, seen = (1 if neighbors == 4 else 2), 0
    draw = PairDraw(PairsConfig(neighbors=neighbors, anchors=64), temporal=False, spatial=True)
    source = Source(store, "h", keep)
    for batch in ActivationLoader(
        source, np.arange(8), batch_tokens=64, window_tokens=400, pairs=draw, total_tokens=3000
    ):
        pairs = batch.spatial
        for anchor, other, valid in zip(
            batch.positions[pairs.rows].tolist(),
            pairs.positions.tolist(),
            pairs.valid.tolist(),
            strict=True,
        ):
            (c, p), (d, q) = ((x // (TIME * keep), x % keep) for x in (anchor, other))
            assert c == d
            steps = np.abs(store.patch_positions(c) - store.patch_positions(c)[p])
            near = (steps.max(axis=1) == 1) & (steps.sum(axis=1) <= reach)
            assert valid == near.any()
            assert near[q] if valid else p == q
            seen += valid
    assert seen
    np.testing.assert_array_equal(store.patch_positions(5), [divmod(n, WIDTH) for n in kept[5]])
