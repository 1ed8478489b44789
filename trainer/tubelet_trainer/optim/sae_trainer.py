"""One SAE in training: weights, optimizer, loss terms, dead-latent counts. It sees batches, not stores.

    begin(step)                what the step number decides: k, learning rate, weights of the terms
    update(forward, total)     gradients: sum over ranks, project, clip, Adam; unit norm; count; average the weights
    finish(forward)            periodic actions: resample, sort, read the number of dead latents

All state is either in `state` or a function of the step number, so a resumed run repeats the uninterrupted one. Between
`begin` and `finish` a step is the same sequence of device operations every time, so it can be recorded as a CUDA graph;
all decisions of the host are made in these two. A step never synchronizes with the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tubelet_trainer.config import OptimizerConfig
from tubelet_trainer.device_scalar import DeviceScalar
from tubelet_trainer.losses.objective import Forward, Objective, Term
from tubelet_trainer.optim.dead_latents import DeadLatentTracker
from tubelet_trainer.process_group import ALONE, ProcessGroup
from tubelet_trainer.sae.config import JumpReLUConfig, RandomPrefixes
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sharded import RankedBatchTopK, ShardedSAE
from tubelet_trainer.sae.sparsifiers import JumpReLU

# Norm of a resampled encoder row, relative to the mean of the alive ones: a short row disturbs little (Bricken et al.
# 2023, appendix).
_RESAMPLED_ENCODER_NORM = 0.2

# Share of the run after which nothing is resampled. [RECON] A latent resampled in the last tenth has no time to learn.
_RESAMPLE_UNTIL = 0.9

# Weight of the newest batch in the running energy of the latents (Abeshima 2024).
_ENERGY_RATE = 0.05


def ema_decay(decay: float, step: int) -> float:
    """Decay of the running mean of the weights in step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The mean looks back over about a tenth of the steps so far, until that is as long as `decay` says. With a constant
    `decay` a run of a few hundred steps would end close to its initial weights. Same formula as `num_updates` of
    TensorFlow's ExponentialMovingAverage.
    """
    return min(decay, (1 + step) / (10 + step))


class SAETrainer:
    """An SAE and its optimizer.

    Args:
        sae: Initialized, on its device. Trained in place.
        objective: Loss.
        config: Optimizer and schedule.
        steps: Length of the run.
        dead_after_tokens: A latent is dead after this many tokens without firing.
        precision: Of the matrix products while training, see `TrainConfig.precision`.
        ranks: Processes that hold the other parts of every batch.
        batch_tokens: Tokens of a full batch, over all ranks; None: all batches have the same size.
    """

    def __init__(
        self,
        sae: SAE,
        objective: Objective,
        config: OptimizerConfig,
        steps: int,
        dead_after_tokens: int,
        precision: torch.dtype = torch.float32,
        ranks: ProcessGroup = ALONE,
        batch_tokens: int | None = None,
    ) -> None:
        self.sae = sae
        self.objective = objective
        self.config = config
        self.steps = steps
        self.batch_tokens = batch_tokens
        self.device = sae.W_dec.device
        self.precision = precision
        self.ranks = ranks
        holders = sae.ranks if isinstance(sae, ShardedSAE) else ALONE
        self.dead_latents = DeadLatentTracker(sae.latents, dead_after_tokens, self.device, holders)
        self.averaged = copy.deepcopy(sae) if config.ema is not None else None
        """Running mean of the weights."""
        self._ema_rate = DeviceScalar(0.0)
        nesting = sae.config.nesting
        self._sort_every = nesting.sort_every if isinstance(nesting, RandomPrefixes) else None
        self.energy_F = torch.zeros(sae.latents, device=self.device)
        """Running mean of each latent's squared code; latents are sorted by it."""
        self._peak_lr = config.peak_lr(sae.latents * holders.size)
        self.lr = 0.0
        """Learning rate of the last step."""
        self._lr = DeviceScalar(0.0)
        beta1 = config.beta1 if config.beta1 is not None else (0.0 if isinstance(sae.config, JumpReLUConfig) else 0.9)
        self.optimizer = torch.optim.Adam(
            sae.parameters(),
            lr=self._lr.on(self.device),
            betas=(beta1, config.beta2),
            eps=config.eps,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        # torch would create them in the first step; a resumed run loads them before that.
        for parameter in sae.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def begin(self, step: int, whole: int | None = None) -> None:
        """Set what step `step` (from 0) changes, for a batch of `whole` tokens over all ranks."""
        fullness = 1.0 if whole is None or self.batch_tokens is None else whole / self.batch_tokens
        self.sae.anneal(step, self.steps, fullness)
        if isinstance(self.sae.sparsifier, RankedBatchTopK):
            self.sae.sparsifier.whole = whole
        self.objective.begin(self.sae, step)
        self.lr = self._peak_lr * self.config.lr_factor(step, self.steps)
        self._lr.set(self.lr)
        if self.config.ema is not None:
            self._ema_rate.set(1 - ema_decay(self.config.ema, step))

    def update(self, forward: Forward, total: Term) -> dict[str, Tensor]:
        """One optimizer step from the gradients as they are; metrics of `total`, and `grad_norm` before clipping."""
        self.ranks.sum_gradients(self.sae.parameters())
        self.sae.project_decoder_gradient()
        norm = self.sae.gradient_norm()
        # The fused kernel divides gradients by `grad_scale`: clipping without another pass over them.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.config.grad_clip).clamp_min(1).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.sae.normalize_decoder()
        self.dead_latents.update(forward.codes, forward.whole, self.ranks)
        if self._sort_every is not None:
            energy_F = self.ranks.sum(forward.codes.energy(self.sae.latents)) / forward.whole
            self.energy_F.lerp_(energy_F.to(self.energy_F.dtype), _ENERGY_RATE)
        self._average()
        return {**total.metrics, "grad_norm": norm}

    def finish(self, forward: Forward) -> None:
        """Periodic actions; called after each step."""
        step, every = forward.step, self.config.resample_every
        if every is not None and (step + 1) % every == 0 and step < _RESAMPLE_UNTIL * self.steps:
            self._resample(forward)
        if self._sort_every is not None and (step + 1) % self._sort_every == 0:
            self._sort()
        self.dead_latents.read(step)

    @torch.no_grad()
    def result(self) -> SAE:
        """The SAE to evaluate and export: the running mean of the weights if there is one."""
        if self.averaged is None:
            return self.sae
        result = copy.deepcopy(self.averaged)
        # The mean of unit vectors is shorter than one.
        result.normalize_decoder()
        return result

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        rate = self._ema_rate.on(self.device)
        for average, parameter in zip(self.averaged.parameters(), self.sae.parameters(), strict=True):
            average.lerp_(parameter, rate.to(average.dtype))
        for mean, current in zip(self.averaged.buffers(), self.sae.buffers(), strict=True):
            mean.copy_(current)

    @torch.no_grad()
    def _resample(self, forward: Forward) -> None:
        """Give dead latents the directions of badly reconstructed tokens (Bricken et al. 2023, appendix).

        Tokens are drawn with probability proportional to their squared loss. The decoder row becomes the token's
        direction, the encoder row the same at 0.2 of the mean norm of the alive ones; biases and optimizer moments of
        these latents are reset.
        """
        sae, dead_F = self.sae, self.dead_latents.dead_F
        generator = torch.Generator(self.device).manual_seed(sae.config.seed * 1_000_003 + forward.step)
        loss_B = (forward.x_BD - forward.recon_BD).square().sum(dim=1)
        x_BD, loss_B = (self.ranks.interleave(part, forward.whole) for part in (forward.x_BD, loss_B))
        # Not `multinomial`, which may wait for the device to check its weights.
        reach_B = (loss_B.double().square() + 1e-30).cumsum(dim=0)
        places_F = torch.rand(sae.latents, generator=generator, device=self.device, dtype=torch.float64) * reach_B[-1]
        drawn_F = torch.searchsorted(reach_B, places_F).clamp_max(len(x_BD) - 1)
        rows_FD = nnf.normalize(x_BD[drawn_F] - sae.b_dec, dim=1)
        alive_F1 = (~dead_F)[:, None]
        norm = (sae.W_enc.norm(dim=1, keepdim=True) * alive_F1).sum() / alive_F1.sum().clamp_min(1)
        zeros_F = torch.zeros_like(sae.b_enc)
        fresh = {"W_dec": rows_FD, "W_enc": rows_FD * norm * _RESAMPLED_ENCODER_NORM}
        if isinstance(sae.sparsifier, JumpReLU):
            fresh["sparsifier.log_threshold"] = zeros_F + math.log(sae.sparsifier.initial_threshold)
        for name, (weights, moments) in self._per_latent().items():
            mask = dead_F if sae.get_parameter(name).ndim == 1 else dead_F[:, None]
            for tensor in weights:
                tensor.copy_(torch.where(mask, fresh.get(name, zeros_F), tensor))
            for tensor in moments:
                tensor.masked_fill_(mask, 0)
        self.dead_latents.silent_tokens_F.masked_fill_(dead_F, 0)

    @torch.no_grad()
    def _sort(self) -> None:
        """Sort the latents by falling energy, with all their state.

        The code of Abeshima 2024 looks up the optimizer's moments under the wrong key, and does not sort them.
        """
        order_F = self.energy_F.argsort(descending=True, stable=True)
        rows = [tensor for parts in self._per_latent().values() for part in parts for tensor in part]
        for tensor in (*rows, self.dead_latents.silent_tokens_F, self.energy_F):
            tensor.copy_(tensor[order_F])

    def _per_latent(self) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Each parameter with a row per latent: the weights (and their running mean), the optimizer's moments."""
        averages = dict(self.averaged.named_parameters()) if self.averaged is not None else {}
        return {
            name: (
                [parameter, averages[name]] if averages else [parameter],
                [self.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")],
            )
            for name, parameter in self.sae.named_parameters()
            if name != "b_dec"
        }

    def _optimizer_state(self) -> dict[str, Tensor]:
        """`parameter/exp_avg` and so on, by reference."""
        return {
            f"{name}/{key}": tensor
            for name, parameter in self.sae.named_parameters()
            for key, tensor in self.optimizer.state[parameter].items()
        }

    def state(self) -> dict[str, Tensor]:
        """All state of the training, by name, by reference."""
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"adam/{name}": tensor for name, tensor in self._optimizer_state().items()}
        if self.averaged is not None:
            tensors |= {f"ema/{name}": tensor for name, tensor in self.averaged.state_dict().items()}
        tensors |= {f"objective/{name}": tensor for name, tensor in self.objective.state().items()}
        tensors |= {f"dead_latents/{name}": tensor for name, tensor in self.dead_latents.state().items()}
        if self._sort_every is not None:
            tensors["energy"] = self.energy_F
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.sae.load_state_dict(parts["sae"])
        for name, tensor in self._optimizer_state().items():
            tensor.copy_(parts["adam"][name])
        if self.averaged is not None:
            self.averaged.load_state_dict(parts["ema"])
        self.objective.load_state(parts.get("objective", {}))
        self.dead_latents.load_state(parts["dead_latents"])
        if self._sort_every is not None:
            self.energy_F.copy_(tensors["energy"])
