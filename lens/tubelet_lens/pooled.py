"""A clip as one vector: what probes, retrieval and monosemanticity read instead of tokens.

    Window ─▶ Pooling ─▶ Pooled: mean and max over a clip's tokens, of the codes, the raw activations and the controls

Tokens are encoded first and pooled after (pooling before encoding is another model). Tokens of latent steps that cover
only repeated frames are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes import SparseCoder
from tubelet_lens.section import Subject
from tubelet_lens.windows import Window


@dataclass(frozen=True, eq=False)
class Pooled:
    """Pooled vectors of N clips, in the order in which they were streamed.

    Attributes:
        mean_NF: float32 Mean over tokens.
        max_NF: float32 Largest over tokens.
    """

    mean_NF: NDArray[np.float32]
    max_NF: NDArray[np.float32]


class Pooling:
    """Pools windows, for the SAE's codes ("sae"), the raw activations ("raw") and each of `controls`."""

    def __init__(self, controls: Mapping[Subject, SparseCoder]) -> None:
        self._controls = controls
        self._mean: dict[Subject, list[Tensor]] = {}
        self._max: dict[Subject, list[Tensor]] = {}
        self._clips: list[NDArray[np.int64]] = []

    def add(self, window: Window) -> None:
        """Take in one window."""
        self._clips.append(window.clips)
        for place in range(len(window.clips)):
            valid_T = window.valid_CT[place]
            # A clip of nothing but repeats of one frame still shows that frame.
            steps = valid_T.nonzero().squeeze(1) if bool(valid_T.any()) else torch.arange(1, device=valid_T.device)
            x_ND = window.x_CTSD[place][steps].flatten(0, 1)
            self._pool("sae", window.codes_CTSF[place][steps].flatten(0, 1))
            self._pool("raw", x_ND)
            with torch.no_grad():
                for subject, coder in self._controls.items():
                    self._pool(subject, coder.encode(x_ND))

    def _pool(self, subject: Subject, values_NF: Tensor) -> None:
        self._mean.setdefault(subject, []).append(values_NF.mean(0).cpu())
        self._max.setdefault(subject, []).append(values_NF.amax(0).cpu())

    @property
    def clips(self) -> NDArray[np.int64]:
        """int64 [N] Numbers of the clips added."""
        return np.concatenate(self._clips)

    def pooled(self) -> dict[Subject, Pooled]:
        """The vectors of every subject."""
        return {
            subject: Pooled(torch.stack(self._mean[subject]).numpy(), torch.stack(self._max[subject]).numpy())
            for subject in self._mean
        }
