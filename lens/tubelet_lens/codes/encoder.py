"""What the lens asks of a sparse autoencoder, and of what stands in for one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class Encoder(Protocol):
    """From raw activations to codes. Normalization is its own business."""

    def encode(self, x_ND: Tensor, /) -> Tensor:
        """Dense codes [N, F] of raw activations [N, D]; a latent that does not fire is exactly 0."""


@runtime_checkable
class SparseCoder(Encoder, Protocol):
    """An SAE from raw activations to codes and back."""

    @property
    def latents(self) -> int:
        """Width F of the code."""

    def decode(self, codes_NF: Tensor, /) -> Tensor:
        """Reconstructions [N, D], in raw units, of codes [N, F]."""
