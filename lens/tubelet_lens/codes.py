"""What the lens asks of a sparse autoencoder."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class SparseCoder(Protocol):
    """An SAE from raw activations to codes and back. Normalisation is its own business."""

    @property
    def latents(self) -> int:
        """Width F of the code."""

    def encode(self, x_ND: Tensor, /) -> Tensor:
        """Dense codes [N, F] of raw activations [N, D]; a latent that does not fire is exactly 0."""

    def decode(self, codes_NF: Tensor, /) -> Tensor:
        """Reconstructions [N, D], in raw units, of codes [N, F]."""
