"""Embeddings that define the likeness of clips for monosemanticity: one vector per evaluated clip, from any model.

the backbone itself ── mean of the raw tokens ──┐
another store ── same video, same view ─────────┼─▶ Reference: e_n of the evaluated clips that have one
an array ── clip order, or video_id ────────────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tubelet.errors import TubeletError, nearest
from tubelet_lens.config import ArrayReference, StoreReference
from tubelet_lens.inputs.pooled_clips import PooledSplit
from tubelet_store.object_keys import ACTIVATIONS, SPECIAL
from tubelet_store.reader import Store, open_store
from tubelet_trainer.data.pairs import fresh_steps

_ALL_SAME = "Give a reference of the same videos, or leave it out"


@dataclass(frozen=True, eq=False)
class Reference:
    """Embeddings of some of N evaluated clips.

    Attributes:
        name: What figures and columns call it.
        neutral: None of the compared SAEs reads the model behind it.
        source: What made the embeddings, in words.
        places: int64 [M] Which of the evaluated clips have an embedding, ascending.
        e_ME: float64 Their embeddings, of norm 1.
    """

    name: str
    neutral: bool
    source: str
    places: NDArray[np.int64]
    e_ME: NDArray[np.float64]


def own_reference(side: PooledSplit) -> Reference:
    """The evaluated backbone's own activations, pooled."""
    source = "the mean over tokens of the very activations that the SAE reads"
    return _reference("own", False, source, side.pooled["raw"].mean_NF.astype(np.float64))


def read_reference(config: StoreReference | ArrayReference, side: PooledSplit) -> Reference:
    """The embeddings that `config` names, of the clips of `side`.

    Raises:
        TubeletError: there is no such store, hook or file; it does not fit the clips of `side`; fewer than two of them
            have an embedding; or a reference that is called neutral is the evaluated backbone.
    """
    if isinstance(config, StoreReference):
        source, e_NE = _from_store(config, side)
    elif config.path.suffix == ".npy":
        source, e_NE = f"the array {config.path.name}", _from_npy(config.path, side)
    else:
        source, e_NE = f"the table {config.path.name}", _from_parquet(config.path, side)
    reference = _reference(config.name, config.neutral, source, e_NE)
    if len(reference.places) < 2:
        raise TubeletError(
            f"Reference '{config.name}' has an embedding for {len(reference.places)} of {len(e_NE)} evaluated clips",
            _ALL_SAME,
        )
    return reference


def _reference(name: str, neutral: bool, source: str, e_NE: NDArray[np.float64]) -> Reference:
    norm_N = np.linalg.norm(e_NE, axis=1)
    # A comparison with NaN is false: clips without an embedding go the same way as those whose embedding is zero.
    places = np.flatnonzero(norm_N > 0)
    return Reference(name, neutral, source, places, e_NE[places] / norm_N[places, None])


def _from_store(config: StoreReference, side: PooledSplit) -> tuple[str, NDArray[np.float64]]:
    store = open_store(config.store)
    hooks = [hook.name for hook in store.plan.hooks]
    hook = hooks[-1] if config.hook is None else config.hook
    if hook not in hooks:
        raise TubeletError(f"Reference '{config.name}': {config.store} has no hook '{hook}'", nearest(hook, hooks))
    if config.neutral and store.plan.backbone == side.store.plan.backbone:
        raise TubeletError(
            f"Reference '{config.name}' is called neutral, but {config.store} holds the backbone that the SAE reads",
            "Leave out `neutral`, or give a store of a backbone that none of the compared SAEs reads",
        )
    kind = SPECIAL if config.tokens == "special" else ACTIVATIONS
    array = store.special_tokens(hook) if kind == SPECIAL else store[hook]
    fresh_CT = fresh_steps(store)
    e_NE = np.full((len(side.clips), store.plan.hook(hook).channels), np.nan)
    for place, clip in enumerate(_same_clips(store, side)):
        if clip is None:
            continue
        values = np.asarray(array[clip], dtype=np.float64)
        # Special tokens of a video backbone have one step for the whole clip.
        fresh = fresh_CT[clip] if len(values) == fresh_CT.shape[1] and fresh_CT[clip].any() else slice(None)
        tokens = values[fresh][:, :1] if kind == SPECIAL else values[fresh]
        e_NE[place] = tokens.mean(axis=(0, 1))
    what = f"first special token ({store.plan.special_tokens[0]})" if kind == SPECIAL else "mean over tokens"
    return f"{what} at {hook} of {Path(store.url).name} ({store.plan.backbone.get('family', 'backbone')})", e_NE


def _same_clips(store: Store, side: PooledSplit) -> list[int | None]:
    """Of each clip of `side` the clip of `store` of the same video and view; None where it has none."""
    table, ok = store.clips(), store.ok()
    rows = {
        (video, view): clip
        for clip, video, view in zip(*(table[name].to_pylist() for name in ("clip", "video_id", "view")), strict=True)
        if ok[clip]
    }
    return [rows.get(key) for key in _keys(side)]


def _keys(side: PooledSplit) -> list[tuple[str, int]]:
    return list(zip(side.videos.tolist(), side.store.clips()["view"].to_numpy()[side.clips].tolist(), strict=True))


def _from_npy(path: Path, side: PooledSplit) -> NDArray[np.float64]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TubeletError(f"{path} cannot be read as a NumPy array: {error}", "Save it with numpy.save") from error
    clips = side.store.plan.clips
    if array.ndim != 2 or len(array) != clips or array.dtype.kind != "f":
        raise TubeletError(
            f"{path} holds {array.dtype} {list(array.shape)}, not floats [{clips}, E] for {side.store.url}",
            "Give a row for each clip of the store, in the order of its clip table, NaN for those without",
        )
    return np.asarray(array[side.clips], dtype=np.float64)


def _from_parquet(path: Path, side: PooledSplit) -> NDArray[np.float64]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TubeletError(f"{path} cannot be read as Parquet: {error}", "Give a .npy or .parquet file") from error
    missing = {"video_id", "embedding"} - set(table.column_names)
    if missing:
        raise TubeletError(f"{path} has no column {', '.join(sorted(missing))}", "It needs `video_id` and `embedding`")
    rows = _rows(path, table["embedding"].to_pylist())
    videos = table["video_id"].to_pylist()
    if "view" in table.column_names:
        by_clip = dict(zip(zip(videos, table["view"].to_pylist(), strict=True), rows, strict=True))
        rows_of_clips = [by_clip.get(key) for key in _keys(side)]
    else:
        by_video = dict(zip(videos, rows, strict=True))
        rows_of_clips = [by_video.get(video) for video in side.videos.tolist()]
    undefined_D = np.full(rows.shape[1], np.nan)
    return np.stack([undefined_D if row is None else row for row in rows_of_clips])


def _rows(path: Path, lists: Sequence[Sequence[float] | None]) -> NDArray[np.float64]:
    try:
        rows = np.asarray(lists, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TubeletError(f"{path}: `embedding` does not hold lists of numbers of one length", _ALL_SAME) from error
    if rows.ndim != 2 or not rows.size:
        raise TubeletError(f"{path}: `embedding` is {list(rows.shape)}, not rows of numbers", _ALL_SAME)
    return rows
