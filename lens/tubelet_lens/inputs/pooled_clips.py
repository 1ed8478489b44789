"""A clip as one vector, which probes, retrieval and monosemanticity read instead of tokens.

    Window ─▶ Pooling ─▶ Pooled: mean and max over a clip's tokens, of the codes, the raw activations and the controls

Tokens are encoded first and pooled after; pooling before encoding is a different model, see `clip_vectors`. Tokens of
latent steps that cover only repeated frames are left out. Of codes only the latents that fire in a clip are kept,
because six control draws of 20,000 clips and 6,144 latents would be 7 GB; they become dense one draw at a time, on
reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from tubelet_lens.codes.sparse_codes import Encoder, SparseCodes, encode_clip
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.results.section import Subject
from tubelet_store.reader import Store

_Key = tuple[Subject, int]
Rows: TypeAlias = "NDArray[np.float32] | csr_array"
"""float32 [N, F]"""


class Pooled:
    """Pooled vectors of N clips, in the order in which they were streamed.

    Args:
        mean: Mean over tokens.
        largest: Largest over tokens.
        negative: The same of max(-z, 0), where codes z are negative; None: none is, or these are raw activations.
    """

    def __init__(self, mean: Rows, largest: Rows, negative: Pooled | None = None) -> None:
        self._mean, self._largest = mean, largest
        self.negative = negative

    @property
    def mean_NF(self) -> NDArray[np.float32]:
        """Mean over tokens; made dense on each access, where it is kept sparse."""
        return _dense(self._mean)

    @property
    def max_NF(self) -> NDArray[np.float32]:
        """Largest over tokens; as `mean_NF`."""
        return _dense(self._largest)


def _dense(rows: Rows) -> NDArray[np.float32]:
    if isinstance(rows, np.ndarray):
        return rows
    values: NDArray[np.float32] = rows.toarray()
    return values


@dataclass(frozen=True, eq=False)
class _PooledCodes:
    """The M latents that fire in a clip, with their mean and largest values."""

    latent_M: NDArray[np.int32]
    mean_M: NDArray[np.float32]
    largest_M: NDArray[np.float32]
    negative: _PooledCodes | None = None

    @classmethod
    def of(cls, codes: SparseCodes) -> _PooledCodes:
        latent_E, value_E = codes.latent_E, codes.value_E
        pooled = cls._of(codes, latent_E, value_E)
        below_E = value_E < 0
        if not bool(below_E.any()):
            return pooled
        negative = cls._of(codes, latent_E[below_E], -value_E[below_E])
        return cls(pooled.latent_M, pooled.mean_M, pooled.largest_M, negative)

    @classmethod
    def _of(cls, codes: SparseCodes, latent_E: Tensor, value_E: Tensor) -> _PooledCodes:
        steps, patches, latents = codes.shape
        tokens_F = latent_E.bincount(minlength=latents)
        latent_M = tokens_F.nonzero().squeeze(1)
        mean_F = latent_E.bincount(value_E.double(), minlength=latents) / (steps * patches)
        largest_F = torch.full_like(mean_F, -torch.inf, dtype=value_E.dtype)
        largest_M = largest_F.scatter_reduce_(0, latent_E, value_E, "amax")[latent_M]
        # Where a latent is silent on some token, 0 is among its values.
        silent_M = tokens_F[latent_M] < steps * patches
        largest_M = torch.where(silent_M, largest_M.clamp_min(0), largest_M)
        return cls(latent_M.int().cpu().numpy(), mean_F[latent_M].float().cpu().numpy(), largest_M.cpu().numpy())


class Pooling:
    """Pools windows, for the SAE's codes ("sae"), the raw activations ("raw") and each draw of each of `controls`."""

    def __init__(self, controls: Mapping[Subject, Sequence[Encoder]]) -> None:
        self._controls = controls
        self._codes: dict[_Key, list[_PooledCodes]] = {}
        self._raw_mean: list[Tensor] = []
        self._raw_largest: list[Tensor] = []
        self._clips: list[NDArray[np.int64]] = []
        self._latents: dict[_Key, int] = {}

    def add(self, window: Window) -> None:
        """Add the clips of one window."""
        self._clips.append(window.clips)
        for place, (codes, x_TSD) in enumerate(zip(window.codes, window.x_CTSD, strict=True)):
            valid_T = window.valid_CT[place]
            # A clip of nothing but repeats of one frame still shows that frame.
            steps = valid_T.nonzero().squeeze(1) if bool(valid_T.any()) else torch.arange(1, device=valid_T.device)
            x_TSD = x_TSD[steps]
            self._raw_mean.append(x_TSD.mean((0, 1)).cpu())
            self._raw_largest.append(x_TSD.amax((0, 1)).cpu())
            self._pool(("sae", 0), codes.at_steps(steps))
            for subject, coders in self._controls.items():
                for draw, coder in enumerate(coders):
                    self._pool((subject, draw), encode_clip(coder, x_TSD))

    def _pool(self, key: _Key, codes: SparseCodes) -> None:
        self._latents[key] = codes.shape[2]
        self._codes.setdefault(key, []).append(_PooledCodes.of(codes))

    @property
    def clips(self) -> NDArray[np.int64]:
        """int64 [N] Numbers of the clips added."""
        return np.concatenate(self._clips)

    def draws(self) -> dict[Subject, tuple[Pooled, ...]]:
        """The vectors of every subject, one entry per draw; of what is not random there is one."""
        raw = Pooled(torch.stack(self._raw_mean).numpy(), torch.stack(self._raw_largest).numpy())
        draws: dict[Subject, tuple[Pooled, ...]] = {"raw": (raw,)}
        for key, clips in self._codes.items():
            negative = None
            if any(clip.negative is not None for clip in clips):
                negative = Pooled(*_rows([clip.negative or _NOTHING for clip in clips], self._latents[key]))
            pooled = Pooled(*_rows(clips, self._latents[key]), negative)
            draws[key[0]] = (*draws.get(key[0], ()), pooled)
        return draws


