"""The recipe of one sparse autoencoder: its size, its sparsifier, how dead latents are revived."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tubelet_store.config import Config


class SAEConfig(Config):
    """What all kinds of SAE share. Use one of its kinds: `TopKConfig`, `BatchTopKConfig`."""

    expansion: int = Field(default=8, ge=1)
    """Latents per channel; `latents` overrides it."""
    latents: int | None = Field(default=None, ge=1)
    """Dictionary size F; none: expansion x channels."""
    k: int = Field(default=32, ge=1)
    """Active latents per token."""
    auxk: int | None = Field(default=None, ge=0)
    """Dead latents that model the residual (AuxK); none: half the channels, 0: off."""
    auxk_coef: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK term (Gao et al. 2024, arXiv 2406.04093)."""
    dead_after_tokens: int | None = Field(default=None, ge=1)
    """Tokens without firing after which a latent counts as dead; none: 10 million, at most a tenth of the run."""
    seed: int = 0
    """Chooses the initial weights."""

    @model_validator(mode="after")
    def _k_fits(self) -> SAEConfig:
        if self.latents is not None and self.k > self.latents:
            raise ValueError(f"k {self.k} is more than the {self.latents} latents")
        return self

    def latents_for(self, channels: int) -> int:
        """Dictionary size F for tokens of `channels` channels."""
        return self.latents or self.expansion * channels


class TopKConfig(SAEConfig):
    """Keep the k largest pre-activations of every token (Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"


class BatchTopKConfig(SAEConfig):
    """Keep the B k largest of a training batch; afterwards all above a learned threshold (Bussmann et al. 2024)."""

    kind: Literal["batchtopk"] = "batchtopk"
    threshold_momentum: float = Field(default=0.01, gt=0, le=1)
    """Weight of the newest batch in the running threshold (0.01: Bussmann's code; 0.001 in dictionary_learning)."""


def _kind_defaults_to_topk(section: Any) -> Any:
    return {"kind": "topk", **section} if isinstance(section, dict) else section


AnySAEConfig = Annotated[
    Annotated[TopKConfig | BatchTopKConfig, Field(discriminator="kind")], BeforeValidator(_kind_defaults_to_topk)
]
