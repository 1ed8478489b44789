"""What a person is told when a steered penalty has run away: its weight stands at a limit, L0 is not at its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tubelet_trainer.run import Member
from tubelet_trainer.sae.penalties import STEERING_RANGE


class SteeringWatch:
    """Speaks of each SAE once, when its weight comes to a limit, and again if the run ends there."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(
        self, step: int, steps: int, members: Sequence[Member], metrics: Mapping[str, Mapping[str, float]]
    ) -> Iterator[str]:
        """A line for each SAE of which there is something to say.

        Args:
            step: Steps done.
            steps: Length of the run.
            members: The SAEs.
            metrics: Of the last step, by an SAE's name.
        """
        for member in members:
            line = metrics.get(member.name, {})
            side = line.get("sparsity_limit", 0.0)
            if side == 0 or (member.name in self._told and step < steps):
                continue
            self._told.add(member.name)
            where = f"step {step} of {member.name}" if member.name else f"step {step}"
            weight = f"{line['sparsity_weight']:.2g}"
            target = f"target_l0 {getattr(member.spec.config.sae, 'target_l0', None):g}"
            if side > 0:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not fall to {target}, though the penalty's weight was "
                    f"raised to its limit, {weight} ({STEERING_RANGE:g} times sae.sparsity). Train longer, raise "
                    f"optimiser.lr, or raise sae.target_l0"
                )
            else:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not rise to {target}, though the penalty's weight was "
                    f"lowered to its limit, {weight} (sae.sparsity / {STEERING_RANGE:g}). Lower sae.target_l0 or "
                    f"optimiser.lr, or give more latents"
                )
