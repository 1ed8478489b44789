"""What a person is told when a steered penalty has run away: its weight stands at a limit, L0 is not at its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tubelet_trainer.losses.sparsity import STEERING_RANGE
from tubelet_trainer.run.training_run import SAERun
from tubelet_trainer.sae.config import JumpReLUConfig

# An L0 this many times its target, or this part of it, is far from it.
_FAR = 1.5


class L0ControllerWatch:
    """Speaks of each SAE once, when its weight comes to a limit, and again if the run ends there."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(
        self, step: int, steps: int, sae_runs: Sequence[SAERun], metrics: Mapping[str, Mapping[str, float]]
    ) -> Iterator[str]:
        """A line for each SAE of which there is something to say.

        Args:
            step: Steps done.
            steps: Length of the run.
            members: The SAEs.
            metrics: Of the last step, by an SAE's name.
        """
        for sae_run in sae_runs:
            line = metrics.get(sae_run.name, {})
            side = line.get("sparsity_limit")
            if side is None or (sae_run.name in self._told and step < steps):
                continue
            if side == 0:
                if step == steps:
                    yield from _missed(sae_run, line)
                continue
            self._told.add(sae_run.name)
            where = f"step {step} of {sae_run.name}" if sae_run.name else f"step {step}"
            weight = f"{line['sparsity_weight']:.2g}"
            target = f"target_l0 {getattr(sae_run.spec.config.sae, 'target_l0', None):g}"
            if side > 0:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not fall to {target}, though the penalty's weight was "
                    f"raised to its limit, {weight} ({STEERING_RANGE:g} times sae.sparsity). Train longer, raise "
                    f"optimizer.lr, or raise sae.target_l0"
                )
            else:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not rise to {target}, though the penalty's weight was "
                    f"lowered to its limit, {weight} (sae.sparsity / {STEERING_RANGE:g}). {_lever(sae_run)}"
                )


def _missed(sae_run: SAERun, line: Mapping[str, float]) -> Iterator[str]:
    """A line if the run ended far from its target, its weight still on the way."""
    target = getattr(sae_run.spec.config.sae, "target_l0", None)
    if target and not target / _FAR < line["l0"] < target * _FAR:
        name = f" of {sae_run.name}" if sae_run.name else ""
        remedy = f"raise sae.sparsity or train longer{_threshold(sae_run)}" if line["l0"] > target else _lever(sae_run)
        yield (
            f"L0{name} is {line['l0']:.1f} at the end, target_l0 {target:g} not reached: the penalty's weight "
            f"was still changing. To come closer {remedy}"
        )


def _lever(sae_run: SAERun) -> str:
    return f"lower sae.sparsity or sae.target_l0, or train longer{_threshold(sae_run)}"


def _threshold(sae_run: SAERun) -> str:
    return (
        ", or start from another sae.initial_threshold" if isinstance(sae_run.spec.config.sae, JumpReLUConfig) else ""
    )
