"""The zarr data type `bfloat16`, by its zarr-extensions name, so that arrays are exchanged with tensorstore.

zarr-python has none. Registered through the entry point `zarr.data_type` when Tubelet is installed, and on import here.
NaN is written 0x7fc0, as the extension's text says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeGuard

import ml_dtypes
import numpy as np
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat):
    """bfloat16 for Zarr v3, held in memory as `ml_dtypes.bfloat16`."""

    dtype_cls = type(BFLOAT16)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ("bfloat16",)
    # ml_dtypes has native byte order only; every platform we support is little endian.
    endianness: Literal["little"] = "little"

    @property
    def item_size(self) -> int:
        """Bytes of one value."""
        return 2

    @classmethod
    def _check_native_dtype(cls, dtype: np.dtype[Any]) -> TypeGuard[Any]:
        return dtype == BFLOAT16

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """The zarr type of `ml_dtypes.bfloat16`; any other dtype is a DataTypeValidationError."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"{dtype} is not bfloat16")
        return cls()

    def to_native_dtype(self) -> Any:
        """`ml_dtypes.bfloat16` as a NumPy dtype."""
        return BFLOAT16

    def default_scalar(self) -> Any:
        """Zero."""
        return BFLOAT16.type(0)

    def to_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:  # noqa: ARG002
        """JSON of a fill value: a number, or "NaN", "Infinity", "-Infinity"."""
        value = float(data)
        if np.isnan(value):
            return "NaN"
        if np.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        return value

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> Any:  # noqa: ARG002
        """Inverse of `to_json_scalar`; also reads the extension's hexadecimal form "0x7fc0"."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.array([int(data, 16)], dtype="<u2").view(BFLOAT16)[0]
        return BFLOAT16.type(float(data))


def register() -> None:
    """Register `bfloat16` with zarr-python (safe to call again)."""
    data_type_registry.register("bfloat16", BFloat16)


register()
