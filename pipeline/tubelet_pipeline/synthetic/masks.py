"""Ground-truth masks on disk: `masks/ID.npz`, one compressed array named "masks" per video, no pickle in it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tubelet.errors import TubeletError

FOLDER = "masks"


def mask_path(root: Path, video_id: str) -> Path:
    """Where the masks of `video_id` lie in the data set at `root`."""
    return root / FOLDER / f"{video_id}.npz"


def write_masks(root: Path, video_id: str, masks_THW: NDArray[np.uint8]) -> None:
    """Write the masks of one video; the file gets its name only when it is complete."""
    path = mask_path(root, video_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez_compressed(unfinished, masks=masks_THW)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_masks(root: Path | str, video_id: str) -> NDArray[np.uint8]:
    """Masks of one video of the data set at `root`.

    Args:
        root: Folder given to `tubelet videos`.
        video_id: SSv2's "id", or Kinetics' name of the clip without suffix (`YOUTUBEID_000010_000020`).

    Returns:
        uint8 [frames, height, width]: 0 background; 1, 2 the objects that fill the template's placeholders, in order;
        then an object that only rests, where the scene has one. A pixel belongs to an object that makes up at least
        half of its color.

    Raises:
        TubeletError: there is no such file, or it is not one that `write_masks` wrote.
    """
    path = mask_path(Path(root), video_id)
    if not path.is_file():
        raise TubeletError(f"No masks at {path}", "Check the video's id; only `tubelet videos` writes masks")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return np.asarray(archive["masks"], np.uint8)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TubeletError(f"{path} is damaged: {error}", "Delete it and run `tubelet videos` again") from error
