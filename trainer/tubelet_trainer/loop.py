"""The training loop.

    stores ─▶ Streams ─▶ batch ─▶ Learner, Learner, ... (one per SAE) ─▶ metrics, checkpoints

All SAEs of a run see the same batches; each learns as if it were alone, so that training several together gives the
weights that each would have alone. What a run leaves in its folder:

    config.yaml                        the configuration, defaults included
    metrics.jsonl                      one line per logged step ("train") and evaluation ("eval")
    checkpoints/                       see `checkpoint`
    sae.safetensors, sae.json          the trained SAE with its normalisation and provenance; written at the end

With several SAEs `checkpoints` and the whole configuration lie there, and the rest in a folder for each.

Killed at any point, the same command continues to the same weights: bit for bit on the CPU with the same number of
threads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tubelet_store import Store, TubeletError
from tubelet_store.config import dump_yaml
from tubelet_trainer.breakdown import refuse_breakdown
from tubelet_trainer.checkpoint import Checkpoint, load_latest, save_checkpoint
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.files import replace_file
from tubelet_trainer.machine import choose_device, keep_memory, software
from tubelet_trainer.metrics_log import MetricsLog
from tubelet_trainer.progress import ProgressReport
from tubelet_trainer.ranks import Ranks, joined_ranks
from tubelet_trainer.run import Member, Run
from tubelet_trainer.sae.export import RECORD, load_record, save_sae
from tubelet_trainer.sae.initialisation import Offset
from tubelet_trainer.specs import flat
from tubelet_trainer.stream import open_stores, resident_shards
from tubelet_trainer.trackers import Prefixed, Tracker, open_tracker


def train(config: TrainConfig) -> Path:
    """Train the SAEs that `config` describes, continuing a run found in `config.out`; the run's folder.

    Under torchrun all processes call it; the first one writes.

    Raises:
        TubeletError: the store or configuration does not fit, `out` holds another run, or training broke down.
    """
    with joined_ranks() as ranks:
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> Path:
    stores = open_stores(config)
    folder = config.out / "checkpoints"
    found = load_latest(folder)
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
    if ranks.first:
        _write_configs(run)
    if done == run.windows.steps and all(_exported(member.out, run) for member in run.members):
        return config.out
    logs = _Logs(run, done)
    try:
        with ProgressReport(run.windows.steps, done, silent=not ranks.first) as report:
            _announce(run, found, report)
            final = _loop(run, folder, logs, report)
    finally:
        logs.close()
    for member, metrics in zip(run.members, final, strict=True):
        if (sae := run.result(member)) is not None and ranks.first:
            save_sae(member.out, sae, run.provenance(member, metrics))
    ranks.wait()
    return config.out


def _write_configs(run: Run) -> None:
    """The run's configuration, and that of each SAE as it would be trained alone."""
    run.config.out.mkdir(parents=True, exist_ok=True)
    replace_file(run.config.out / "config.yaml", dump_yaml(run.config).encode())
    for member in run.members:
        if member.name:
            member.out.mkdir(parents=True, exist_ok=True)
            decided = {"block_patches": run.streams.block_patches, "resident_shards": run.config.resident_shards}
            alone = member.spec.config.model_copy(update=decided)
            replace_file(member.out / "config.yaml", dump_yaml(alone).encode())


class _Logs:
    """metrics.jsonl of each SAE, and one tracker for all; nothing on ranks but the first."""

    def __init__(self, run: Run, step: int) -> None:
        self._logs: list[MetricsLog] = []
        self._tracker: Tracker | None = None
        if run.ranks.first:
            config = run.config
            tracker = open_tracker(config.tracker, config.out, step, flat(config.model_dump(mode="json")))
            self._tracker = tracker
            self._logs = [
                MetricsLog(member.out / "metrics.jsonl", step, Prefixed(tracker, member.name)) for member in run.members
            ]

    def write(self, kind: str, step: int, values: Sequence[Mapping[str, float]]) -> None:
        """One line for each SAE."""
        for log, line in zip(self._logs, values, strict=False):
            log.write(kind, step, **line)

    def close(self) -> None:
        """Close the files and the tracker."""
        for log in self._logs:
            log.close()
        if self._tracker is not None:
            self._tracker.close()


def _with_resident_shards(config: TrainConfig, stores: Sequence[Store], found: Checkpoint | None) -> TrainConfig:
    """`config` with `resident_shards` decided: it is part of the order of tokens, so it must stay with the run."""
    if config.resident_shards is not None:
        return config
    if found is not None:
        return config.model_copy(update={"resident_shards": found.record["config"].get("resident_shards")})
    return config.model_copy(update={"resident_shards": resident_shards(config, stores)})


