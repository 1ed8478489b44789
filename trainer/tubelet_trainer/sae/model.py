"""The sparse autoencoder: encoder x sparsifier x decoder, inside a normalisation.

    x ──normalise──▶ x_n ──W_enc (x_n - b_dec) + b_enc──▶ pre ──sparsifier──▶ code ──code W_dec + b_dec──▶ x_n^ ──▶ x^

Public methods take and give raw tokens. Training works in normalised space, through `pre_activations`, `activate` and
`reconstruct`. Codes are held as K (value, latent) pairs per token; a dense code exists only where one is asked for, or
where the kind keeps many latents (K = F).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tubelet_store import TubeletError
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, SAEConfig, TopKConfig
from tubelet_trainer.sae.normalisation import Normalisation
from tubelet_trainer.sae.sparse import decode, densify, is_dense, select
from tubelet_trainer.sae.sparsifiers import AbsTopK, BatchTopK, Choice, TopK, build_sparsifier


class Codes(NamedTuple):
    """Sparse codes: `values` [N, K] at latents `indices` [N, K]. Entries that are not active have value 0.

    Kinds that keep many latents give all of them: K = F, `indices` 0, 1, ..., F - 1 for each token.
    """

    values: Tensor
    indices: Tensor

    def fired(self, latents: int) -> Tensor:
        """bool [F]: latents that are active on at least one of the tokens."""
        active_NK = self.values.detach() != 0
        if is_dense(self.indices):
            return active_NK.any(dim=0)
        counts = torch.zeros(latents, dtype=torch.int32, device=active_NK.device)
        return counts.index_add_(0, self.indices.flatten(), active_NK.flatten().int()) > 0


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
        k = getattr(config, "k", 1)
        if k > self.latents:
            raise TubeletError(f"sae.k {k} exceeds the {self.latents} latents", "Lower sae.k or raise sae.expansion")
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
        self.sparsifier = build_sparsifier(config, self.latents)

    def encode_sparse(self, x: Tensor) -> Codes:
        """Codes of raw tokens [N, D]: `values` [N, K] and `indices` int64 [N, K].

        K = k for TopK and AbsTopK, the largest number any token keeps for BatchTopK, F for the others.
        """
        x_ND = self.normalisation(x)
        return self.activate(x_ND, self.pre_activations(x_ND))

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
        """W_enc (x - b_dec) + b_enc, [N, F], of normalised tokens. Without gradient: `choose` supplies it.

        Under `torch.autocast` the product, and so the pre-activations, are in the lower precision.
        """
        with torch.no_grad():
            return nnf.linear(x_ND - self.b_dec, self.W_enc, self.b_enc)

    def activate(self, x_ND: Tensor, pre_NF: Tensor) -> Codes:
        """Codes of normalised tokens from their pre-activations, with gradient."""
        choice = self.sparsifier(pre_NF)
        selected = select(x_ND - self.b_dec, self.W_enc, self.b_enc, pre_NF, choice.indices_NK)
        return Codes(self.sparsifier.values(selected, choice, self.b_enc), choice.indices_NK)

    def choose(self, x_ND: Tensor, pre_NF: Tensor, choice: Choice) -> Codes:
        """Chosen pre-activations, 0 where they are not kept, with gradient to the encoder where they are."""
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
            # As a batched dot product and one fused pass: both arrays are far larger than any cache.
            along_F11 = self.W_dec.grad[:, None] @ self.W_dec[:, :, None]
            self.W_dec.grad.addcmul_(along_F11[:, 0], self.W_dec, value=-1)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring the decoder's rows to unit norm; after the optimiser's step."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    def anneal(self, step: int, steps: int) -> None:
        """Set what changes in the course of training, for step `step` (from 0) of `steps`."""
        if isinstance(self.config, TopKConfig | BatchTopKConfig | AbsTopKConfig):
            assert isinstance(self.sparsifier, TopK | BatchTopK | AbsTopK)
            self.sparsifier.k = self.config.k_at(step, steps, self.channels)

    @torch.no_grad()
    def fold(self) -> SAE:
        """The same SAE with the normalisation folded into its weights: same codes, same reconstruction of raw tokens.

        With x_n = (x - m) A:  W_enc' = W_enc A^T,  b_dec' = b_dec A^-1 + m,  W_dec' = W_dec A^-1,  b_enc' = b_enc. For
        A = 1 / s the decoder's rows then have norm s; after whitening each has a norm of its own.
        """
        normalisation, f64 = self.normalisation, torch.float64
        scale = normalisation.scale.to(f64)
        apply = normalisation.whiten.to(f64) if normalisation.whiten is not None else 1 / scale * _eye(self)
        undo = normalisation.unwhiten.to(f64) if normalisation.unwhiten is not None else scale * _eye(self)
        plain = self.config.normalisation.model_copy(update={"centre": False, "scale": False, "whitening": "none"})
        folded = SAE(self.config.model_copy(update={"normalisation": plain}), Normalisation.identity(self.channels))
        folded.to(device=self.W_dec.device, dtype=self.W_dec.dtype)
        weights = {
            "W_enc": self.W_enc.to(f64) @ apply.T,
            "W_dec": self.W_dec.to(f64) @ undo,
            "b_dec": self.b_dec.to(f64) @ undo + normalisation.mean.to(f64),
        }
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("normalisation.")}
        folded.load_state_dict(
            {**folded.state_dict(), **kept, **{n: w.to(self.W_dec.dtype) for n, w in weights.items()}}
        )
        return folded.train(self.training)


def _eye(sae: SAE) -> Tensor:
    return torch.eye(sae.channels, dtype=torch.float64, device=sae.W_dec.device)
