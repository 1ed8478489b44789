"""The sparse autoencoder: encoder x sparsifier x decoder, inside a normalisation.

    x ──normalise──▶ x_n ──W_enc (x_n - b_dec) + b_enc──▶ pre ──sparsifier──▶ code ──code W_dec + b_dec──▶ x_n^ ──▶ x^

Public methods take and give raw tokens. Training works in normalised space, through `pre_activations`, `choose` and
`reconstruct`. Codes are held as K (value, latent) pairs per token; a dense code exists only where one is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tubelet_store import TubeletError
from tubelet_trainer.sae.config import SAEConfig
from tubelet_trainer.sae.normalisation import Normalisation
from tubelet_trainer.sae.sparse import decode, densify, select
from tubelet_trainer.sae.sparsifiers import Choice, build_sparsifier


class Codes(NamedTuple):
    """Sparse codes: `values` [N, K] at latents `indices` [N, K]. Entries that are not active have value 0."""

    values: Tensor
    indices: Tensor


class SAE(nn.Module):
    """A sparse autoencoder with F latents for tokens of D channels.

    Args:
        config: The recipe.
        normalisation: Maps raw tokens to the space the weights live in.

    Raises:
        TubeletError: k exceeds the dictionary.
    """

    def __init__(self, config: SAEConfig, normalisation: Normalisation) -> None:
        super().__init__()
        self.config = config
        self.normalisation = normalisation
        self.channels = len(normalisation.mean)
        self.latents = config.latents_for(self.channels)
        if config.k > self.latents:
            raise TubeletError(
                f"sae.k {config.k} exceeds the {self.latents} latents", "Lower sae.k or raise sae.expansion"
            )
        generator = torch.Generator().manual_seed(config.seed)
        rows_FD = nnf.normalize(torch.randn(self.latents, self.channels, generator=generator), dim=1)
        # The encoder starts as the decoder's transpose (Gao et al. 2024, appendix A.1), in storage of its own.
        self.W_enc = nn.Parameter(rows_FD.clone())
        """[F, D]"""
        self.b_enc = nn.Parameter(torch.zeros(self.latents))
        """[F]"""
        self.W_dec = nn.Parameter(rows_FD)
        """[F, D], rows of unit norm"""
        self.b_dec = nn.Parameter(torch.zeros(self.channels))
        """[D]; zero is the mean of the tokens, because they are centred"""
        self.sparsifier = build_sparsifier(config)

    def encode_sparse(self, x: Tensor) -> Codes:
        """Codes of raw tokens [N, D]: `values` [N, K] and `indices` int64 [N, K]; K = k for TopK."""
        x_ND = self.normalisation(x)
        pre_NF = self.pre_activations(x_ND)
        return self.choose(x_ND, pre_NF, self.sparsifier(pre_NF))

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes [N, F] of raw tokens [N, D]."""
        return densify(*self.encode_sparse(x), self.latents)

    def decode_sparse(self, codes: Codes) -> Tensor:
        """Raw tokens [N, D] from sparse codes."""
        return self.normalisation.inverse(self.reconstruct(codes))

    def decode(self, codes: Tensor) -> Tensor:
        """Raw tokens [N, D] from dense codes [N, F]."""
        return self.normalisation.inverse(codes @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [N, D] of raw tokens [N, D]."""
        return self.decode_sparse(self.encode_sparse(x))

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """W_enc (x - b_dec) + b_enc, [N, F], of normalised tokens. Without gradient: `choose` supplies it."""
        with torch.no_grad():
            return nnf.linear(x_ND - self.b_dec, self.W_enc, self.b_enc)

    def choose(self, x_ND: Tensor, pre_NF: Tensor, choice: Choice) -> Codes:
        """Codes at the chosen latents, with gradient to the encoder where they are kept."""
        values = select(x_ND - self.b_dec, self.W_enc, self.b_enc, pre_NF, choice.indices_NK)
        return Codes(values * choice.keep_NK, choice.indices_NK)

    def reconstruct(self, codes: Codes) -> Tensor:
        """Normalised tokens [N, D] from codes."""
        return decode(codes.values, codes.indices, self.W_dec) + self.b_dec

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient what is parallel to its rows; before the optimiser's step.

        The rows are brought back to unit norm after the step; the parallel part would only disturb the optimiser's
        moments.
        """
        if self.W_dec.grad is not None:
            along_F1 = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.sub_(along_F1 * self.W_dec)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring the decoder's rows to unit norm; after the optimiser's step."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def fold(self) -> SAE:
        """The same SAE with the normalisation folded into its weights: same codes, same reconstruction.

        With x_n = (x - m) / s:  W_enc' = W_enc / s,  b_dec' = s b_dec + m,  W_dec' = s W_dec,  b_enc' = b_enc.
        Decoder rows then have norm s.
        """
        mean, scale = self.normalisation.mean, self.normalisation.scale
        folded = SAE(self.config, Normalisation.identity(self.channels))
        folded.to(device=self.W_dec.device, dtype=self.W_dec.dtype)
        folded.load_state_dict(
            {
                **self.state_dict(),
                "normalisation.mean": torch.zeros_like(mean),
                "normalisation.scale": torch.ones_like(scale),
                "W_enc": self.W_enc / scale,
                "W_dec": self.W_dec * scale,
                "b_dec": self.b_dec * scale + mean,
            }
        )
        return folded.train(self.training)