_NOTHING = _PooledCodes(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))


def _rows(clips: Sequence[_PooledCodes], latents: int) -> tuple[csr_array, csr_array]:
    """Mean and largest of clips one below the other; both share their places."""
    starts = np.cumsum([0, *(len(clip.latent_M) for clip in clips)])
    places = np.concatenate([clip.latent_M for clip in clips])
    mean, largest = (
        csr_array((np.concatenate(values), places, starts), shape=(len(clips), latents))
        for values in ([clip.mean_M for clip in clips], [clip.largest_M for clip in clips])
    )
    return mean, largest


@dataclass(frozen=True, eq=False)
class PooledSplit:
    """N clips with what is known of them.

    Attributes:
        store: Where they lie.
        clips: int64 [N] Their numbers there.
        videos: object [N] Video ids.
        labels: int64 [N] Class, -1 where the store has none.
        label_names: object [N] Its name, None where unknown.
        captions: object [N] Caption, None where unknown.
        draws: Vectors by subject ("sae", "raw" and the controls), one entry per draw of what is random.
    """

    store: Store
    clips: NDArray[np.int64]
    videos: NDArray[np.object_]
    labels: NDArray[np.int64]
    label_names: NDArray[np.object_]
    captions: NDArray[np.object_]
    draws: Mapping[Subject, tuple[Pooled, ...]]

    @property
    def pooled(self) -> dict[Subject, Pooled]:
        """Vectors by subject, the first draw of each."""
        return {subject: draws[0] for subject, draws in self.draws.items()}


def pooled_split(store: Store, pooling: Pooling) -> PooledSplit:
    """The clips that `pooling` has seen, all of `store`."""
    rows = store.clips().take(pooling.clips)
    labels = rows["label"].to_pylist()
    return PooledSplit(
        store=store,
        clips=pooling.clips,
        videos=np.asarray(rows["video_id"].to_pylist(), dtype=object),
        labels=np.asarray([-1 if label is None else label for label in labels], dtype=np.int64),
        label_names=np.asarray(rows["label_name"].to_pylist(), dtype=object),
        captions=np.asarray(rows["caption"].to_pylist(), dtype=object),
        draws=pooling.draws(),
    )
