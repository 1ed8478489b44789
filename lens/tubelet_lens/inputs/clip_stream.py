"""Whole clips, raw and encoded, a few at a time: the stream that every metric reads.

    store ─▶ clips (ok, of one split) ─▶ Window: x [C, T, S, D], active codes of C clips, reconstruction [C, T, S, D]

Whole clips, so that neighbors in time and space are index arithmetic. Each clip is encoded alone, in one call of fixed
shape: a figure does not depend on how many clips share a window. Codes are lists of their active entries; a dense code
exists only where a metric needs it. Peak memory is at most about `clip_bytes(...) x clips per window`, plus a
bounded part per metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_lens.codes.sparse_codes import SparseCoder, SparseCodes, listed
from tubelet_store.reader import Store
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class Window:
    """Some whole clips, on one device.

    Attributes:
        clips: [C] Their numbers in the store.
        x_CTSD: float32 Raw activations.
        codes: [C] The SAE's codes.
        xhat_CTSD: float32 Its reconstructions, in raw units.
        valid_CT: bool Latent steps that cover no repeated frame (see `latent_time`).
    """

    clips: NDArray[np.int64]
    x_CTSD: Tensor
    codes: tuple[SparseCodes, ...]
    xhat_CTSD: Tensor
    valid_CT: Tensor

    @cached_property
    def codes_CTSF(self) -> Tensor:
        """float32 The codes, dense."""
        return torch.stack([codes.dense() for codes in self.codes])


def clip_bytes(store: Store, hook: str, latents: int) -> int:
    """Most bytes one clip takes in a window.

    Activations, reconstruction and dense codes in float32, a temporary copy of each, and the activations in float64.
    """
    channels = store.plan.hook(hook).channels
    return store.plan.grid.tokens * (4 * (2 * channels + latents) * 2 + 8 * channels)


def windows(
    store: Store,
    hook: str,
    sae: SparseCoder,
    clips: NDArray[np.int64],
    valid_CT: NDArray[np.bool_],
    *,
    clips_per_window: int,
    device: torch.device,
) -> Iterator[Window]:
    """Stream `clips` (ascending numbers) of `store` at `hook` through `sae`.

    Args:
        store: A local store.
        hook: Name of the hook.
        sae: On `device`.
        clips: Clips to read.
        valid_CT: bool [all clips of the store, steps], see `latent_time`.
        clips_per_window: Clips held at once.
        device: Where to compute.

    Raises:
        TubeletError: a clip that is stored as ok holds values that are not finite.
    """
    for start in range(0, len(clips), clips_per_window):
        chosen = clips[start : start + clips_per_window]
        x_CTSD = torch.stack([read_clip(store, hook, int(clip)) for clip in chosen]).to(device)
        for clip, x_TSD in zip(chosen, x_CTSD, strict=True):
            if not bool(torch.isfinite(x_TSD).all()):
                raise TubeletError(
                    f"{store.url}: clip {clip} at {hook} is stored as ok but holds values that are not finite",
                    "Run `tubelet verify`, then copy or extract the store again",
                )
        codes, xhat = [], []
        with torch.no_grad():
            for x_TSD in x_CTSD:
                active, xhat_ND = _through(sae, x_TSD)
                codes.append(active)
                xhat.append(xhat_ND.view(x_TSD.shape))
        valid = torch.from_numpy(valid_CT[chosen]).to(device)
        yield Window(chosen, x_CTSD, tuple(codes), torch.stack(xhat), valid)


def _through(sae: SparseCoder, x_TSD: Tensor) -> tuple[SparseCodes, Tensor]:
    """Codes and reconstruction [N, D] of a clip."""
    x_ND, shape = x_TSD.flatten(0, 1), (*x_TSD.shape[:2], sae.latents)
    if isinstance(sae, SAE):
        sparse = sae.encode_sparse(x_ND)
        return listed(sparse, shape), sae.decode_sparse(sparse)
    codes_NF = sae.encode(x_ND)
    return SparseCodes.of(codes_NF.view(shape)), sae.decode(codes_NF)


def read_clip(store: Store, hook: str, clip: int) -> Tensor:
    """One clip as float32 [T, S, D]."""
    shard, place = divmod(clip, store.plan.clips_per_shard)
    values = np.array(store.shard_map(hook, shard)[place])
    if store.plan.dtype == "bfloat16":
        # torch does not accept numpy's bfloat16: pass the bits.
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(values).float()
