"""Any Zarr v3 reader opens a store and sees the values that our memory maps hold."""

from __future__ import annotations

from pathlib import Path

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from stores import make_plan, make_store
from tubelet_store.reader import Store

FAILED, ZERO = 2, 5


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def store(request, tmp_path_factory) -> Store:
    """Ten clips in shards of four (the last is partial), one failed, one all zero, two special tokens."""
    plan = make_plan(
        hooks={"blocks.1": 8, "blocks.3": 8}, dtype=request.param, special_tokens=("cls", "register.0"), special_time=4
    )
    values = np.random.default_rng(0).standard_normal((10, 4, 15, 8), dtype=np.float32)
    values[ZERO] = 0.0
    path = tmp_path_factory.mktemp("stores") / "foreign.zarr"
    return make_store(path, plan, {"blocks.1": values, "blocks.3": -values}, failed=[FAILED])


def ours(store: Store, hook: str, kind: str = "activations") -> np.ndarray:
    return np.concatenate([np.asarray(store.shard_map(hook, s, kind)) for s in range(store.plan.shards)])


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("kind", ["activations", "special_tokens"])
@pytest.mark.parametrize("hook", ["blocks.1", "blocks.3"])
class TestEveryArray:
    def test_opens_in_zarr_python(self, store, kind, hook):
        assert_same_bits(zarr.open_group(store.url, mode="r")[f"{kind}/{hook}"][...], ours(store, hook, kind))

    def test_opens_in_dask(self, store, kind, hook):
        array = dask.array.from_zarr(store.url, component=f"{kind}/{hook}")
        assert_same_bits(array.compute(scheduler="synchronous"), ours(store, hook, kind))

    def test_opens_in_tensorstore(self, store, kind, hook):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.url}/{kind}/{hook}/"}}
        array = tensorstore.open(spec, read=True).result()
        assert array.domain.labels == (("clip", "time", "space" if kind == "activations" else "token", "channel"))
        assert_same_bits(array.read().result(), ours(store, hook, kind))
        assert_same_bits(array[7].read().result(), ours(store, hook, kind)[7])

    def test_opens_in_xarray(self, store, kind, hook):
        for group in (
            xarray.open_zarr(store.url, group=kind, consolidated=False, chunks=None),
            xarray.open_dataset(store.url, engine="zarr", group=kind, consolidated=False),
        ):
            assert group[hook].dims == ("clip", "time", "space" if kind == "activations" else "token", "channel")
            assert_same_bits(group[hook].values, ours(store, hook, kind))


def test_a_failed_clip_is_nan_everywhere_and_a_zero_clip_stays_zero(store):
    for kind in ("activations", "special_tokens"):
        values = zarr.open_group(store.url, mode="r")[f"{kind}/blocks.1"][...].astype(np.float32)
        assert np.isnan(values[FAILED]).all()
        assert np.isfinite(np.delete(values, FAILED, axis=0)).all()
    assert not zarr.open_group(store.url, mode="r")["activations/blocks.1"][ZERO].any()
    assert store.ok().tolist() == [clip != FAILED for clip in range(10)]


def test_moments_open_in_zarr_python(store):
    group = zarr.open_group(store.url, mode="r")["moments/blocks.1"]
    moments = store.moments("blocks.1")
    assert int(group["count"][()]) == moments.count == 9 * store.plan.grid.tokens
    np.testing.assert_array_equal(group["mean"][...], moments.mean)
    np.testing.assert_allclose(group["covariance"][...], moments.covariance, rtol=1e-15)


def test_the_activations_are_what_was_appended(tmp_path):
    values = np.random.default_rng(1).standard_normal((10, 4, 15, 8), dtype=np.float32)
    store = make_store(tmp_path / "s.zarr", make_plan(), {"blocks.1": values})
    assert_same_bits(zarr.open_group(store.url, mode="r")["activations/blocks.1"][...], values.astype(np.float16))
    assert Path(store.url, "activations/blocks.1/c/2/0/0/0").stat().st_size == 2 * 4 * 15 * 8 * 2 + 16 * 4 + 4
