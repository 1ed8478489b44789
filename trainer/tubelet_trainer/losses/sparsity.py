"""Sparsity penalties of the kinds without a k, with a weight that warms up and that an L0 controller may adapt.

    ReLU      sparsity x sum_j |z_j|                                      (decoder rows have norm 1)
    Gated     sparsity x sum_j ReLU(gate_j) + ||x - x^(ReLU(gate))||^2    (decoder frozen in the second)
    JumpReLU  sparsity x L0   or   sparsity x (L0 / target - 1)^2

A penalty is a term of the objective (see `tubelet_trainer.losses.objective`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tubelet_trainer.device_scalar import DeviceScalar
from tubelet_trainer.losses.objective import AuxK, Forward, Reconstruction, Term, TermFunction
from tubelet_trainer.sae.config import GatedConfig, JumpReLUConfig, RandomPrefixes, ReLUConfig, SAEConfig
from tubelet_trainer.sae.matryoshka import cuts
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sparse_ops import decode, every_latent
from tubelet_trainer.sae.sparsifiers import Choice, JumpReLU

# L0 controller: integral control on a logarithmic scale. [RECON] Each step multiplies the weight by (L0 / target) ^
# rate, by at most e ^ rate. From L0 40 to a target of 5 on planted features, 0.003 took 1500 steps, 0.01 600 with L0
# 4.3 on the way, 0.03 300; at full size L0 answers more slowly, so not the fastest.
_CONTROL_RATE = 0.01

# The L0 controller multiplies or divides the weight by at most this. [RECON] From the default weights an active latent
# then costs as much as all the variance there is to explain, or nothing: going further would only delay the recovery.
MAX_GAIN = 1000.0
_MAX_LOG_GAIN = math.log(MAX_GAIN)


class PenaltyWeight:
    """The weight of a penalty in the course of training.

    Args:
        weight: After warm-up, before control.
        warmup_steps: Steps of linear rise.
        target_l0: Active latents per token that the controller aims at; None: not controlled.
        device: Where the penalty is computed.
    """

    def __init__(self, weight: float, warmup_steps: int, target_l0: float | None, device: torch.device) -> None:
        self.weight = weight
        self.warmup_steps = warmup_steps
        self.target_l0 = target_l0
        self.log_gain = torch.zeros((), dtype=torch.float64, device=device)
        self._planned = DeviceScalar(0.0, torch.float64)
        self._rate = DeviceScalar(0.0, torch.float64)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Set the warm-up for step `step`, and whether the weight is controlled."""
        self._planned.set(self.weight * min(1.0, (step + 1) / (self.warmup_steps + 1)))
        self._rate.set(_CONTROL_RATE if self.target_l0 is not None and step >= self.warmup_steps else 0.0)

    def now(self) -> Tensor:
        """The weight in this step, 0-dimensional."""
        return self._planned.on(self.log_gain.device) * self.log_gain.exp()

    def observe(self, l0: Tensor) -> None:
        """Adapt the weight after a batch with `l0` active latents per token; not during warm-up."""
        if self.target_l0 is not None:
            # Without any active latent the excess is at the lower clamp.
            excess = (l0.double().clamp_min(1e-9) / self.target_l0).log().clamp(-1, 1)
            self.log_gain += self._rate.on(self.log_gain.device) * excess
            self.log_gain.clamp_(-_MAX_LOG_GAIN, _MAX_LOG_GAIN)

    def at_limit(self) -> Tensor:
        """0-dimensional: 1 at the upper limit of the weight, -1 at the lower one, else 0."""
        return torch.where(self.log_gain.abs() < _MAX_LOG_GAIN, 0, self.log_gain.sign())


class SparsityPenalty(ABC):
    """Base of the penalties: a weight, and its state for checkpoints."""

    def __init__(self, weight: PenaltyWeight) -> None:
        self.weight = weight

    @property
    def state(self) -> dict[str, Tensor]:
        """What a continued run needs, by reference."""
        return {"log_gain": self.weight.log_gain}

    def begin(self, _sae: SAE, step: int) -> None:
        """Set the weight of step `step`."""
        self.weight.begin(step)

    def __call__(self, forward: Forward) -> Term:
        """Metrics: `sparsity` (the unweighted penalty), `sparsity_weight`; if controlled, `sparsity_limit`."""
        weight = self.weight.now()
        penalty, unweighted = self.penalty(forward)
        active = forward.per_token((forward.codes.values.detach() != 0).sum())
        self.weight.observe(active)
        loss = weight.to(penalty.dtype) * penalty
        if unweighted is not None:
            loss = loss + unweighted
        metrics = {"sparsity": penalty.detach(), "sparsity_weight": weight}
        if self.weight.target_l0 is not None:
            metrics["sparsity_limit"] = self.weight.at_limit()
        return Term(loss, metrics)

    @abstractmethod
    def penalty(self, forward: Forward) -> tuple[Tensor, Tensor | None]:
        """The unweighted penalty, and a part of the loss that belongs to it but is not weighted with it."""


