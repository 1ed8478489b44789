"""A group of latents taken out of what the SAE reads: x' = x - sum over the group of z_j d_j, in raw units.

The error term x - decode(z) stays, and so does everything the other latents say. Decoding is affine, so the same holds
of means over tokens: pooled activations are edited without another pass over the store, exactly.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.codes.encoder import SparseCoder

_ROWS = 4096


def remove_latents(sae: SparseCoder, x_ND: Tensor, codes_NF: Tensor, group: NDArray[np.int64]) -> Tensor:
    """Raw activations [N, D], or their means over tokens, without what the latents `group` contribute.

    Args:
        sae: Made the codes.
        x_ND: Raw activations, in their own units.
        codes_NF: Their codes.
        group: Numbers of the latents.
    """
    alone_NF = torch.zeros_like(codes_NF)
    alone_NF[:, group] = codes_NF[:, group]
    with torch.no_grad():
        # The bias is in both, so it cancels.
        return x_ND - (sae.decode(alone_NF) - sae.decode(torch.zeros_like(alone_NF[:1])))


def remove_from_means(
    sae: SparseCoder,
    mean_ND: NDArray[np.float32],
    codes_NF: NDArray[np.float32],
    group: NDArray[np.int64],
    device: torch.device,
) -> NDArray[np.float32]:
    """float32 [N, D] Mean raw activations of clips without the latents `group`.

    Args:
        sae: On `device`.
        mean_ND: Means of the raw activations over each clip's tokens.
        codes_NF: Means of their codes over the same tokens.
        group: Numbers of the latents.
        device: Where to decode.
    """
    edited = []
    for start in range(0, len(mean_ND), _ROWS):
        x_RD, z_RF = (torch.from_numpy(part[start : start + _ROWS]).to(device) for part in (mean_ND, codes_NF))
        edited.append(remove_latents(sae, x_RD, z_RF, group).cpu().numpy())
    return np.concatenate(edited)
