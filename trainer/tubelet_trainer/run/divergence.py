"""When training has broken down, and what to do about it: said before bad weights are exported."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tubelet.errors import TubeletError
from tubelet_trainer.run.training_run import Run, SAERun
from tubelet_trainer.sae.config import GatedConfig, JumpReLUConfig, ReLUConfig

_PENALIZED = (ReLUConfig, GatedConfig, JumpReLUConfig)

# Beyond these a run is lost. [RECON] Encoder rows start at norm 1; FVU 1 is as good as predicting the mean.
_EXPLODED_NORM = 100.0
_EXPLODED_FVU = 100.0


def find_divergence(sae_run: SAERun, step: int, metrics: Mapping[str, float], whole: bool) -> TubeletError | None:
    """What is wrong with an SAE that cannot recover, and what to do about it; None: nothing. It is not raised.

    That is: a figure is not finite, all latents are silent, or the weights or the error exploded.

    Args:
        member: The SAE.
        step: Steps done.
        metrics: Of the last step; `encoder_norm` is the mean norm of the encoder's rows.
        whole: Whether the batch was whole; a smaller one may be too small to judge by.
    """
    where = f"Step {step} of {sae_run.name}" if sae_run.name else f"Step {step}"
    recipe = sae_run.spec.config.sae
    wrong = [name for name in ("loss", "grad_norm", "encoder_norm") if not math.isfinite(metrics[name])]
    if wrong:
        return TubeletError(
            f"{where}: {' and '.join(wrong)} not finite (learning rate {sae_run.sae_trainer.lr:.2e})",
            "Lower optimizer.lr or raise optimizer.warmup_steps, and train into another --out",
        )
    if not whole:
        return None
    silent = "All latents are dead" if metrics["dead"] == 1 else "No latent is active" if metrics["l0"] == 0 else None
    if silent is not None:
        lever = "Lower sae.sparsity" if isinstance(recipe, _PENALIZED) else "Raise sae.k or sae.auxk_coef"
        return TubeletError(
            f"{where}: {silent} ({recipe.latents_for(sae_run.sae_trainer.sae.channels)} of them)",
            f"{lever} or lower optimizer.lr, and train into another --out",
        )
    # A healthy encoder keeps its rows within a small factor of the 1 they start from.
    if metrics["encoder_norm"] > _EXPLODED_NORM or metrics["fvu"] > _EXPLODED_FVU:
        return TubeletError(
            f"{where}: training diverges (encoder rows of norm {metrics['encoder_norm']:.3g} on average, "
            f"FVU {metrics['fvu']:.3g})",
            "Lower optimizer.lr or raise optimizer.warmup_steps, and train into another --out",
        )
    return None


def raise_diverged(run: Run) -> None:
    """Raise where SAEs of the run have broken down.

    Raises:
        TubeletError: says which, of how many, and why.
    """
    if not run.broken:
        return
    *others, last = run.broken.values()
    told = [*map(str, others), last.problem]
    if len(run.sae_runs) > 1:
        rest = "; the others are complete" if run.sound else ""
        told.insert(0, f"{len(run.broken)} of {len(run.sae_runs)} SAEs broke down{rest}.")
    raise TubeletError(" ".join(told), last.remedy)
