"""A dictionary split over ranks: each holds F / ranks of the latents, and all see every token.

    tokens ─▶ own pre-activations ─▶ own candidates ─┬─▶ the k-th largest of all ─▶ own codes ─▶ own part of x^ ─┬─▶ x^
                                     other ranks ────┘                              other ranks ─────────────────┘

Exchanged per step: k candidates per token and rank, the reconstruction, and the gradient of the encoder's input with
respect to the decoder bias. A checkpoint and an export hold the whole dictionary, as if written by one process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from tubelet.errors import TubeletError
from tubelet_trainer.process_group import ProcessGroup
from tubelet_trainer.sae.config import BatchTopKConfig, Flat, TopKConfig
from tubelet_trainer.sae.model import SAE, Codes
from tubelet_trainer.sae.sparse_ops import decode, select
from tubelet_trainer.sae.sparsifiers import BatchTopK, Choice, TopK

# Names of tensors with one row per latent, in the state of an SAE and of its training.
_PER_LATENT = {"W_enc", "b_enc", "W_dec", "silent_tokens"}


class ShardedSAE(SAE):
    """This rank's part of an SAE's latents. Codes and indices are of this part; reconstructions are whole.

    Args:
        whole: All of it, the same on every rank.
        ranks: Who holds the parts.

    Raises:
        TubeletError: the dictionary does not divide, or the kind of SAE is not one that can be split.
    """

    def __init__(self, whole: SAE, ranks: ProcessGroup) -> None:
        nn.Module.__init__(self)
        config = whole.config
        if not isinstance(config, TopKConfig | BatchTopKConfig) or not isinstance(config.nesting, Flat):
            kind = f"{type(config).__name__} with nesting {config.nesting.kind}"
            raise TubeletError(
                f"A dictionary of {kind} cannot be split over ranks",
                "Use --parallel data, or a flat SAE of kind topk or batchtopk",
            )
        if whole.latents % ranks.size:
            raise TubeletError(
                f"{whole.latents} latents do not divide into {ranks.size} ranks",
                f"Set sae.latents to a multiple of {ranks.size}",
            )
        self.config, self.normalization, self.channels = config, whole.normalization, whole.channels
        self.latents = whole.latents // ranks.size
        self.ranks = ranks
        own = slice(ranks.rank * self.latents, (ranks.rank + 1) * self.latents)
        self.W_enc = nn.Parameter(whole.W_enc.detach()[own].clone())
        self.b_enc = nn.Parameter(whole.b_enc.detach()[own].clone())
        self.W_dec = nn.Parameter(whole.W_dec.detach()[own].clone())
        self.b_dec = nn.Parameter(whole.b_dec.detach().clone())
        if isinstance(config, TopKConfig):
            self.sparsifier = ShardedTopK(config.k, ranks)
        else:
            sparsifier = RankedBatchTopK(config.k, config.threshold_momentum, ranks, "latents")
            self.sparsifier = sparsifier.to(self.W_dec.device)

    def activate(self, x_ND: Tensor, pre_NF: Tensor) -> Codes:
        """As `SAE.activate`, of this rank's latents."""
        return self.choose(x_ND, pre_NF, self.sparsifier(pre_NF))

    def _select(self, x_ND: Tensor, pre_NF: Tensor, choice: Choice) -> Tensor:
        # The bias gets the gradient of all ranks' latents.
        b_dec = self.ranks.shared(self.b_dec)
        return select(x_ND, b_dec, self.W_enc, self.b_enc, pre_NF, choice.indices, choice.bags)

    def reconstruct(self, codes: Codes) -> Tensor:
        """Normalized tokens [N, D] from all ranks' codes."""
        return self.ranks.total(decode(codes.values, codes.indices, self.W_dec, codes.bags)) + self.b_dec

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Norm of the gradients of the whole SAE."""
        named = [(name, p.grad) for name, p in self.named_parameters() if p.grad is not None]
        norms = torch._foreach_norm([gradient for _, gradient in named])
        squares = {name: norm.square() for (name, _), norm in zip(named, norms, strict=True)}
        own = torch.stack([square for name, square in squares.items() if name in _PER_LATENT]).sum()
        common = torch.stack([square for name, square in squares.items() if name not in _PER_LATENT]).sum()
        return (self.ranks.sum(own) + common).sqrt()

    def gathered(self) -> SAE | None:
        """The whole SAE, in the first rank's host memory; None on the others. A collective call."""
        state = gather_state(self.state_dict(), self.ranks)
        if not self.ranks.first:
            return None
        config = self.config.model_copy(update={"latents": self.latents * self.ranks.size})
        whole = SAE(config, copy.deepcopy(self.normalization).cpu()).to(dtype=self.W_dec.dtype)
        whole.load_state_dict(state)
        return whole


