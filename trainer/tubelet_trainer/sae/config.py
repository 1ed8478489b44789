"""The recipe of one sparse autoencoder: which parts it is composed of.

    normalization ─▶ linear encoder ─▶ sparsifier (`kind`) ─▶ linear decoder, read whole or in prefixes (`nesting`)

| paper | kind | nesting |
|---|---|---|
| ReLU + L1 (Bricken 2023, saev) | `relu` | `flat` |
| Gated (Rajamanoharan 2024a) | `gated` | `flat` |
| TopK + AuxK (Gao 2024) | `topk` | `flat` |
| BatchTopK (Bussmann 2024) | `batchtopk` | `flat` |
| JumpReLU (Rajamanoharan 2024b) | `jumprelu` | `flat` |
| AbsTopK (2510.00404) | `abstopk` | `flat` |
| Matryoshka, fixed groups (Bussmann 2025) | `batchtopk` | `groups` |
| Matryoshka, random prefixes (Abeshima; saev) | any | `random` |
| Matryoshka over k, MSAE (Zaigrajew 2025) | `topk` | `ks` |
| HierarchicalTopK (flexsae) | `topk` | `hierarchical` |

Every other combination works too, save that nesting over k needs a k per token.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tubelet.config import Config, misfit


class NormalizationConfig(Config):
    """How tokens are centered, scaled or whitened with the store's moments. Folded into the weights at export."""

    center: bool = True
    """Subtract the mean of all tokens."""
    scale: bool = True
    """Divide by one number, so that the total variance of the tokens equals their number of channels."""
    whitening: Literal["none", "zca", "pca"] = "none"
    """Give all directions the same variance: zca rotates back to the channels, pca stays in the principal axes."""
    shrinkage: float = Field(default=1e-3, gt=0)
    """Whitening: this fraction of the mean variance is added to the variance of each principal direction."""


class InitConfig(Config):
    """Initial weights. The encoder starts as a copy of the decoder's transpose."""

    directions: Literal["random", "data", "active_subspace"] = "random"
    """Decoder rows. data: 0.8 (token - mean) + 0.2 Kaiming noise (saev); active_subspace: random within the leading
    principal directions of a batch (OpenMOSS)."""
    bias: Literal["mean", "geometric_median"] = "mean"
    """Initial decoder bias."""
    subspace: int | None = Field(default=None, ge=1)
    """active_subspace: number of principal directions. Default: half the channels."""
    tokens: int = Field(default=16_384, ge=2)
    """Maximum number of training tokens that the initialization reads, the first of the run's order."""


class Flat(Config):
    """One reconstruction, from the whole code."""

    kind: Literal["flat"] = "flat"


class Groups(Config):
    """Matryoshka with fixed groups: the same prefixes of the dictionary in every step (Bussmann et al. 2025)."""

    kind: Literal["groups"] = "groups"
    fractions: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.0625, 0.125, 0.25, 0.5625), min_length=1)
    """Share of the dictionary in each group, first to last; normalized to sum 1."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weight of each prefix's reconstruction; normalized to sum 1. Default: equal."""
    bias_alone: bool = True
    """The decoder bias alone counts as the first prefix, with the mean weight, as in Bussmann's code."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> Groups:
        if self.weights is not None and len(self.weights) != len(self.fractions):
            raise ValueError(f"{len(self.weights)} weights for {len(self.fractions)} fractions")
        if self.weights is not None and sum(self.weights) == 0:
            raise ValueError("all weights are 0")
        return self

    def sizes(self, latents: int) -> tuple[int, ...]:
        """Length of each prefix of `latents`; every group holds at least one latent where there are enough."""
        total, reached = sum(self.fractions), 0.0
        sizes: list[int] = []
        for number, fraction in enumerate(self.fractions):
            reached += fraction
            left = len(self.fractions) - 1 - number
            lowest = (sizes[-1] if sizes else 0) + 1
            sizes.append(max(lowest, min(round(latents * reached / total), latents - left)))
        return (*sizes[:-1], latents)


class RandomPrefixes(Config):
    """Matryoshka with prefixes sampled in every step, the last one whole (Abeshima 2024; saev)."""

    kind: Literal["random"] = "random"
    prefixes: int = Field(default=10, ge=1)
    """Prefixes per step."""
    power: float = Field(default=0.5, gt=0)
    """Pareto power: P(length > l) is proportional to l^-power."""
    sort_every: int | None = Field(default=100, ge=1)
    """Steps between sortings of the latents by running energy, so that the strongest are in most prefixes (Abeshima
    2024 sorts in every step). null: never."""


class NestedK(Config):
    """Matryoshka over k: reconstructions from the largest k_1 < k_2 < ... values of a code (MSAE, Zaigrajew et al.
    2025)."""

    kind: Literal["ks"] = "ks"
    ks: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Ascending, the last one `sae.k`. Default: sae.k and its halves, down to 4."""
    weights: Literal["uniform", "reverse"] = "uniform"
    """uniform (UW): all 1; reverse (RW): n, n-1, ..., 1, the largest weight for the smallest k."""


