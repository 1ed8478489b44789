"""Signs that a training has failed or will: divergence, dead dictionaries, an L0 controller at its limit.

A diverged SAE is excluded before its weights are exported; the others of the run continue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tubelet.errors import TubeletError
from tubelet_trainer.losses.sparsity import MAX_GAIN
from tubelet_trainer.run.training_run import Run, SAERun
from tubelet_trainer.sae.config import GatedConfig, JumpReLUConfig, ReLUConfig

_PENALIZED = (ReLUConfig, GatedConfig, JumpReLUConfig)

# Beyond these a run is lost. [RECON] Encoder rows start at norm 1 and stay within a small factor of it; FVU 1 is as
# good as predicting the mean.
_MAX_ENCODER_NORM = 100.0
_MAX_FVU = 100.0

# An L0 beyond this many times its target, or below its inverse, has missed it.
_L0_TOLERANCE = 1.5


def find_divergence(sae_run: SAERun, step: int, metrics: Mapping[str, float], full: bool) -> TubeletError | None:
    """Why an SAE cannot recover, with the remedy, not raised; None if it can.

    It cannot where a figure is not finite, all latents are dead, or the weights or the error have exploded.

    Args:
        sae_run: The SAE.
        step: Steps done.
        metrics: Of the last step; `encoder_norm` is the mean norm of the encoder's rows.
        full: Whether the batch was full; a smaller one may be too small to judge by.
    """
    where = f"Step {step} of {sae_run.name}" if sae_run.name else f"Step {step}"
    config = sae_run.spec.config.sae
    not_finite = [name for name in ("loss", "grad_norm", "encoder_norm") if not math.isfinite(metrics[name])]
    if not_finite:
        return TubeletError(
            f"{where}: {' and '.join(not_finite)} not finite (learning rate {sae_run.sae_trainer.lr:.2e})",
            "Lower optimizer.lr or raise optimizer.warmup_steps, and train into another --out",
        )
    if not full:
        return None
    silent = "All latents are dead" if metrics["dead"] == 1 else "No latent is active" if metrics["l0"] == 0 else None
    if silent is not None:
        lever = "Lower sae.sparsity" if isinstance(config, _PENALIZED) else "Raise sae.k or sae.auxk_coef"
        return TubeletError(
            f"{where}: {silent} ({config.latents_for(sae_run.sae_trainer.sae.channels)} of them)",
            f"{lever} or lower optimizer.lr, and train into another --out",
        )
    if metrics["encoder_norm"] > _MAX_ENCODER_NORM or metrics["fvu"] > _MAX_FVU:
        return TubeletError(
            f"{where}: training diverges (encoder rows of norm {metrics['encoder_norm']:.3g} on average, "
            f"FVU {metrics['fvu']:.3g})",
            "Lower optimizer.lr or raise optimizer.warmup_steps, and train into another --out",
        )
    return None


def raise_diverged(run: Run) -> None:
    """Raise if SAEs of the run have diverged.

    Raises:
        TubeletError: which ones, of how many, and why.
    """
    if not run.diverged:
        return
    *others, last = run.diverged.values()
    reasons = [*map(str, others), last.problem]
    if len(run.sae_runs) > 1:
        rest = "; the others are complete" if run.sound else ""
        reasons.insert(0, f"{len(run.diverged)} of {len(run.sae_runs)} SAEs diverged{rest}.")
    raise TubeletError(" ".join(reasons), last.remedy)


class L0ControllerWatch:
    """Warns when an L0 controller saturates without reaching target_l0: once per SAE, and again if the run ends so."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warnings(
        self, step: int, steps: int, sae_runs: Sequence[SAERun], metrics: Mapping[str, Mapping[str, float]]
    ) -> Iterator[str]:
        """A line for each SAE with something to report.

        Args:
            step: Steps done.
            steps: Length of the run.
            sae_runs: The SAEs.
            metrics: Of the last step, by an SAE's name.
        """
        for sae_run in sae_runs:
            line = metrics.get(sae_run.name, {})
            limit = line.get("sparsity_limit")
            if limit is None or (sae_run.name in self._warned and step < steps):
                continue
            if limit == 0:
                if step == steps:
                    yield from _missed_target(sae_run, line)
                continue
            self._warned.add(sae_run.name)
            where = f"step {step} of {sae_run.name}" if sae_run.name else f"step {step}"
            weight = f"{line['sparsity_weight']:.2g}"
            target = f"target_l0 {getattr(sae_run.spec.config.sae, 'target_l0', None):g}"
            if limit > 0:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not fall to {target}: the penalty weight is at its "
                    f"upper limit, {weight} ({MAX_GAIN:g} times sae.sparsity). Train longer, raise optimizer.lr, or "
                    f"raise sae.target_l0"
                )
            else:
                yield (
                    f"{where}: L0 is {line['l0']:.1f} and does not rise to {target}: the penalty weight is at its "
                    f"lower limit, {weight} (sae.sparsity / {MAX_GAIN:g}). To raise L0, {_remedy(sae_run)}"
                )


def _missed_target(sae_run: SAERun, line: Mapping[str, float]) -> Iterator[str]:
    """A line if the run ended far from its target with the weight still changing."""
    target = getattr(sae_run.spec.config.sae, "target_l0", None)
    if target and not target / _L0_TOLERANCE < line["l0"] < target * _L0_TOLERANCE:
        name = f" of {sae_run.name}" if sae_run.name else ""
        too_high = f"raise sae.sparsity or train longer{_threshold(sae_run)}"
        yield (
            f"L0{name} is {line['l0']:.1f} at the end, target_l0 {target:g} not reached: the penalty weight was still "
            f"changing. To come closer, {too_high if line['l0'] > target else _remedy(sae_run)}"
        )


def _remedy(sae_run: SAERun) -> str:
    return f"lower sae.sparsity or sae.target_l0, or train longer{_threshold(sae_run)}"


def _threshold(sae_run: SAERun) -> str:
    jump = isinstance(sae_run.spec.config.sae, JumpReLUConfig)
    return ", or start from another sae.initial_threshold" if jump else ""
