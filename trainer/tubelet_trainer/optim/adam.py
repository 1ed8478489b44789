"""Adam over the parameters of one SAE (Kingma and Ba 2015), gradient clipping included, in one fused pass.

    m = b1 m + (1 - b1) g / scale;  v = b2 v + (1 - b2) (g / scale)^2;  w -= lr m^ / (sqrt(v^) + eps)

Dividing by the clipping's scale here saves reading and writing all gradients once more. Fused: on a CPU 7 times as fast
as the loop over operations (16384 x 768, 2 threads: 35 ms against 264 ms). Nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tubelet_trainer.optim.device_scalar import DeviceScalar


class Adam:
    """Moments of named parameters.

    Args:
        parameters: Trained in place.
        betas: Decay of the moments.
        eps: Added to the root of the second.
    """

    def __init__(self, parameters: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> None:
        self.parameters = dict(parameters)
        self.betas, self.eps = betas, eps
        self.lr = 0.0
        """Learning rate, as set last."""
        self._lr = DeviceScalar(0.0)
        self.moments = {
            name: {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "step": torch.zeros((), device=parameter.device),
            }
            for name, parameter in self.parameters.items()
        }
        """`exp_avg`, `exp_avg_sq` and the number of steps of each parameter."""

    def set_lr(self, lr: float) -> None:
        """Learning rate of the steps to come."""
        self.lr = lr
        self._lr.set(lr)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, scale: Tensor) -> None:
        """One step with the gradients divided by `scale` (0-dimensional, float32); those without one stay."""
        moved = [(p, p.grad, self.moments[name]) for name, p in self.parameters.items() if p.grad is not None]
        steps = [moments["step"] for _, _, moments in moved]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            [p for p, _, _ in moved],
            [gradient for _, gradient, _ in moved],
            [moments["exp_avg"] for _, _, moments in moved],
            [moments["exp_avg_sq"] for _, _, moments in moved],
            [],
            steps,
            lr=self._lr.on(scale.device),
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=None,
        )

    def state(self) -> dict[str, Tensor]:
        """`name/exp_avg` and so on, by reference."""
        return {f"{name}/{key}": tensor for name, found in self.moments.items() for key, tensor in found.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