def _loop(run: Run, folder: Path, logs: _Logs, report: ProgressReport) -> list[dict[str, float]]:
    """Train to the end; of each SAE the last evaluation, or without held-out videos the last training metrics."""
    config, steps = run.config, run.windows.steps
    latest: list[dict[str, float]] = []
    tokens, since = 0, time.monotonic()
    for batch in run.windows:
        step = run.windows.step
        found = run.learn(batch, step - 1)
        tokens += batch.whole
        reports = step % config.log_every == 0 or step == steps
        saves = step % config.checkpoint_every == 0 or step == steps
        if reports or saves:
            whole = batch.whole == config.batch_tokens
            latest = [_read(run, member, metrics, whole) for member, metrics in zip(run.members, found, strict=True)]
        if reports:
            speed = tokens / (time.monotonic() - since)
            tokens, since = 0, time.monotonic()
            rates = [{"lr": member.learner.lr, "tokens_per_s": round(speed, 1)} for member in run.members]
            logs.write("train", step, [rate | line for rate, line in zip(rates, latest, strict=True)])
            means = [sum(line[name] for line in latest) / len(latest) for name in ("fvu", "l0", "dead")]
            report.metrics(step, speed, *means)
        if step % config.eval_every == 0 and step < steps:
            _evaluate(run, step, logs, report)
        if saves:
            checkpoint = run.checkpoint(step)
            if run.ranks.first:
                save_checkpoint(folder, checkpoint, config.keep_checkpoints)
    # Killed after its last checkpoint, a run has no step left to read metrics from.
    return _evaluate(run, steps, logs, report) or latest or [{} for _ in run.members]


def _read(run: Run, member: Member, metrics: Mapping[str, Tensor], whole: bool) -> dict[str, float]:
    """A step's metrics as numbers. A batch that is not `whole`, the run's last, may be too small to judge it by.

    Raises:
        TubeletError: training broke down.
    """
    values = {name: float(value) for name, value in metrics.items()}
    norm = member.learner.sae.W_enc.detach().norm(dim=1).mean()
    values["encoder_norm"] = float(run.ranks.sum(norm) / run.ranks.size)
    refuse_breakdown(member, run.windows.step, values, whole)
    return values


def _evaluate(run: Run, step: int, logs: _Logs, report: ProgressReport) -> list[dict[str, float]]:
    if run.heldout is None:
        return []
    held = [run.evaluate(member, run.heldout) for member in run.members]
    logs.write("eval", step, held)
    for member, line in zip(run.members, held, strict=True):
        name = f" {member.name}" if member.name else ""
        dead = f"dead {line['dead']:.1%} over {line['tokens']:,} tokens"
        report.note(f"step {step}:{name} held-out FVU {line['fvu']:.4f}  L0 {line['l0']:.1f}  {dead}")
    return held


def _announce(run: Run, found: Checkpoint | None, report: ProgressReport) -> None:
    windows = run.windows
    held = 0 if run.heldout is None else len(run.heldout.clips)
    report.note(
        f"{', '.join(run.streams.hooks)}: {len(windows.clips)} clips to train on, {held} held out, "
        f"{run.streams.failed} failed; {windows.total_tokens:,} tokens in {windows.steps} steps"
    )
    report.note(str(run.mixing))
    for member in run.members:
        channels = member.learner.sae.channels
        latents = member.spec.config.sae.latents_for(channels)
        report.note(f"{member.name or member.hook}: {latents} latents for {channels} channels")
    if found is None:
        for member in {member.hook: member for member in run.members}.values():
            offset = Offset.of(member.moments)
            centred = "centred here" if member.spec.config.sae.normalisation.centre else "NOT centred here"
            report.note(
                f"{member.hook}: tokens lie {offset.gamma:.2f} standard deviations off the origin ({centred}); "
                f"uncentred, about {offset.dead_share:.1%} of the latents would start dead"
            )
        return
    report.note(f"continuing after step {found.step}")
    then = found.record["software"]
    changed = [f"{name} {then.get(name)} -> {value}" for name, value in software().items() if then.get(name) != value]
    if changed:
        report.note(f"changed since: {', '.join(changed)}; results agree up to rounding, not bit for bit")


def _exported(out: Path, run: Run) -> bool:
    return (out / RECORD).is_file() and load_record(out).provenance.get("store_identity") == run.store.identity
