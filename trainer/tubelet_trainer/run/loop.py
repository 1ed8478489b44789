"""The training loop.

    stores ─▶ loader ─▶ batch ─▶ SAEGroup.learn (all SAEs) ─▶ metrics, evaluations, checkpoints

What a run leaves in its folder:

    config.yaml                        the configuration, defaults included
    metrics.jsonl                      one line per logged step ("train") and evaluation ("eval")
    checkpoints/                       see `tubelet_trainer.run.checkpoint`
    sae.safetensors, sae.json          the trained SAE with its normalization and provenance; written at the end

With several SAEs `checkpoints` and the whole configuration are there, and the rest in one folder per SAE; saes.csv,
saes.md and saes.png compare them.

A run that is killed at any point and started again ends with the same weights: bit for bit on the CPU with the same
number of threads. Told to stop (Ctrl-C, SIGTERM) it writes a checkpoint first. Of several SAEs one that diverges is
excluded, and the others continue.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet_store.reader import Store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.streams import open_stores, resident_shards
from tubelet_trainer.process_group import join_process_group
from tubelet_trainer.run.checkpoint import Checkpoint, latest_name, load_latest, save_checkpoint
from tubelet_trainer.run.diagnostics import L0ControllerWatch, find_divergence, raise_diverged
from tubelet_trainer.run.environment import keep_memory, software
from tubelet_trainer.run.run_folder import Logs, exported, writing
from tubelet_trainer.run.stop_signal import StopRequest
from tubelet_trainer.run.train_result import TrainResult, read_run
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.init import Offset
from tubelet_trainer.sae.sae_files import save_sae

# With fewer steps an SAE learns little.
_FEW_STEPS = 100


def train(config: TrainConfig) -> TrainResult:
    """Train the SAEs that `config` describes, resuming a run found in `config.out`.

    Under torchrun all processes call it; the first one writes, and has the SAEs in its result.

    Raises:
        TubeletError: the store or configuration does not fit, `out` holds another run, or training diverged.
    """
    with join_process_group() as ranks:
        stores = open_stores(config)
        folder = config.out / "checkpoints"
        resumed_from, checkpoint = latest_name(folder), load_latest(folder)
        # All ranks have read before the first one writes.
        ranks.wait()
        config = _with_resident_shards(config, stores, checkpoint)
        device = choose_device(config.device)
        if device.type == "cpu":
            keep_memory()
        run = Run(config, stores, device, ranks)
        if checkpoint is not None and not config.resume:
            raise TubeletError(
                f"{config.out} already holds a run", "Choose another --out, or resume it with --resume true"
            )
        if checkpoint is not None:
            run.restore(checkpoint)
        done, steps = run.loader.step, run.loader.steps
        if done < steps or not all(exported(sae_run.out, run) for sae_run in run.sound):
            with (
                writing(run, resumed_from) as logs,
                Progress("training", steps, "steps", done=done, is_silent=not ranks.first) as progress,
            ):
                _announce(run, checkpoint, progress)
                logs.write("mixing", 0, {sae_run.name: asdict(run.mixing) for sae_run in run.sae_runs})
                _loop(run, folder, logs, progress)
        elif ranks.first:
            print(f"{config.out} is complete: {done} steps were taken", file=sys.stderr)
        ranks.wait()
        raise_diverged(run)
        return read_run(config.out) if ranks.first else TrainResult(config.out, ())


def _with_resident_shards(config: TrainConfig, stores: Sequence[Store], checkpoint: Checkpoint | None) -> TrainConfig:
    """`config` with `resident_shards` decided: it is part of the order of tokens, so it must stay with the run."""
    if config.resident_shards is not None:
        return config
    if checkpoint is not None:
        return config.model_copy(update={"resident_shards": checkpoint.record["config"].get("resident_shards")})
    return config.model_copy(update={"resident_shards": resident_shards(config, stores)})


def _loop(run: Run, folder: Path, logs: Logs, progress: Progress) -> None:
    """Train to the end, evaluate and export."""
    config, steps = run.config, run.loader.steps
    latest: dict[str, dict[str, float]] = {}
    tokens, since = 0, time.monotonic()
    watch = L0ControllerWatch()
    with StopRequest().listening() as stop:
        for batch in run.loader:
            step = run.loader.step
            metrics = run.sae_group.learn(batch, step - 1)
            tokens += batch.whole
            reports = step % config.log_every == 0 or step == steps
            # With several ranks only when metrics are read anyway: it synchronizes with the device.
            stops = step < steps and (reports or run.ranks.size == 1) and stop.requested(run.ranks, run.device)
            saves = step % config.checkpoint_every == 0 or step == steps
            if reports or saves or stops:
                latest = _read(run, metrics, batch.whole == config.batch_tokens, progress)
            if reports:
                speed = tokens / (time.monotonic() - since)
                tokens, since = 0, time.monotonic()
                rates = {
                    sae_run.name: {"lr": sae_run.sae_trainer.lr, "tokens_per_s": round(speed, 1)}
                    for sae_run in run.sound
                }
                logs.write("train", step, {name: rates[name] | line for name, line in latest.items()})
            if stops:
                # First of all: the rest may take long, or write to a terminal that is gone.
                _save(run, step, folder)
            if reports:
                means = {key: sum(line[key] for line in latest.values()) / len(latest) for key in ("fvu", "l0", "dead")}
                mean = f"mean of {len(latest)}: " if len(latest) > 1 else ""
                figures = f"FVU {means['fvu']:.4f}, L0 {means['l0']:.1f}, dead {means['dead']:.1%}"
                progress.update(step, text=f"{speed:,.0f} tokens/s, {mean}{figures}")
                for line in watch.warnings(step, steps, run.sound, latest):
                    progress.note(line)
            if step % config.eval_every == 0 and step < steps:
                _evaluate(run, step, logs, progress)
            if stops:
                progress.note(f"stopped after step {step} of {steps}; the checkpoint is written")
                stop.leave(run.ranks)
            if saves:
                _save(run, step, folder)
    # A run killed after its last checkpoint has no step left to read metrics from.
    final = _evaluate(run, steps, logs, progress) or latest or {sae_run.name: {} for sae_run in run.sae_runs}
    if len(run.sae_runs) > 1 and (heldout_pairs := run.streams.heldout_pairs()) is not None:
        final = {each.name: final[each.name] | run.coherence(each, heldout_pairs) for each in run.sound}
    _export(run, final, progress)


def _export(run: Run, final: Mapping[str, Mapping[str, float]], progress: Progress) -> None:
    """Write the SAEs, with their final figures."""
    for name, figures in final.items():
        if figures.get("fvu", 0.0) > 1:
            label = f"{name}: " if name else ""
            progress.note(
                f"{label}FVU {figures['fvu']:.2f} is worse than predicting the mean (FVU 1): it has not learned. "
                "Train longer, or with a lower optimizer.lr, into another --out"
            )
    for sae_run in run.sound:
        if (sae := run.result(sae_run)) is not None and run.ranks.first:
            save_sae(sae_run.out, sae, run.provenance(sae_run, final[sae_run.name]))
    if len(run.sae_runs) > 1 and run.sound and run.ranks.first and (missing := read_run(run.config.out).write()):
        progress.note(missing)


def _save(run: Run, step: int, folder: Path) -> None:
    checkpoint = run.checkpoint(step)
    if run.ranks.first:
        save_checkpoint(folder, checkpoint, run.config.keep_checkpoints)


def _read(
    run: Run, metrics: Sequence[Mapping[str, Tensor]], full: bool, progress: Progress
) -> dict[str, dict[str, float]]:
    """The metrics of a step of each sound SAE as numbers; one that has diverged is excluded.

    Args:
        run: After the step.
        metrics: The step's metrics of each SAE.
        full: The batch is full; the run's last one may be too small to judge by.
        progress: Where an excluded SAE is reported.

    Raises:
        TubeletError: no SAE is left.
    """
    latest: dict[str, dict[str, float]] = {}
    new: list[TubeletError] = []
    for sae_run, line in zip(run.sae_runs, metrics, strict=True):
        if sae_run.name in run.diverged:
            continue
        values = {name: float(value) for name, value in line.items()}
        norm = sae_run.sae_trainer.sae.W_enc.detach().norm(dim=1).mean()
        values["encoder_norm"] = float(run.ranks.sum(norm) / run.ranks.size)
        fault = find_divergence(sae_run, run.loader.step, values, full)
        if fault is None:
            latest[sae_run.name] = values
            continue
        run.diverged[sae_run.name] = fault
        new.append(fault)
    if not run.sound:
        raise_diverged(run)
    for fault in new:
        progress.note(f"{fault} It is excluded; the others continue.")
    return latest


def _evaluate(run: Run, step: int, logs: Logs, progress: Progress) -> dict[str, dict[str, float]]:
    if run.heldout is None:
        return {}
    figures = {sae_run.name: run.evaluate(sae_run, run.heldout) for sae_run in run.sound}
    logs.write("eval", step, figures)
    for name, line in figures.items():
        dead = f"dead {line['dead']:.1%} over {line['tokens']:,} tokens"
        label = f" {name}" if name else ""
        progress.note(f"step {step}:{label} held-out FVU {line['fvu']:.4f}  L0 {line['l0']:.1f}  {dead}")
    return figures


def _counted_steps(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _announce(run: Run, checkpoint: Checkpoint | None, progress: Progress) -> None:
    loader = run.loader
    heldout_clips = 0 if run.heldout is None else len(run.heldout.clips)
    progress.note(
        f"{', '.join(run.streams.hooks)}: {len(loader.clips)} clips to train on, {heldout_clips} held out, "
        f"{run.streams.failed} failed; {loader.total_tokens:,} tokens in {_counted_steps(loader.steps)}"
    )
    progress.note(f"{run.mixing}; shuffle windows take {loader.memory_bytes / 2**20:,.0f} MiB")
    if not heldout_clips:
        progress.note("no video is held out: nothing will be evaluated (see holdout.fraction)")
    if loader.steps < _FEW_STEPS:
        progress.note(
            f"only {_counted_steps(loader.steps)}: lower batch_tokens, or raise epochs, tokens or steps, to learn more"
        )
    for sae_run in run.sae_runs:
        channels = sae_run.sae_trainer.sae.channels
        latents = sae_run.spec.config.sae.latents_for(channels)
        progress.note(f"{sae_run.name or sae_run.hook}: {latents} latents for {channels} channels")
    if checkpoint is None:
        for sae_run in {sae_run.hook: sae_run for sae_run in run.sae_runs}.values():
            offset = Offset.of(sae_run.moments)
            centered = "centered" if sae_run.spec.config.sae.normalization.center else "NOT centered"
            progress.note(
                f"{sae_run.hook}: the mean token is {offset.gamma:.2f} standard deviations from the origin; tokens are "
                f"{centered} (uncentered, about {offset.dead_share:.1%} of the latents would start dead)"
            )
        return
    progress.note(f"resuming after step {checkpoint.step}")
    then = checkpoint.record["software"]
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in software().items() if then.get(name) != value]
    if changed:
        progress.note(f"changed since: {', '.join(changed)}; results agree up to rounding, not bit for bit")