class ShardedTopK(TopK):
    """The k largest of each token over the latents of all ranks."""

    stackable = False

    def __init__(self, k: int, ranks: ProcessGroup) -> None:
        super().__init__(k)
        self.ranks = ranks

    def forward(self, pre_NF: Tensor) -> Choice:
        """This rank's among the k largest of each token; ties at the smallest of them are all kept."""
        top = pre_NF.topk(min(self.k, pre_NF.shape[1]), dim=1, sorted=False)
        cut_N1 = largest_over_ranks(top.values, self.k, self.ranks)
        return Choice(top.indices, (top.values > 0) & (top.values >= cut_N1))


class RankedBatchTopK(BatchTopK):
    """BatchTopK over a batch whose tokens, or latents, are split over ranks.

    How many of the kept entries are on a rank is known to the device only. [RECON] Each makes room for twice its even
    share, and drops what exceeds that (never with two ranks): more room would cost memory and time in every step.
    """

    stackable = False

    def __init__(self, k: int, momentum: float, ranks: ProcessGroup, split: Literal["tokens", "latents"]) -> None:
        super().__init__(k, momentum)
        self.ranks = ranks
        self.split = split
        self.whole: int | None = None
        """Tokens of the batch over all ranks; None: as many as there are here."""

    def budget(self, pre_NF: Tensor) -> int:
        """Capacity of this rank, in entries."""
        return min(2 * -(-self._all(pre_NF) // self.ranks.size), pre_NF.numel())

    def _all(self, pre_NF: Tensor) -> int:
        return self.k * (len(pre_NF) if self.whole is None or self.split == "latents" else self.whole)

    def chosen(self, values_E: Tensor, places_E: Tensor, pre_NF: Tensor) -> Choice:
        """As `BatchTopK.chosen`, of this rank's part of the batch."""
        wanted = self._all(pre_NF)
        most = 2 * -(-wanted // self.ranks.size)
        # Padded with zeros, which are never kept.
        candidates = self.ranks.gather(values_E.relu(), most)
        self._cut = candidates.topk(min(wanted, len(candidates)), sorted=False).values.min()
        return super().chosen(values_E, places_E, pre_NF)

    def _keep(self, values_E: Tensor) -> Tensor:
        return (values_E > 0) & (values_E >= self._cut)

    def _learn(self, smallest: Tensor) -> None:
        super()._learn(self.ranks.min(smallest))


def split_batch(sae: SAE, ranks: ProcessGroup) -> None:
    """Make `sae` choose over the whole batch where each rank holds some of its tokens."""
    if ranks.size > 1 and isinstance(sae.sparsifier, BatchTopK):
        sparsifier = RankedBatchTopK(sae.sparsifier.k, sae.sparsifier.momentum, ranks, "tokens")
        sae.sparsifier = sparsifier.to(sae.W_dec.device)


def largest_over_ranks(values_NK: Tensor, k: int, ranks: ProcessGroup) -> Tensor:
    """[N, 1] The k-th largest of each token over all ranks' candidates."""
    candidates = ranks.gather(values_NK.detach()).view(ranks.size, *values_NK.shape)
    merged = candidates.permute(1, 0, 2).reshape(len(values_NK), -1)
    return merged.topk(min(k, merged.shape[1]), dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def gather_state(tensors: Mapping[str, Tensor], ranks: ProcessGroup) -> dict[str, Tensor]:
    """State of the whole dictionary from this rank's, on the first rank's host; a collective call."""
    return {name: ranks.gather_on_first(t) if _per_latent(name) else t.detach().cpu() for name, t in tensors.items()}


def own_state(tensors: Mapping[str, Tensor], ranks: ProcessGroup) -> dict[str, Tensor]:
    """This rank's part of what `gather_state` gave."""
    return {
        name: tensor.tensor_split(ranks.size)[ranks.rank] if _per_latent(name) else tensor
        for name, tensor in tensors.items()
    }


def _per_latent(name: str) -> bool:
    *_, last = name.split("/")
    return last != "step" and any(part.rpartition(".")[2] in _PER_LATENT for part in name.split("/"))