class L1Penalty(SparsityPenalty):
    """Mean L1 norm of the codes. With random prefixes the mean over the prefixes, each with its own latents."""

    def __init__(self, weight: PenaltyWeight) -> None:
        super().__init__(weight)
        self._ends = DeviceScalar(())

    def begin(self, sae: SAE, step: int) -> None:
        """Sample the prefixes of step `step`."""
        super().begin(sae, step)
        nesting = sae.config.nesting
        if isinstance(nesting, RandomPrefixes):
            ends = cuts(nesting, sae.latents, 0, sae.config.seed, step).ends
            if self._ends.size == len(ends):
                self._ends.set(ends)
            else:
                self._ends = DeviceScalar(ends, torch.int64)

    def penalty(self, forward: Forward) -> tuple[Tensor, None]:
        """mean_b sum_j |z_bj|."""
        magnitude = forward.codes.values.abs()
        if isinstance(forward.sae.config.nesting, RandomPrefixes):
            if not self._ends.size:
                self.begin(forward.sae, forward.step)
            ends = self._ends.on(magnitude.device)
            before = torch.bucketize(torch.arange(forward.sae.latents, device=magnitude.device), ends, right=True)
            magnitude = magnitude * (1 - before / len(ends)).to(magnitude.dtype)
        return forward.per_token(magnitude.sum()), None


class GatePenalty(SparsityPenalty):
    """L1 norm of the open gates, and the reconstruction from the gates alone, with the decoder frozen.

    Args:
        weight: Of the L1 norm.
        variance: As in `Reconstruction`.
    """

    def __init__(self, weight: PenaltyWeight, variance: float) -> None:
        super().__init__(weight)
        self.variance = variance

    def penalty(self, forward: Forward) -> tuple[Tensor, Tensor]:
        """mean_b sum_j ReLU(gate_bj), and mean_b ||x - x^(ReLU(gate))||^2 / variance."""
        sae = forward.sae
        every = Choice(every_latent(forward.pre_BF), forward.pre_BF > 0)
        gates = sae.choose(forward.x_BD, forward.pre_BF, every).values
        recon_BD = decode(gates, every.indices, sae.W_dec.detach()) + sae.b_dec.detach()
        error = forward.per_token((forward.x_BD - recon_BD).square().sum()) / self.variance
        return forward.per_token(gates.sum()), error


class L0Penalty(SparsityPenalty):
    """L0 through the thresholds' pseudo-derivative: itself, or the square of its distance from a target.

    Args:
        weight: Of the penalty.
        quadratic_target: None: L0 itself; else (L0 / target - 1)^2.
    """

    def __init__(self, weight: PenaltyWeight, quadratic_target: float | None) -> None:
        super().__init__(weight)
        self.quadratic_target = quadratic_target

    def penalty(self, forward: Forward) -> tuple[Tensor, None]:
        """L0 or (L0 / target - 1)^2."""
        sparsifier = forward.sae.sparsifier
        assert isinstance(sparsifier, JumpReLU)
        l0 = forward.per_token(sparsifier.active(forward.pre_BF))
        return (l0 if self.quadratic_target is None else (l0 / self.quadratic_target - 1).square()), None


def sae_terms(
    config: SAEConfig, channels: int, variance: float, steps: int, device: torch.device
) -> list[TermFunction]:
    """The terms that train the SAE `config` describes.

    Args:
        config: The recipe.
        channels: D.
        variance: Total variance of the normalized tokens.
        steps: Length of the run.
        device: Where it is trained.
    """
    terms: list[TermFunction] = [Reconstruction(variance)]
    if isinstance(config, ReLUConfig | GatedConfig | JumpReLUConfig):
        quadratic = isinstance(config, JumpReLUConfig) and config.penalty == "quadratic"
        warmup = min(config.sparsity_warmup_steps, steps // 10)
        weight = PenaltyWeight(config.sparsity, warmup, None if quadratic else config.target_l0, device)
        match config:
            case ReLUConfig():
                terms.append(L1Penalty(weight))
            case GatedConfig():
                terms.append(GatePenalty(weight, variance))
            case JumpReLUConfig():
                terms.append(L0Penalty(weight, config.target_l0 if quadratic else None))
    # Without dead latents the term costs nothing; it is what reports their share.
    terms.append(AuxK(config.auxk_for(channels), config.auxk_coef))
    return terms
