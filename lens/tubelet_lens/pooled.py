"""A clip as one vector: what probes, retrieval and monosemanticity read instead of tokens.

    Window ─▶ Pooling ─▶ Pooled: mean and max over a clip's tokens, of the codes, the raw activations and the controls

Tokens are encoded first and pooled after (pooling before encoding is another model). Tokens of latent steps that cover
only repeated frames are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes import Encoder
from tubelet_lens.section import Subject
from tubelet_lens.windows import Window

_Key = tuple[Subject, int]


@dataclass(frozen=True, eq=False)
class Pooled:
    """Pooled vectors of N clips, in the order in which they were streamed.

    Attributes:
        mean_NF: float32 Mean over tokens.
        max_NF: float32 Largest over tokens.
        negative: The same of max(-z, 0), where codes z are negative; None: none is, or these are raw activations.
    """

    mean_NF: NDArray[np.float32]
    max_NF: NDArray[np.float32]
    negative: Pooled | None = None


class Pooling:
    """Pools windows, for the SAE's codes ("sae"), the raw activations ("raw") and each draw of each of `controls`."""

    def __init__(self, controls: Mapping[Subject, Sequence[Encoder]]) -> None:
        self._controls = controls
        self._mean: dict[_Key, list[Tensor]] = {}
        self._max: dict[_Key, list[Tensor]] = {}
        self._negative: dict[_Key, dict[int, tuple[Tensor, Tensor]]] = {}
        self._clips: list[NDArray[np.int64]] = []

    def add(self, window: Window) -> None:
        """Take in one window."""
        self._clips.append(window.clips)
        for place in range(len(window.clips)):
            valid_T = window.valid_CT[place]
            # A clip of nothing but repeats of one frame still shows that frame.
            steps = valid_T.nonzero().squeeze(1) if bool(valid_T.any()) else torch.arange(1, device=valid_T.device)
            x_ND = window.x_CTSD[place][steps].flatten(0, 1)
            self._pool(("sae", 0), window.codes_CTSF[place][steps].flatten(0, 1))
            self._pool(("raw", 0), x_ND)
            with torch.no_grad():
                for subject, coders in self._controls.items():
                    for draw, coder in enumerate(coders):
                        self._pool((subject, draw), coder.encode(x_ND))

    def _pool(self, key: _Key, values_NF: Tensor) -> None:
        self._mean.setdefault(key, []).append(values_NF.mean(0).cpu())
        self._max.setdefault(key, []).append(values_NF.amax(0).cpu())
        if key[0] != "raw" and bool((values_NF < 0).any()):
            below_NF = values_NF.clamp(max=0).neg()
            place = len(self._max[key]) - 1
            self._negative.setdefault(key, {})[place] = below_NF.mean(0).cpu(), below_NF.amax(0).cpu()

    @property
    def clips(self) -> NDArray[np.int64]:
        """int64 [N] Numbers of the clips added."""
        return np.concatenate(self._clips)

    def draws(self) -> dict[Subject, tuple[Pooled, ...]]:
        """The vectors of every subject, one entry per draw; of what is not random there is one."""
        found: dict[Subject, tuple[Pooled, ...]] = {}
        for key in self._mean:
            mean, largest = torch.stack(self._mean[key]).numpy(), torch.stack(self._max[key]).numpy()
            found[key[0]] = (*found.get(key[0], ()), Pooled(mean, largest, self._pooled_negative(key)))
        return found

    def _pooled_negative(self, key: _Key) -> Pooled | None:
        found = self._negative.get(key)
        if found is None:
            return None
        nothing = torch.zeros_like(self._max[key][0])
        clips = [found.get(place, (nothing, nothing)) for place in range(len(self._max[key]))]
        mean, largest = (torch.stack(vectors).numpy() for vectors in zip(*clips, strict=True))
        return Pooled(mean, largest)
