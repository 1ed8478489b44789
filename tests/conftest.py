"""Makes the helpers beside it (`barcode`, `families`, `stores`) importable, and renders the barcode clips once."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]

# Read when Triton is first imported, by whichever test that is. With a GPU the kernels are compiled and run there.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REAL_VIDEOS = Path(__file__).parents[2] / "shared" / "videos"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not REAL_VIDEOS.is_dir():
        for item in items:
            if "real_videos" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{REAL_VIDEOS} is not there"))


@pytest.fixture(scope="session")
def barcode_clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every clip of `barcode.CLIPS`, by name."""
    from barcode import CLIPS, filename, make_clip

    folder = tmp_path_factory.mktemp("barcode")
    return {name: make_clip(folder / filename(name), spec) for name, spec in CLIPS.items()}


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """Folder with `sound/` and `broken/`; for tests marked `real_videos`."""
    return REAL_VIDEOS
