"""Terms that make codes coherent in time and space.

    anchors x_a ─▶ g(z_a) ─┐
                           ├─ similarity [A, A] ─▶ symmetric InfoNCE, each anchor against its own neighbor
    neighbors x_a' ─▶ g(z_a') ┘                  negatives: neighbors of anchors of *other* clips

[RECON] The paper on spatio-temporal SAEs for video (arXiv 2604.03919) publishes no formulas. These are reconstructed,
closest to T-SAE (Bhalla et al., arXiv 2511.05541), whose paper uses the cosine and whose code uses the raw dot product
without temperature. What is compared, g, matters:

    pre      ReLU of all pre-activations: the gradient reaches latents that were not chosen, so it can change which are
    post     the codes: the gradient only rescales latents that were chosen
    prefix   the first latents of the codes, which then carry what stays the same (T-SAE)

Neighbors pass the sparsifier separately; only anchors are reconstructed (T-SAE's code).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_trainer.config import ObjectiveConfig
from tubelet_trainer.data.batch import Pairs
from tubelet_trainer.losses.objective import Forward, Term, TermFunction
from tubelet_trainer.sae.config import AbsTopKConfig, Groups, SAEConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sharded import RankedBatchTopK
from tubelet_trainer.sae.sparse_ops import decode, densify, every_latent, select
from tubelet_trainer.sae.sparsifiers import Sparsifier

Kind = Literal["temporal", "spatial"]

# Share of T-SAE's high-level latents.
_PREFIX_FRACTION = 0.2

# [RECON] T-SAE gives no temperature for its cosine: 0.1 is common for InfoNCE. Its code has none for the dot product.
_TEMPERATURE = {"cosine": 0.1, "dot": 1.0}


def coherence_terms(config: ObjectiveConfig, sae: SAEConfig, latents: int, variance: float) -> list[TermFunction]:
    """The terms with a weight above 0.

    Args:
        config: Weights and what is compared.
        sae: The recipe, whose groups may set the prefix.
        latents: F.
        variance: As in `Reconstruction`.
    """
    prefix = prefix_length(config, sae, latents)
    terms: list[TermFunction] = []
    if config.lambda_t:
        terms.append(Contrast("temporal", config.lambda_t, config, prefix))
    if config.lambda_s:
        terms.append(Contrast("spatial", config.lambda_s, config, prefix))
    if config.lambda_smooth:
        terms.append(Smoothness(config.lambda_smooth, config, prefix))
    if config.lambda_slow:
        terms.append(SlowReconstruction(config.lambda_slow, prefix, variance))
    return terms


def prefix_length(config: ObjectiveConfig, sae: SAEConfig, latents: int) -> int:
    """Latents in the prefix: as configured, else the first Matryoshka group, else a fifth of the dictionary."""
    if config.prefix_fraction is None and isinstance(sae.nesting, Groups):
        return sae.nesting.sizes(latents)[0]
    return max(1, round((config.prefix_fraction or _PREFIX_FRACTION) * latents))


@dataclass(frozen=True)
class _Views:
    """What a term compares: anchors and their neighbors, over all ranks."""

    pairs: Pairs
    anchor_AG: Tensor
    neighbor_AG: Tensor
    clip_A: Tensor
    valid_A: Tensor
    """bool: the anchor has a neighbor, and neither is a repeated frame."""

    @classmethod
    def of(cls, forward: Forward, kind: Kind, config: ObjectiveConfig, prefix: int) -> _Views:
        batch = forward.batch
        pairs = None if batch is None else batch.temporal if kind == "temporal" else batch.spatial
        if batch is None or pairs is None:
            raise ValueError(f"the batch was drawn without {kind} pairs")
        sae, gather = forward.sae, forward.ranks.gather
        with _exact(forward):
            x_AD = sae.normalization(pairs.hooks[forward.hook])
        if config.codes == "pre":
            anchor_AG = _pre(sae, forward.x_BD[pairs.rows], forward.pre_BF[pairs.rows])
            neighbor_AG = _pre(sae, x_AD, sae.pre_activations(x_AD))
        else:
            codes = forward.codes
            if codes.bags is None:
                anchor_AG = densify(codes.values[pairs.rows], codes.indices[pairs.rows], sae.latents)
            else:
                anchor_AG = codes.dense(sae.latents)[pairs.rows]
            with _aside(sae.sparsifier, pairs.whole):
                neighbor_AG = sae.activate(x_AD, sae.pre_activations(x_AD)).dense(sae.latents)
        if config.codes == "prefix":
            anchor_AG, neighbor_AG = anchor_AG[:, :prefix], neighbor_AG[:, :prefix]
        return cls(
            pairs=pairs,
            anchor_AG=gather(anchor_AG, pairs.most),
            neighbor_AG=gather(neighbor_AG, pairs.most),
            clip_A=gather(batch.clip[pairs.rows], pairs.most),
            valid_A=gather(pairs.valid.int(), pairs.most) > 0,
        )


def _exact(forward: Forward) -> torch.autocast:
    """Float32: whitening in low precision would lose the directions of small variance, which it amplifies."""
    return torch.autocast(forward.x_BD.device.type, enabled=False)


def _pre(sae: SAE, x_AD: Tensor, pre_AF: Tensor) -> Tensor:
    """What `codes: pre` compares, with its gradient."""
    pre_AF = select(x_AD, sae.b_dec, sae.W_enc, sae.b_enc, pre_AF, every_latent(pre_AF))
    return pre_AF if isinstance(sae.config, AbsTopKConfig) else pre_AF.relu()


@contextmanager
def _aside(sparsifier: Sparsifier, tokens: int) -> Iterator[None]:
    """Let `sparsifier` choose from `tokens` (over all ranks), apart from the batch, without changing its threshold."""
    before = {name: buffer.clone() for name, buffer in sparsifier.named_buffers()}
    ranked = sparsifier if isinstance(sparsifier, RankedBatchTopK) else None
    whole = None if ranked is None else ranked.whole
    try:
        if ranked is not None:
            ranked.whole = tokens
        yield
    finally:
        if ranked is not None:
            ranked.whole = whole
        for name, buffer in sparsifier.named_buffers():
            buffer.copy_(before[name])


def info_nce(
    anchor_AG: Tensor,
    neighbor_AG: Tensor,
    clip_A: Tensor,
    valid_A: Tensor,
    similarity: Literal["cosine", "dot"] = "cosine",
    temperature: float = 0.1,
) -> Tensor:
    """Symmetric InfoNCE, 0-dimensional: the mean of both directions over valid pairs.

        s_ij = sim(anchor_i, neighbor_j) / temperature
        L = -1/(2N) sum_i log [e^s_ii / (e^s_ii + sum_{j: clip_j != clip_i} e^s_ij)]
            -1/(2N) sum_j log [e^s_jj / (e^s_jj + sum_{i: clip_i != clip_j} e^s_ij)]

    Sums are over valid pairs only. Tokens of the same clip are never negatives: neighboring patches would be pushed
    apart. T-SAE's code halves the sum of both directions, as here; its paper does not.

    Args:
        anchor_AG: [A, G]
        neighbor_AG: [A, G] Row i belongs to anchor i.
        clip_A: Clip of each pair.
        valid_A: bool; where False a pair is neither compared nor a negative.
        similarity: Cosine or raw dot product.
        temperature: Divides similarities.
    """
    if similarity == "cosine":
        anchor_AG, neighbor_AG = nnf.normalize(anchor_AG, dim=1), nnf.normalize(neighbor_AG, dim=1)
    # A raw product is unbounded: bfloat16 would round it to 8 bits. A cosine loses at most 1 % of its gradient.
    exact = nullcontext() if similarity == "cosine" else torch.autocast(anchor_AG.device.type, enabled=False)
    with exact:
        s_AA = (anchor_AG @ neighbor_AG.T).to(anchor_AG.dtype) / temperature
    own_AA = torch.eye(len(s_AA), dtype=torch.bool, device=s_AA.device)
    other_AA = clip_A[:, None] != clip_A[None, :]
    positive_A = s_AA.diagonal()
    forwards_A = s_AA.masked_fill(~(own_AA | other_AA & valid_A[None, :]), -torch.inf).logsumexp(1) - positive_A
    backwards_A = s_AA.masked_fill(~(own_AA | other_AA & valid_A[:, None]), -torch.inf).logsumexp(0) - positive_A
    return torch.where(valid_A, forwards_A + backwards_A, 0).sum() / (2 * valid_A.sum().clamp_min(1))


class Contrast:
    """weight x InfoNCE between anchors and their neighbors (see `info_nce`).

    Args:
        kind: In time or in space.
        weight: lambda.
        config: What is compared, and how.
        prefix: Latents in the prefix.
    """

    def __init__(self, kind: Kind, weight: float, config: ObjectiveConfig, prefix: int) -> None:
        self.kind: Kind = kind
        self.weight, self.config, self.prefix = weight, config, prefix
        self.temperature = config.temperature or _TEMPERATURE[config.similarity]

    def __call__(self, forward: Forward) -> Term:
        """Metrics, named after the kind: `_nce` (unweighted), `_pairs` (compared), `_dropped` (share of the others'
        pairs of which one code is all zero, whose cosine is undefined).

        Raises:
            TubeletError: all anchors come from one clip: there are no negatives.
        """
        views = _Views.of(forward, self.kind, self.config, self.prefix)
        if not views.pairs.several_clips:
            raise TubeletError(
                f"The {self.kind} contrast has no negatives: all anchors of a batch come from one clip",
                "Raise pairs.anchors, batch_tokens or window_tokens, or train on more clips",
            )
        zero_A = ~(views.anchor_AG != 0).any(dim=1) | ~(views.neighbor_AG != 0).any(dim=1)
        kept_A = views.valid_A & ~zero_A
        loss = info_nce(
            views.anchor_AG, views.neighbor_AG, views.clip_A, kept_A, self.config.similarity, self.temperature
        )
        dropped = (views.valid_A & zero_A).sum() / views.valid_A.sum().clamp_min(1)
        metrics = {"nce": loss.detach(), "pairs": kept_A.sum(), "dropped": dropped}
        return Term(self.weight * loss, {f"{self.kind}_{name}": value for name, value in metrics.items()})


class Smoothness:
    """weight x mean over temporal pairs of max(cos(x, x'), 0) ||z - z'||_1: T-SAE's alternative without negatives.

    The cosine is of raw tokens, as in T-SAE's code. They share a mean, so it is nearly always positive. [RECON] Where
    it is negative the pair has weight 0: a negative weight would reward distance, without bound.

    Args:
        weight: lambda.
        config: What is compared.
        prefix: Latents in the prefix.
    """

    def __init__(self, weight: float, config: ObjectiveConfig, prefix: int) -> None:
        self.weight, self.config, self.prefix = weight, config, prefix

    def __call__(self, forward: Forward) -> Term:
        """Metrics: `smoothness` (unweighted), `smoothness_pairs`."""
        assert forward.batch is not None
        views = _Views.of(forward, "temporal", self.config, self.prefix)
        pairs, gather = views.pairs, forward.ranks.gather
        with _exact(forward):
            x_AD = gather(forward.sae.normalization.inverse(forward.x_BD[pairs.rows]), pairs.most)
        other_AD = gather(pairs.hooks[forward.hook], pairs.most)
        alike_A = nnf.cosine_similarity(x_AD, other_AD, dim=1).relu()
        distance_A = (views.anchor_AG - views.neighbor_AG).abs().sum(dim=1)
        compared = views.valid_A.sum()
        weighted_A = torch.where(views.valid_A, alike_A * distance_A, 0)
        loss = weighted_A.sum() / compared.clamp_min(1)
        return Term(self.weight * loss, {"smoothness": loss.detach(), "smoothness_pairs": compared})


class SlowReconstruction:
    """weight x ||x - (z_{0:h} D_{0:h} + b_dec)||^2 / variance: the prefix alone must reconstruct (T-SAE's L_matr).

    With a temporal term on the prefix it splits the dictionary: slow latents first, fast ones after.

    Args:
        weight: Of the term.
        prefix: h.
        variance: As in `Reconstruction`.
    """

    def __init__(self, weight: float, prefix: int, variance: float) -> None:
        self.weight, self.prefix, self.variance = weight, prefix, variance

    def __call__(self, forward: Forward) -> Term:
        """Metrics: `slow` (unweighted)."""
        sae, codes = forward.sae, forward.codes
        slow = codes.values * (codes.indices < self.prefix)
        recon_BD = decode(slow, codes.indices, sae.W_dec, codes.bags) + sae.b_dec
        loss = forward.per_token((forward.x_BD - recon_BD).square().sum()) / self.variance
        return Term(self.weight * loss, {"slow": loss.detach()})
