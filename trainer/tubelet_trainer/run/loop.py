"""The training loop.

    stores ─▶ Streams ─▶ batch ─▶ Learner, Learner, ... (one per SAE) ─▶ metrics, checkpoints

All SAEs of a run see the same batches; each learns as if it were alone, so that training several together gives the
weights that each would have alone. What a run leaves in its folder:

    config.yaml                        the configuration, defaults included
    metrics.jsonl                      one line per logged step ("train") and evaluation ("eval")
    checkpoints/                       see `checkpoint`
    sae.safetensors, sae.json          the trained SAE with its normalization and provenance; written at the end

With several SAEs `checkpoints` and the whole configuration lie there, and the rest in a folder for each.

Killed at any point, the same command continues to the same weights: bit for bit on the CPU with the same number of
threads. Told to stop (Ctrl-C, SIGTERM) it leaves a checkpoint first. Of several SAEs one that breaks down is set aside,
and the others go on.
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
from tubelet_store.reader import Store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.streams import open_stores, resident_shards
from tubelet_trainer.run.checkpoint import Checkpoint, latest_name, load_latest, save_checkpoint
from tubelet_trainer.run.divergence import find_divergence, raise_diverged
from tubelet_trainer.run.environment import keep_memory, software
from tubelet_trainer.run.l0_controller import L0ControllerWatch
from tubelet_trainer.run.process_group import ProcessGroup, join_process_group
from tubelet_trainer.run.run_folder import Logs, claimed, exported
from tubelet_trainer.run.stop_signal import StopRequest
from tubelet_trainer.run.train_progress import ProgressReport
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.init import Offset
from tubelet_trainer.sae.sae_files import save_sae

# With fewer steps hardly anything is learned.
_FEW_STEPS = 100


def train(config: TrainConfig) -> Path:
    """Train the SAEs that `config` describes, continuing a run found in `config.out`; the run's folder.

    Under torchrun all processes call it; the first one writes.

    Raises:
        TubeletError: the store or configuration does not fit, `out` holds another run, or training broke down.
    """
    with join_process_group() as ranks:
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: ProcessGroup) -> Path:
    stores = open_stores(config)
    folder = config.out / "checkpoints"
    looked_at, found = latest_name(folder), load_latest(folder)
    # Everyone has looked before the first one writes.
    ranks.wait()
    config = _with_resident_shards(config, stores, found)
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_memory()
    run = Run(config, stores, device, ranks)
    if found is not None and not config.resume:
        raise TubeletError(
            f"{config.out} already holds a run", "Choose another --out, or let it continue with --resume true"
        )
    if found is not None:
        run.restore(found)
    done = run.windows.step
    if done < run.windows.steps or not all(exported(sae_run.out, run) for sae_run in run.sound):
        with claimed(run, looked_at) as logs:
            _finish(run, found, folder, logs)
    elif ranks.first:
        print(f"{config.out} is complete: {done} steps were taken", file=sys.stderr)
    ranks.wait()
    raise_diverged(run)
    return config.out


def _finish(run: Run, found: Checkpoint | None, folder: Path, logs: Logs) -> None:
    """Train to the end, and write the SAEs."""
    done = run.windows.step
    with ProgressReport(run.windows.steps, done, silent=not run.ranks.first) as report:
        _announce(run, found, report)
        logs.write("mixing", 0, {sae_run.name: asdict(run.mixing) for sae_run in run.sae_runs})
        final = _loop(run, folder, logs, report)
        for name, figures in final.items():
            if figures.get("fvu", 0.0) > 1:
                label = f"{name}: " if name else ""
                report.note(
                    f"{label}FVU {figures['fvu']:.2f} is worse than predicting the mean (FVU 1): it has not learned. "
                    "Train longer, or with a lower optimizer.lr, into another --out"
                )
    for sae_run in run.sound:
        if (sae := run.result(sae_run)) is not None and run.ranks.first:
            save_sae(sae_run.out, sae, run.provenance(sae_run, final[sae_run.name]))


def _with_resident_shards(config: TrainConfig, stores: Sequence[Store], found: Checkpoint | None) -> TrainConfig:
    """`config` with `resident_shards` decided: it is part of the order of tokens, so it must stay with the run."""
    if config.resident_shards is not None:
        return config
    if found is not None:
        return config.model_copy(update={"resident_shards": found.record["config"].get("resident_shards")})
    return config.model_copy(update={"resident_shards": resident_shards(config, stores)})


def _loop(run: Run, folder: Path, logs: Logs, report: ProgressReport) -> dict[str, dict[str, float]]:
    """Train to the end; of each SAE the last evaluation, or without held-out videos the last training metrics."""
    config, steps = run.config, run.windows.steps
    latest: dict[str, dict[str, float]] = {}
    tokens, since = 0, time.monotonic()
    watch = L0ControllerWatch()
    with StopRequest().listening() as stop:
        for batch in run.windows:
            step = run.windows.step
            found = run.learn(batch, step - 1)
            tokens += batch.whole
            reports = step % config.log_every == 0 or step == steps
            # Ranks ask each other seldom: it is a wait for the device.
            stops = step < steps and (reports or run.ranks.size == 1) and stop.came(run.ranks, run.device)
            saves = step % config.checkpoint_every == 0 or step == steps
            if reports or saves or stops:
                latest = _read(run, found, batch.whole == config.batch_tokens, report)
            if reports:
                speed = tokens / (time.monotonic() - since)
                tokens, since = 0, time.monotonic()
                rates = {
                    sae_run.name: {"lr": sae_run.sae_trainer.lr, "tokens_per_s": round(speed, 1)}
                    for sae_run in run.sound
                }
                logs.write("train", step, {name: rates[name] | line for name, line in latest.items()})
            if stops:
                # Before all that takes long, and before a terminal that may be gone is written to.
                _save(run, step, folder)
            if reports:
                means = {key: sum(line[key] for line in latest.values()) / len(latest) for key in ("fvu", "l0", "dead")}
                report.metrics(step, speed, means, len(latest))
                for line in watch.look(step, steps, run.sound, latest):
                    report.note(line)
            if step % config.eval_every == 0 and step < steps:
                _evaluate(run, step, logs, report)
            if stops:
                report.note(f"stopped after step {step} of {steps}, which is kept")
                stop.leave(run.ranks)
            if saves:
                _save(run, step, folder)
    # Killed after its last checkpoint, a run has no step left to read metrics from.
    return _evaluate(run, steps, logs, report) or latest or {sae_run.name: {} for sae_run in run.sae_runs}


def _save(run: Run, step: int, folder: Path) -> None:
    checkpoint = run.checkpoint(step)
    if run.ranks.first:
        save_checkpoint(folder, checkpoint, run.config.keep_checkpoints)


def _read(
    run: Run, found: Sequence[Mapping[str, Tensor]], whole: bool, report: ProgressReport
) -> dict[str, dict[str, float]]:
    """The metrics of a step of each sound SAE as numbers; one that has broken down is set aside.

    Args:
        run: After the step.
        found: The step's metrics of each SAE.
        whole: The batch is not the run's last, which may be too small to judge by.
        report: Tells of an SAE that is set aside.

    Raises:
        TubeletError: no SAE is left.
    """
    latest: dict[str, dict[str, float]] = {}
    new: list[TubeletError] = []
    for sae_run, metrics in zip(run.sae_runs, found, strict=True):
        if sae_run.name in run.broken:
            continue
        values = {name: float(value) for name, value in metrics.items()}
        norm = sae_run.sae_trainer.sae.W_enc.detach().norm(dim=1).mean()
        values["encoder_norm"] = float(run.ranks.sum(norm) / run.ranks.size)
        fault = find_divergence(sae_run, run.windows.step, values, whole)
        if fault is None:
            latest[sae_run.name] = values
            continue
        run.broken[sae_run.name] = fault
        new.append(fault)
    if not run.sound:
        raise_diverged(run)
    for fault in new:
        report.note(f"{fault} It is set aside; the others go on.")
    return latest


def _evaluate(run: Run, step: int, logs: Logs, report: ProgressReport) -> dict[str, dict[str, float]]:
    if run.heldout is None:
        return {}
    figures = {sae_run.name: run.evaluate(sae_run, run.heldout) for sae_run in run.sound}
    logs.write("eval", step, figures)
    for name, line in figures.items():
        dead = f"dead {line['dead']:.1%} over {line['tokens']:,} tokens"
        label = f" {name}" if name else ""
        report.note(f"step {step}:{label} held-out FVU {line['fvu']:.4f}  L0 {line['l0']:.1f}  {dead}")
    return figures


def _announce(run: Run, found: Checkpoint | None, report: ProgressReport) -> None:
    windows = run.windows
    kept = 0 if run.heldout is None else len(run.heldout.clips)
    report.note(
        f"{', '.join(run.streams.hooks)}: {len(windows.clips)} clips to train on, {kept} held out, "
        f"{run.streams.failed} failed; {windows.total_tokens:,} tokens in {windows.steps} steps"
    )
    report.note(f"{run.mixing}; windows take {windows.memory_bytes / 2**20:,.0f} MiB")
    if not kept:
        report.note("no video is held out: nothing will be evaluated (see holdout.fraction)")
    if windows.steps < _FEW_STEPS:
        report.note(f"only {windows.steps} steps: lower batch_tokens, or raise epochs, tokens or steps, to learn more")
    for sae_run in run.sae_runs:
        channels = sae_run.sae_trainer.sae.channels
        latents = sae_run.spec.config.sae.latents_for(channels)
        report.note(f"{sae_run.name or sae_run.hook}: {latents} latents for {channels} channels")
    if found is None:
        for sae_run in {sae_run.hook: sae_run for sae_run in run.sae_runs}.values():
            offset = Offset.of(sae_run.moments)
            centered = "centered here" if sae_run.spec.config.sae.normalization.center else "NOT centered here"
            report.note(
                f"{sae_run.hook}: tokens lie {offset.gamma:.2f} standard deviations off the origin ({centered}); "
                f"uncentered, about {offset.dead_share:.1%} of the latents would start dead"
            )
        return
    report.note(f"continuing after step {found.step}")
    then = found.record["software"]
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in software().items() if then.get(name) != value]
    if changed:
        report.note(f"changed since: {', '.join(changed)}; results agree up to rounding, not bit for bit")
