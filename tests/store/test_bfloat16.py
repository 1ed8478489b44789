"""bfloat16 travels between tensorstore and zarr-python bit by bit, both ways."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tubelet_store.bfloat16 import BFLOAT16, BFloat16

# Every pattern there is: zeros, subnormals, both infinities, every NaN payload.
EVERY_VALUE = np.arange(2**16, dtype=np.uint32).astype(np.uint16).reshape(64, 1024)


def bits(values: np.ndarray) -> np.ndarray:
    assert values.dtype == BFLOAT16
    return np.ascontiguousarray(values).view(np.uint16)


@pytest.mark.parametrize("sharded", [False, True])
def test_zarr_python_reads_what_tensorstore_wrote(tmp_path, sharded):
    chunk = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [16, 1024]}}}
    if sharded:
        inner = {"chunk_shape": [4, 1024], "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}
        chunk["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
    metadata = {"data_type": "bfloat16", "shape": [64, 1024], "fill_value": "NaN", **chunk}
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}, "metadata": metadata}
    tensorstore.open(spec, create=True).result().write(EVERY_VALUE.view(BFLOAT16)).result()
    np.testing.assert_array_equal(bits(zarr.open_array(tmp_path / "a", mode="r")[...]), EVERY_VALUE)


@pytest.mark.parametrize("shards", [None, (16, 1024)])
def test_tensorstore_reads_what_zarr_python_wrote(tmp_path, shards):
    array = zarr.create_array(
        tmp_path / "a", shape=(64, 1024), chunks=(4, 1024), shards=shards, dtype=BFLOAT16, fill_value=float("nan")
    )
    array[...] = EVERY_VALUE.view(BFLOAT16)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
    np.testing.assert_array_equal(bits(tensorstore.open(spec).result().read().result()), EVERY_VALUE)


@given(st.integers(0, 2**16 - 1))
def test_a_fill_value_survives_json(pattern):
    value = np.array([pattern], dtype=np.uint16).view(BFLOAT16)[0]
    kind = BFloat16()
    back = kind.from_json_scalar(kind.to_json_scalar(value, zarr_format=3), zarr_format=3)
    assert back == value or (np.isnan(float(back)) and np.isnan(float(value)))


def test_the_hexadecimal_fill_value_of_the_specification_is_read():
    assert np.isnan(float(BFloat16().from_json_scalar("0x7fc0", zarr_format=3)))
    assert float(BFloat16().from_json_scalar("0x3f80", zarr_format=3)) == 1.0


def test_nan_is_the_quiet_nan_of_the_specification():
    assert np.full(1, np.nan, dtype=ml_dtypes.bfloat16).view(np.uint16)[0] == 0x7FC0
