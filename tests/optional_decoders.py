"""Which decoders can run here."""

from __future__ import annotations

import importlib

import pytest


def missing_torchcodec() -> str | None:
    """Why torchcodec cannot be tested here; None: it can."""
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torchcodec or FFmpeg's shared libraries are not installed: {str(error).splitlines()[0]}"
    return None


_REASON = missing_torchcodec()
NEEDS_TORCHCODEC = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")
TORCHCODEC = pytest.param("torchcodec", marks=NEEDS_TORCHCODEC)
"""A value of `decode.backend`, for parametrize."""