class Hierarchical(Config):
    """Reconstructions from every number of values from 1 to k (HierarchicalTopK)."""

    kind: Literal["hierarchical"] = "hierarchical"
    levels: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Only these numbers of values, ascending, the last one `sae.k`. Default: all of 1, 2, ..., k."""


def _kind_defaults_to(name: str) -> BeforeValidator:
    def add(section: Any) -> Any:
        return {"kind": name, **section} if isinstance(section, dict) else section

    return BeforeValidator(add)


AnyNesting = Annotated[
    Annotated[Flat | Groups | RandomPrefixes | NestedK | Hierarchical, Field(discriminator="kind")],
    _kind_defaults_to("flat"),
]


class SAEConfig(Config):
    """Fields of all kinds of SAE. Use one of the kinds below."""

    expansion: int = Field(default=8, ge=1)
    """Latents per channel; `latents` overrides it."""
    latents: int | None = Field(default=None, ge=1)
    """Dictionary size F. Default: expansion x channels."""
    normalization: NormalizationConfig = NormalizationConfig()
    """How tokens are normalized."""
    init: InitConfig = InitConfig()
    """Initial weights."""
    nesting: AnyNesting = Flat()
    """Parts of the code that must reconstruct on their own (Matryoshka)."""
    auxk: int | None = Field(default=None, ge=0)
    """Dead latents per token that model the residual (AuxK). Default: half the channels for the kinds with a k, else 0
    (off)."""
    auxk_coef: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK term (Gao et al. 2024, arXiv 2406.04093)."""
    dead_after_tokens: int | None = Field(default=None, ge=1)
    """A latent is dead after this many tokens without firing. Default: 10 million, at most a tenth of the run."""
    seed: int = 0
    """Seed of the initial weights and of everything else sampled for this SAE."""

    @model_validator(mode="after")
    def _nests(self) -> SAEConfig:
        if not isinstance(self.nesting, NestedK | Hierarchical):
            return self
        k = self.k if isinstance(self, TopKConfig | AbsTopKConfig) else None
        if k is None:
            raise misfit("nesting.kind", "it needs the same k for each token: kind topk or abstopk")
        name = "ks" if isinstance(self.nesting, NestedK) else "levels"
        levels = getattr(self.nesting, name)
        if levels is not None and (list(levels) != sorted(set(levels)) or levels[-1:] != (k,)):
            raise misfit(f"nesting.{name}", f"the numbers must ascend and end with k {k}")
        return self

    def latents_for(self, channels: int) -> int:
        """Dictionary size F for tokens of `channels` channels."""
        return self.latents or self.expansion * channels

    def auxk_for(self, channels: int) -> int:
        """Most dead latents per token in the AuxK term; 0: no such term."""
        if self.auxk is not None:
            return self.auxk
        return max(1, channels // 2) if isinstance(self, _KConfig) else 0


class _KConfig(SAEConfig):
    """Kinds with a number of active latents."""

    k: int = Field(default=32, ge=1)
    """Active latents per token."""
    k_anneal_steps: int = Field(default=0, ge=0)
    """Steps over which k falls linearly from the number of channels to its final value, at most half the run."""

    @model_validator(mode="after")
    def _k_fits(self) -> _KConfig:
        if self.latents is not None and self.k > self.latents:
            raise misfit("k", f"{self.k} is more than the {self.latents} latents")
        return self

    def k_at(self, step: int, steps: int, channels: int) -> int:
        """k used in training step `step` (from 0) of `steps` (dictionary_learning: annealed from d to k)."""
        anneal = min(self.k_anneal_steps, steps // 2)
        start = max(self.k, min(channels, self.latents_for(channels)))
        if step >= anneal:
            return self.k
        return round(start + (self.k - start) * step / anneal)


class TopKConfig(_KConfig):
    """Keep the k largest pre-activations of every token (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"


class BatchTopKConfig(_KConfig):
    """Keep the B k largest of a training batch of B tokens; at inference all above a learned threshold (Bussmann et al.
    2024)."""

    kind: Literal["batchtopk"] = "batchtopk"
    threshold_momentum: float = Field(default=0.01, gt=0, le=1)
    """Weight of the newest batch in the running threshold (0.01: Bussmann's code; 0.001: dictionary_learning)."""


class AbsTopKConfig(_KConfig):
    """Keep the k pre-activations of largest magnitude, with their sign: codes may be negative (arXiv 2510.00404)."""

    kind: Literal["abstopk"] = "abstopk"


class _PenalizedConfig(SAEConfig):
    """Kinds made sparse by a penalty."""

    sparsity_warmup_steps: int = Field(default=500, ge=0)
    """Steps over which the penalty rises linearly from 0, at most a tenth of the run (500: saev)."""
    target_l0: float | None = Field(default=None, gt=0)
    """Target number of active latents per token. A controller adapts the penalty weight, starting at `sparsity`, within
    a factor of 1000. Default: the weight stays at `sparsity`."""


class ReLUConfig(_PenalizedConfig):
    """All positive pre-activations, sparse because of an L1 penalty (Bricken et al. 2023; saev)."""

    kind: Literal["relu"] = "relu"
    sparsity: float = Field(default=8e-4, gt=0)
    """Weight of the codes' L1 norm (4e-4 to 1.6e-3 in saev, on the same scale)."""


class GatedConfig(_PenalizedConfig):
    """A gate decides which latents are active, a second path their values (Rajamanoharan et al. 2024a)."""

    kind: Literal["gated"] = "gated"
    sparsity: float = Field(default=8e-4, gt=0)
    """Weight of the L1 norm of the gates' positive pre-activations."""


class JumpReLUConfig(_PenalizedConfig):
    """All pre-activations above a learned threshold per latent (Rajamanoharan et al. 2024b).

    Bandwidth and initial threshold are in standard deviations of a channel (root mean square, after normalization): the
    spread of the pre-activation of a direction of length 1, whatever the number of channels.
    """

    # [RECON] The paper's 1e-3 is for tokens of mean squared norm 1; here it is 1e-3 sqrt(D), 0.06 for 3584 channels.
    # Adam moves the logarithm of a threshold, by at most the learning rate per step, so a short run that starts so low
    # does not arrive. After 3000 steps of 2048 latents for 256 channels, target_l0 16, with bandwidth and initial
    # threshold alike: L0 47 from 0.06 (the weight at its limit), 13.5 from 0.3 (there for 1000 steps), 13.2 from 1
    # (never near it). 96 latents for 12 channels, target_l0 4: L0 4.1 or 4.2 from 0.03, 0.1, 0.3 and 1.

    kind: Literal["jumprelu"] = "jumprelu"
    penalty: Literal["linear", "quadratic"] = "linear"
    """linear: sparsity x L0; quadratic: sparsity x (L0 / target_l0 - 1)^2, with a constant weight."""
    sparsity: float = Field(default=1e-3, gt=0)
    """Weight of the penalty."""
    bandwidth: float = Field(default=1.0, gt=0)
    """Width of the rectangle kernel of the thresholds' pseudo-gradient, in standard deviations of a channel."""
    initial_threshold: float = Field(default=1.0, gt=0)
    """Initial thresholds, in standard deviations of a channel."""

    @model_validator(mode="after")
    def _has_target(self) -> JumpReLUConfig:
        if self.penalty == "quadratic" and self.target_l0 is None:
            raise misfit("target_l0", "penalty quadratic needs one")
        return self


AnySAEConfig = Annotated[
    Annotated[
        TopKConfig | BatchTopKConfig | AbsTopKConfig | ReLUConfig | GatedConfig | JumpReLUConfig,
        Field(discriminator="kind"),
    ],
    _kind_defaults_to("topk"),
]
