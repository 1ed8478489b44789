"""The sparse autoencoder: encoder x sparsifier x decoder, inside a normalization.

    x ──normalize──▶ x_n ──W_enc (x_n - b_dec) + b_enc──▶ pre ──sparsifier──▶ code ──code W_dec + b_dec──▶ x_n^ ──▶ x^

Public methods take and return raw tokens. Training works in normalized space, through `pre_activations`, `activate` and
`reconstruct`. Codes are held as K (value, latent) pairs per token; a dense code exists only where one is asked for, or
where the kind keeps many latents (K = F).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor, nn

from tubelet.errors import TubeletError
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, SAEConfig, TopKConfig
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sparse_ops import Bags, decode, densify, is_dense, select
from tubelet_trainer.sae.sparsifiers import AbsTopK, BatchTopK, Choice, JumpReLU, TopK, build_sparsifier

# 128 rows of 768 float32 take 0.4 MB; with 16384 rows, projecting takes 8 ms in such blocks and 22 ms at once.
_CACHED_ROWS = 128

# Weight of the newest batch in BatchTopK's threshold: this over the steps so far, while that is more than the momentum.
_LOOK_BACK = 10


@dataclass(frozen=True)
class Codes:
    """Sparse codes: `values` [N, K] at latents `indices` [N, K]. Entries that are not active have value 0.

    Kinds that keep many latents give all of them: K = F, `indices` 0, 1, ..., F - 1 for each token. BatchTopK in
    training gives a list [E] of entries, token after token; `bags` maps them to tokens.
    """

    values: Tensor
    indices: Tensor
    bags: Bags | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """values, indices"""
        yield self.values
        yield self.indices

    def __len__(self) -> int:
        """N."""
        return len(self.values if self.bags is None else self.bags.starts_N)

    def dense(self, latents: int) -> Tensor:
        """[N, F]"""
        return densify(self.values, self.indices, latents, self.bags)

    def energy(self, latents: int) -> Tensor:
        """[F] Sum over the tokens of each latent's squared code; no gradient."""
        square = self.values.detach().square()
        if is_dense(self.indices):
            return square.sum(dim=0)
        return square.new_zeros(latents).index_add_(0, self.indices.flatten(), square.flatten())

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
        normalization: Maps raw tokens to the space the weights live in.

    Raises:
        TubeletError: k exceeds the dictionary.
    """

    def __init__(self, config: SAEConfig, normalization: Normalization) -> None:
        super().__init__()
        self.config = config
        self.normalization = normalization
        self.channels = len(normalization.mean)
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
        """[D]; zero is the mean of the tokens, because they are centered"""
        self.sparsifier = build_sparsifier(config, self.latents, normalization.unit)

    def encode_sparse(self, x: Tensor) -> Codes:
        """Codes of raw tokens [N, D]: `values` [N, K] and `indices` int64 [N, K].

        K = k for TopK and AbsTopK, the largest number any token keeps for BatchTopK (the others' entries are 0), F for
        the other kinds.

        Raises:
            TubeletError: the tokens are of another shape.
        """
        if x.ndim != 2 or x.shape[1] != self.channels:
            raise TubeletError(
                f"Tokens of shape {list(x.shape)} were given, the SAE takes [tokens, {self.channels}]",
                "Flatten clips, times and patches first, tokens.flatten(0, -2), or use `encode`",
            )
        x_ND = self.normalization(x)
        return self.activate(x_ND, self.pre_activations(x_ND))

    def encode(self, x: Tensor | NDArray[Any]) -> Tensor:
        """Dense codes [..., F] of raw tokens [..., D], float32.

        Args:
            x: Any leading dimensions ([clip, time, space, channel] of a store, say), torch or numpy, any dtype of a
                store; moved to the SAE's device.

        Raises:
            TubeletError: the last dimension is not the SAE's channels.
        """
        tokens = self._on_device(x)
        codes = self.encode_sparse(self._flat(tokens))
        return codes.dense(self.latents).reshape(*tokens.shape[:-1], self.latents)

    def decode_sparse(self, codes: Codes) -> Tensor:
        """Raw tokens [N, D] from sparse codes."""
        return self.normalization.inverse(self.reconstruct(codes))

    def decode(self, codes: Tensor | NDArray[Any]) -> Tensor:
        """Raw tokens [..., D] from dense codes [..., F]; leading dimensions and types as for `encode`."""
        codes = self._on_device(codes).to(self.W_dec.dtype)
        if codes.shape[-1:] != (self.latents,):
            raise TubeletError(
                f"Codes of shape {list(codes.shape)} were given, the SAE has {self.latents} latents",
                "Give dense codes [..., latents], as `encode` returns them",
            )
        return self.normalization.inverse(codes @ self.W_dec + self.b_dec)

    def forward(self, x: Tensor | NDArray[Any]) -> Tensor:
        """Reconstruction [..., D] of raw tokens [..., D]; leading dimensions and types as for `encode`."""
        tokens = self._on_device(x)
        return self.decode_sparse(self.encode_sparse(self._flat(tokens))).reshape(tokens.shape)

    def _on_device(self, x: Tensor | NDArray[Any]) -> Tensor:
        if isinstance(x, np.ndarray):
            # NumPy has no bfloat16 of its own; torch takes the bits.
            is_bfloat16 = x.dtype.name == "bfloat16"
            x = np.require(x.view(np.int16) if is_bfloat16 else x, requirements="W")
            tensor = torch.from_numpy(x)
            x = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
        return x.to(self.W_enc.device)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.channels,):
            raise TubeletError(
                f"Tokens of shape {list(x.shape)} were given, the SAE takes [..., {self.channels}]",
                "Give tokens of the hook that it was trained on, channels last",
            )
        return x.reshape(math.prod(x.shape[:-1]), self.channels)

    def pre_activations(self, x_ND: Tensor) -> Tensor:
        """W_enc (x - b_dec) + b_enc, [N, F], of normalized tokens. Without gradient: `choose` supplies it.

        Under `torch.autocast` the product, and so the pre-activations, are in the lower precision, save for JumpReLU.
        Its thresholds learn from the pre-activations within a kernel around them: one narrower than the steps of
        bfloat16 (up to 1/128 of the value) would see none of them, or all that were rounded to one number.
        """
        narrow = isinstance(self.sparsifier, JumpReLU)
        exact = torch.autocast(self.W_enc.device.type, enabled=False) if narrow else nullcontext()
        with torch.no_grad(), exact:
            return nnf.linear(x_ND - self.b_dec, self.W_enc, self.b_enc)

    def activate(self, x_ND: Tensor, pre_NF: Tensor) -> Codes:
        """Codes of normalized tokens from their pre-activations, with gradient."""
        choice: Choice = self.sparsifier(pre_NF)
        selected = self._select(x_ND, pre_NF, choice)
        return Codes(self.sparsifier.values(selected, choice, self.b_enc), choice.indices, choice.bags)

    def choose(self, x_ND: Tensor, pre_NF: Tensor, choice: Choice) -> Codes:
        """Chosen pre-activations, 0 where they are not kept, with gradient to the encoder where they are."""
        return Codes(self._select(x_ND, pre_NF, choice) * choice.keep, choice.indices, choice.bags)

    def _select(self, x_ND: Tensor, pre_NF: Tensor, choice: Choice) -> Tensor:
        return select(x_ND, self.b_dec, self.W_enc, self.b_enc, pre_NF, choice.indices, choice.bags)

    def reconstruct(self, codes: Codes) -> Tensor:
        """Normalized tokens [N, D] from codes."""
        return decode(codes.values, codes.indices, self.W_dec, codes.bags) + self.b_dec

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from the decoder's gradient what is parallel to its rows; before the optimizer's step.

        The rows are brought back to unit norm after the step; the parallel part would only disturb the optimizer's
        moments.
        """
        if self.W_dec.grad is not None:
            project_rows(self.W_dec.grad, self.W_dec)

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of all parameters, 0-dimensional."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    @property
    def step_shape(self) -> tuple[object, ...]:
        """What decides the shapes of a training step: SAEs in which it is equal can be stacked."""
        config = self.config
        annealing = getattr(config, "k", None), getattr(config, "k_anneal_steps", None)
        return type(config), *annealing, self.W_enc.shape

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Bring the decoder's rows to unit norm; after the optimizer's step."""
        normalize_rows(self.W_dec)

    def anneal(self, step: int, steps: int, fullness: float = 1.0) -> None:
        """Set what changes in the course of training, for step `step` (from 0) of `steps`.

        BatchTopK's threshold is a mean over the last tenth of the steps so far, until its momentum makes it longer:
        early in a run pre-activations change faster than a slow mean follows. [RECON] After 200 steps with the momentum
        alone, held-out tokens kept 14 latents instead of 32. A short batch has less weight: the smallest kept value of
        a single token is far above that of thousands.

        Args:
            step: From 0.
            steps: Length of the run.
            fullness: Tokens of the batch, relative to a full one.
        """
        if isinstance(self.sparsifier, BatchTopK):
            rate = max(self.sparsifier.momentum, min(1.0, _LOOK_BACK / (step + 1)))
            self.sparsifier.rate.set(rate * fullness)
        if isinstance(self.config, TopKConfig | BatchTopKConfig | AbsTopKConfig):
            assert isinstance(self.sparsifier, TopK | BatchTopK | AbsTopK)
            self.sparsifier.k = self.config.k_at(step, steps, self.channels)

    @torch.no_grad()
    def fold(self) -> SAE:
        """The same SAE with the normalization folded into its weights: same codes, same reconstruction of raw tokens.

        With x_n = (x - m) A:  W_enc' = W_enc A^T,  b_dec' = b_dec A^-1 + m,  W_dec' = W_dec A^-1,  b_enc' = b_enc. For
        A = 1 / s the decoder's rows then have norm s; after whitening each has a norm of its own.
        """
        normalization, f64 = self.normalization, torch.float64
        scale = normalization.scale.to(f64)
        apply = normalization.whiten.to(f64) if normalization.whiten is not None else 1 / scale * _eye(self)
        undo = normalization.unwhiten.to(f64) if normalization.unwhiten is not None else scale * _eye(self)
        plain = self.config.normalization.model_copy(update={"center": False, "scale": False, "whitening": "none"})
        folded = SAE(self.config.model_copy(update={"normalization": plain}), Normalization.identity(self.channels))
        folded.to(device=self.W_dec.device, dtype=self.W_dec.dtype)
        weights = {
            "W_enc": self.W_enc.to(f64) @ apply.T,
            "W_dec": self.W_dec.to(f64) @ undo,
            "b_dec": self.b_dec.to(f64) @ undo + normalization.mean.to(f64),
        }
        kept = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("normalization.")}
        folded.load_state_dict(
            {**folded.state_dict(), **kept, **{n: w.to(self.W_dec.dtype) for n, w in weights.items()}}
        )
        return folded.train(self.training)


@torch.no_grad()
def project_rows(gradient_FD: Tensor, rows_FD: Tensor) -> None:
    """Remove from each row of `gradient_FD` what is parallel to the unit row of `rows_FD`, in place."""
    # On a CPU in blocks that stay in its cache: both arrays are far larger, and are read once instead of three times.
    size = _CACHED_ROWS if gradient_FD.device.type == "cpu" else max(1, len(gradient_FD))
    for gradient, rows in zip(gradient_FD.split(size), rows_FD.split(size), strict=True):
        gradient.addcmul_((gradient * rows).sum(dim=1, keepdim=True), rows, value=-1)


@torch.no_grad()
def normalize_rows(rows_FD: Tensor) -> None:
    """Divide rows by their norms, in place."""
    size = _CACHED_ROWS if rows_FD.device.type == "cpu" else max(1, len(rows_FD))
    for rows in rows_FD.split(size):
        rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))


def _eye(sae: SAE) -> Tensor:
    return torch.eye(sae.channels, dtype=torch.float64, device=sae.W_dec.device)
