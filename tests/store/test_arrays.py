"""A store's lazy array is the NumPy array of all its clips, however it is asked."""

from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.reader import Store, open_store
from tubelet_store.transfer import StoreCopy

CLIPS = 11


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def store(request, tmp_path_factory) -> Store:
    plan = make_plan(clips=CLIPS, grid=(2, 2, 3), hooks={"blocks.1": 4}, dtype=request.param, special_tokens=("cls",))
    return make_store(tmp_path_factory.mktemp("s") / "s.zarr", plan, failed=[4])


@pytest.fixture(scope="module")
def whole(store) -> np.ndarray:
    return np.concatenate([store.shard_map("blocks.1", shard) for shard in range(store.plan.shards)])


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    bits = f"u{expected.dtype.itemsize}"
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and np.array_equal(np.ascontiguousarray(found).view(bits), np.ascontiguousarray(expected).view(bits))
    )


keys = st.one_of(
    st.integers(-CLIPS, CLIPS - 1),
    st.slices(CLIPS),
    st.lists(st.integers(-CLIPS, CLIPS - 1), max_size=6).map(lambda clips: np.array(clips, dtype=int)),
    st.lists(st.booleans(), min_size=CLIPS, max_size=CLIPS).map(np.array),
)
inner = st.tuples(st.one_of(st.integers(0, 1), st.slices(2)), st.one_of(st.integers(0, 5), st.slices(6)))


@settings(max_examples=60, deadline=None)
@given(key=keys, more=st.one_of(st.just(()), inner))
def test_it_indexes_like_numpy(store, whole, key, more):
    assert same(store["blocks.1"][(key, *more)], whole[(key, *more)])


def test_it_looks_like_an_array(store, whole):
    array = store["blocks.1"]
    assert (array.shape, array.ndim, len(array), array.size) == (whole.shape, 4, CLIPS, whole.size)
    assert array.nbytes == whole.nbytes
    assert same(array[...], whole)
    assert same(array[..., 1], whole[..., 1])
    assert same(np.asarray(array), whole)
    for text in (repr(array), array._repr_html_(), repr(store), store._repr_html_()):
        assert "blocks.1" in text
    for bad in (CLIPS, -CLIPS - 1, [CLIPS], [True], "x", 1.5, None):
        with pytest.raises(IndexError):
            array[bad]
    with pytest.raises(TubeletError, match=r"no hook 'blocks.2'"):
        store["blocks.2"]
    assert store.special_tokens("blocks.1")[:].shape == (CLIPS, 1, 1, 4)


def test_hooks_length_and_shapes_of_a_store(store, whole):
    assert store.hooks == tuple(store) == tuple(hook.name for hook in store.plan.hooks)
    assert len(store) == CLIPS
    assert store.shape("blocks.1") == store["blocks.1"].shape == whole.shape
    with pytest.raises(TubeletError, match=r"no hook 'blocks.2'"):
        store.shape("blocks.2")


def test_torch_over_all_shards_is_a_copy_of_every_clip(store, whole):
    tensor = store["blocks.1"].torch()
    assert (tensor.dtype, tensor.shape) == (getattr(torch, store.plan.dtype), whole.shape)
    bits = tensor.view(torch.int16 if whole.dtype.itemsize == 2 else torch.int32)
    assert np.array_equal(bits.numpy(), whole.view(bits.numpy().dtype))
    bits.zero_()
    assert same(store["blocks.1"][:], whole)


def test_torch_over_all_shards_takes_at_most_half_of_the_available_memory(store, monkeypatch):
    array = store["blocks.1"]
    monkeypatch.setattr("tubelet_store.hook_array.available_memory", lambda: 2 * array.nbytes)
    assert array.torch().shape == array.shape
    monkeypatch.setattr("tubelet_store.hook_array.available_memory", lambda: 2 * array.nbytes - 2)
    with pytest.raises(TubeletError, match=r"more than half.*dask\(\)"):
        array.torch()
    assert len(array.torch(0)) == 4


def test_torch_sees_the_same_bits(store, whole):
    tensor = store["blocks.1"].torch(1)
    assert tensor.dtype == getattr(torch, store.plan.dtype)
    bits = tensor.view(torch.int16 if whole.dtype.itemsize == 2 else torch.int32).numpy()
    assert np.array_equal(bits, whole[4:8].view(bits.dtype))


def test_dask_and_xarray_are_lazy_and_the_same(store, whole):
    pytest.importorskip("dask")
    pytest.importorskip("xarray")
    lazy = store["blocks.1"].dask()
    assert lazy.chunks[0] == (4, 4, 3)
    assert same(lazy[2:9, 1].compute(scheduler="synchronous"), whole[2:9, 1])
    labeled_clips = store["blocks.1"].xarray()
    assert labeled_clips.dims == ("clip", "time", "space", "channel")
    assert labeled_clips.video_id.values[3] == "video-0003"
    assert same(labeled_clips[5].values, whole[5])


def test_the_clip_table_is_pandas_where_that_is_installed(store):
    pytest.importorskip("pandas")
    assert list(store.clips().to_pandas()["status"]).count("failed") == 1


def test_it_travels_as_a_place(store, whole):
    traveled = pickle.dumps(store["blocks.1"])
    assert len(traveled) < 1000
    assert same(pickle.loads(traveled)[3], whole[3])


def test_a_remote_store_gives_the_same(store, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path))
    url = f"memory://{uuid.uuid4().hex}/s.zarr"
    for _ in StoreCopy(store, url).run():
        pass
    array = open_store(url)["blocks.1"]
    assert same(array[[1, 9, 4]], whole[[1, 9, 4]])
    assert array.torch(2).shape == (3, 2, 6, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_tensors_of_a_local_and_of_a_cached_store_are_the_mapped_files(tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    local = make_store(tmp_path / "s.zarr", make_plan(grid=(2, 2, 3), hooks={"blocks.1": 4}, dtype=dtype))
    remote = f"memory://{uuid.uuid4().hex}/s.zarr"
    assert main(["copy", local.url, remote]) == 0
    for store in (local, open_store(remote)):
        tensor = store["blocks.1"].torch(0)
        assert tensor.dtype == getattr(torch, dtype)
        # The address is in a mapping of a file, not in memory that something was copied to.
        assert mapped_file(tensor.data_ptr()).endswith(("c/0/0/0/0", store.shard_object("blocks.1", 0).stored.sha256))
        view = store.shard_map("blocks.1", 0, private=True)
        bits = torch.from_numpy(view.view(np.int16)).view(getattr(torch, dtype))
        assert bits.data_ptr() == view.ctypes.data
        assert np.shares_memory(view, bits.view(torch.int16).numpy())
        assert torch.equal(bits.view(torch.int16), tensor.view(torch.int16))


def mapped_file(address: int) -> str:
    """Path of the file that is mapped at `address` of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line.partition("/")[2]
    return ""
