"""Moments do not depend on how the tokens were cut, and are those of the stored arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import make_plan, make_store
from tubelet_store import moments
from tubelet_store.format import moments_documents, read_moments
from tubelet_store.moments import Moments


def tokens(count: int, channels: int, seed: int, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.01, 30.0, channels)
    return rng.standard_normal((count, channels)) * scale + offset


def cut(values: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    return np.split(values, sorted(cuts))


def assert_close(a: Moments, b: Moments, tolerance: float = 1e-9) -> None:
    assert a.count == b.count
    assert a.nonfinite == b.nonfinite
    np.testing.assert_array_equal(a.absmax, b.absmax)
    np.testing.assert_array_equal(a.norm_histogram, b.norm_histogram)
    np.testing.assert_allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(a.variance, b.variance, rtol=tolerance, atol=tolerance)
    assert a.norm_sum == pytest.approx(b.norm_sum, rel=1e-12)
    if a.covariance is not None:
        np.testing.assert_allclose(a.covariance, b.covariance, rtol=tolerance, atol=tolerance * a.total_variance)


@given(
    count=st.integers(1, 60),
    channels=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    offset=st.sampled_from([0.0, 1.0, -300.0]),
    data=st.data(),
)
def test_merging_any_partition_equals_one_pass_in_float64(count, channels, seed, offset, data):
    values = tokens(count, channels, seed, offset)
    cuts = data.draw(st.lists(st.integers(0, count), max_size=6))
    merged = Moments.empty(channels)
    for part in cut(values, cuts):
        merged = merged.merge(Moments.of(part))
    assert merged.count == count
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(merged.variance, values.var(axis=0), rtol=1e-9, atol=1e-9)
    covariance = np.cov(values, rowvar=False, bias=True).reshape(channels, channels)
    np.testing.assert_allclose(merged.covariance, covariance, rtol=1e-9, atol=1e-9 * (1 + merged.total_variance))
    np.testing.assert_array_equal(merged.absmax, np.abs(values).max(axis=0))
    assert merged.norm_mean == pytest.approx(np.linalg.norm(values, axis=1).mean(), rel=1e-12)
    assert merged.total_variance == pytest.approx(((values - values.mean(0)) ** 2).sum(1).mean(), rel=1e-9, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20), st.integers(1, 20))
def test_merge_is_associative_and_commutative_within_rounding(seed, first, second, third):
    a, b, c = (Moments.of(part) for part in cut(tokens(first + second + third, 3, seed), [first, first + second]))
    assert_close(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert_close(a.merge(b), b.merge(a))


def test_merging_in_the_same_order_is_bitwise_repeatable():
    parts = [Moments.of(part) for part in cut(tokens(90, 5, 0), [10, 11, 50])]

    def merged() -> bytes:
        total = Moments.empty(5)
        for part in parts:
            total = total.merge(part)
        return b"".join(np.asarray(array).tobytes() for array in total.arrays().values())

    assert merged() == merged()


@pytest.mark.parametrize("batch", [1, 100])
def test_the_spread_within_batches_is_counted(batch):
    """Welford over batch means alone gives std / sqrt(batch): 0.3 of 3.0 here."""
    values = np.random.default_rng(0).standard_normal((10_000, 2)) * 3.0
    merged = Moments.empty(2)
    for part in np.split(values, len(values) // batch):
        merged = merged.merge(Moments.of(part))
    np.testing.assert_allclose(np.sqrt(merged.variance), 3.0, rtol=0.03)
    np.testing.assert_allclose(merged.variance, values.var(axis=0), rtol=1e-10)


def test_a_large_offset_does_not_eat_the_variance():
    values = np.random.default_rng(0).standard_normal((1000, 3)) + 1e7
    merged = Moments.of(values[:500]).merge(Moments.of(values[500:]))
    np.testing.assert_allclose(merged.variance, values.var(axis=0), rtol=1e-6)


@settings(max_examples=50)
@given(
    norms=st.lists(st.floats(2.0**-15, 2.0**19), min_size=1, max_size=50),
    level=st.floats(0, 1),
)
def test_a_quantile_is_right_to_one_bin(norms, level):
    values = np.array(norms)[:, None]
    exact = np.quantile(values, level, method="inverted_cdf")
    assert abs(np.log2(Moments.of(values).norm_quantile(level) / exact)) <= 1 / 32 + 1e-9


def test_norms_outside_the_bins_fall_into_the_outermost():
    of = Moments.of(np.array([[0.0], [1e-30], [1e30]]))
    assert of.norm_histogram[0] == 2
    assert of.norm_histogram[-1] == 1
    assert of.norm_histogram.sum() == 3


def test_no_tokens_are_neutral():
    some, none = Moments.of(tokens(7, 3, 0)), Moments.empty(3)
    for merged in (some.merge(none), none.merge(some)):
        assert_close(merged, some, tolerance=0)
    assert none.merge(none).count == 0
    assert np.isnan(none.norm_quantile(0.5))
    assert none.norm_mean == 0.0
    assert none.total_variance == 0.0
    assert Moments.of(np.empty((0, 3))).count == 0
    counted = Moments.empty(3, nonfinite=2).merge(Moments.empty(3, nonfinite=3))
    assert counted.merge(some).nonfinite == some.merge(counted).nonfinite == 5


def test_above_a_width_the_diagonal_alone_is_kept():
    width = moments.COVARIANCE_MAX_CHANNELS
    at, above = tokens(5, width, 0), tokens(5, width + 1, 0)
    assert Moments.of(at).covariance is not None
    wide = Moments.of(above[:2]).merge(Moments.of(above[2:])).merge(Moments.empty(width + 1))
    assert wide.covariance is None
    assert "covariance" not in wide.arrays()
    np.testing.assert_allclose(wide.variance, above.var(axis=0), rtol=1e-10)
    assert_close(read_moments(moments_documents({"blocks.0": wide}), "blocks.0"), wide)


@given(st.integers(0, 40), st.integers(0, 10**6))
@settings(deadline=None)
def test_storing_keeps_them(count, seed):
    of = Moments.of(tokens(count, 3, seed)).merge(Moments.empty(3, nonfinite=4))
    assert_close(Moments.from_arrays(of.arrays()), of, tolerance=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_store_holds_the_moments_of_its_arrays(tmp_path, dtype):
    plan = make_plan(dtype=dtype, hooks={"blocks.1": 8, "blocks.3": 5}, special_tokens=("cls",))
    store = make_store(tmp_path / "s.zarr", plan, failed=[0, 6])
    for hook in plan.hooks:
        arrays = np.concatenate([store.shard_map(hook.name, s).astype(np.float64) for s in range(plan.shards)])
        stored = arrays[store.ok()].reshape(-1, hook.channels)
        assert len(stored) == 8 * plan.grid.tokens
        assert_close(store.moments(hook.name), Moments.of(stored), tolerance=1e-12)


def test_a_store_of_failed_clips_alone_has_moments_of_nothing(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_plan(clips=3), failed=[0, 1, 2])
    assert store.moments("blocks.1").count == 0
    assert not store.ok().any()


def test_a_missing_value_is_no_zero(tmp_path):
    from tubelet.errors import TubeletError
    from tubelet_store.reader import open_store

    make_store(tmp_path / "s.zarr")
    (tmp_path / "s.zarr/moments/blocks.1/mean/c/0").unlink()
    with pytest.raises(TubeletError, match=r"moments/blocks.1 is damaged: .*mean/c/0 is missing"):
        open_store(str(tmp_path / "s.zarr")).moments("blocks.1")
