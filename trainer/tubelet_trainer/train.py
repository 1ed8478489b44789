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

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor

from tubelet_store import Moments, Store, TubeletError, open_store
from tubelet_store.config import dump_yaml
from tubelet_trainer.checkpoint import Checkpoint, load_latest, save_checkpoint
from tubelet_trainer.coherence import coherence_terms
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.evaluation import evaluate
from tubelet_trainer.files import replace_file
from tubelet_trainer.learner import Learner
from tubelet_trainer.metrics_log import MetricsLog
from tubelet_trainer.mixing import measure_mixing
from tubelet_trainer.objective import Objective
from tubelet_trainer.progress import ProgressReport
from tubelet_trainer.ranks import ALONE, Ranks, joined_ranks
from tubelet_trainer.sae.config import GatedConfig, JumpReLUConfig, ReLUConfig
from tubelet_trainer.sae.export import RECORD, load_record, save_sae
from tubelet_trainer.sae.initialisation import Offset, initialise, needs_tokens
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalisation import Normalisation
from tubelet_trainer.sae.penalties import sae_terms
from tubelet_trainer.sharding import (
    ShardedSAE,
    gather_state,
    own_state,
    refuse_unsplittable,
    sharded_terms,
    split_batch,
)
from tubelet_trainer.source import choose_hook
from tubelet_trainer.specs import Spec, specs
from tubelet_trainer.stream import Streams
from tubelet_trainer.trackers import Prefixed, Tracker, open_tracker
from tubelet_trainer.windows import Batch

_PENALISED = (ReLUConfig, GatedConfig, JumpReLUConfig)

# Beyond these a run is lost. [RECON] Encoder rows start at norm 1; FVU 1 is as good as predicting the mean.
_EXPLODED_NORM = 100.0
_EXPLODED_FVU = 100.0

# Latents silent for 10 million tokens are dead (Gao et al. 2024, appendix A.2). A short run would never get there:
# a tenth of its tokens, if that is less. [RECON]
_DEAD_AFTER_TOKENS = 10_000_000
_DEAD_AFTER_SHARE = 10

# Fields that change what is shown or kept, or where it lies, not what is learnt. The store is compared by identity.
_FREE_FIELDS = (
    "store",
    "out",
    "log_every",
    "eval_every",
    "eval_tokens",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "device",
    "mirror",
    "tracker",
    "parallel",
)


@dataclass(frozen=True)
class Member:
    """One SAE of a run."""

    spec: Spec
    hook: str
    learner: Learner
    moments: Moments
    """Of the tokens it learns from."""

    @property
    def name(self) -> str:
        """Its folder below the run's; empty where it is the only one."""
        return self.spec.name

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.spec.config.out


class Run:
    """SAEs in training: their data, weights, optimisers and position. `learn` advances them by one batch.

    Args:
        config: The configuration.
        store: The open store.
        device: Where to train.
        ranks: The processes of the run.

    Raises:
        TubeletError: the configuration does not fit the store.
    """

    def __init__(self, config: TrainConfig, store: Store, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.config, self.store, self.device, self.ranks = config, store, device, ranks
        self.sharded = ranks.size > 1 and config.parallel == "dictionary"
        found = specs(config)
        self.streams = Streams(config, found, store, device, ALONE if self.sharded else ranks)
        self.windows = self.streams.training
        self.heldout = self.streams.heldout
        self.members = [self._begin(spec) for spec in found]

    @property
    def member(self) -> Member:
        """The first (or only) SAE."""
        return self.members[0]

    @property
    def sae(self) -> SAE:
        """The SAE in training, where there is one."""
        return self.member.learner.sae

    def _begin(self, spec: Spec) -> Member:
        """An SAE before its first step."""
        config, total = spec.config, self.streams.total_tokens
        hook = choose_hook(self.store, config.hook)
        moments = self.streams.moments(hook)
        normalisation = Normalisation.from_moments(moments, config.sae.normalisation)
        sae = SAE(config.sae, normalisation).to(self.device)
        wanted = needs_tokens(config.sae.init)
        initialise(sae, moments, self.streams.first_tokens(hook, config.sae.init.tokens) if wanted else None)
        variance = normalisation.variance(moments)
        terms = sae_terms(config.sae, sae.channels, variance, self.windows.steps, self.device)
        terms += coherence_terms(config.objective, config.sae, sae.latents, variance)
        if self.sharded:
            refuse_unsplittable(config)
            sae, terms = ShardedSAE(sae, self.ranks), sharded_terms(terms, self.ranks)
        else:
            split_batch(sae, self.ranks)
        learner = Learner(
            sae,
            Objective(terms),
            config.optimiser,
            self.windows.steps,
            _dead_after(config, total),
            torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32,
            ALONE if self.sharded else self.ranks,
        )
        return Member(spec, hook, learner, moments)

    def learn(self, batch: Batch, step: int) -> list[Mapping[str, Tensor]]:
        """Step number `step` (from 0): learn from `batch`; metrics of each SAE, on the device, with `grad_norm`."""
        return [
            member.learner.learn(member.learner.forward(batch.hooks[member.hook], step, batch, member.hook))
            for member in self.members
        ]

    def result(self, member: Member) -> SAE:
        """The SAE to evaluate and export, whole; a collective call."""
        sae = member.learner.result()
        return sae.gathered() if isinstance(sae, ShardedSAE) else sae

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that decides the rest of the run, after `step` steps; a collective call."""
        record = {
            "config": self.config.model_dump(mode="json"),
            "store_identity": self.store.identity,
            "hook": self.member.hook,
            "loader": {**self.windows.state_dict(), "step": step},
            "software": software(),
        }
        tensors: dict[str, Tensor] = {}
        for member in self.members:
            state = member.learner.state()
            state = gather_state(state, self.ranks) if self.sharded else state
            tensors |= {_inside(member, name): tensor for name, tensor in state.items()}
        return Checkpoint(step, tensors, record)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, with any number of ranks.

        Raises:
            TubeletError: it was made with another configuration or store.
        """
        self._refuse_other_run(checkpoint.record)
        for member in self.members:
            prefix = _inside(member, "")
            found = {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
            member.learner.load_state(own_state(found, self.ranks) if self.sharded else found)
        self.windows.load_state_dict(checkpoint.record["loader"])

    def _refuse_other_run(self, record: Mapping[str, Any]) -> None:
        then, now = _flat(record["config"]), _flat(self.config.model_dump(mode="json"))
        differ = [
            f"{name}: {then.get(name)} -> {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if name.partition(".")[0] not in _FREE_FIELDS and then.get(name) != now.get(name)
        ]
        if record["store_identity"] != self.store.identity:
            differ.append(f"store identity: {record['store_identity']} -> {self.store.identity}")
        if differ:
            raise TubeletError(
                f"{self.config.out} holds a run with another configuration: {'; '.join(differ)}",
                "Use the run's own configuration to continue it, or another --out",
            )

    def provenance(self, member: Member, metrics: Mapping[str, float]) -> dict[str, JsonValue]:
        """Where an SAE comes from, for `sae.json`."""
        plan, config = self.store.plan, member.spec.config
        described = {
            "store": Path(self.store.url).name,
            "store_identity": self.store.identity,
            "plan_digest": plan.digest,
            "hook": member.hook,
            "backbone": plan.backbone,
            "dataset": plan.dataset,
            "mix": [
                {"store": Path(store.url).name, "store_identity": store.identity, "share": float(share)}
                for store, share in list(zip(self.streams.stores, self.streams.shares, strict=True))[1:]
            ],
            "holdout": config.holdout.model_dump(mode="json"),
            "objective": config.objective.model_dump(mode="json"),
            "pairs": config.pairs.model_dump(mode="json"),
            "loader": self.windows.state_dict(),
            "tokens": self.windows.total_tokens,
            "metrics": dict(metrics),
            "software": software(),
        }
        return cast("dict[str, JsonValue]", described)


def _dead_after(config: TrainConfig, total_tokens: int) -> int:
    chosen = config.sae.dead_after_tokens
    return chosen if chosen is not None else max(1, min(_DEAD_AFTER_TOKENS, total_tokens // _DEAD_AFTER_SHARE))


def _inside(member: Member, name: str) -> str:
    """Key of a tensor in a checkpoint."""
    return f"{member.name}/{name}" if member.name else name


def train(config: TrainConfig) -> Path:
    """Train the SAEs that `config` describes, continuing a run found in `config.out`; the run's folder.

    Under torchrun all processes call it; the first one writes.

    Raises:
        TubeletError: the store or configuration does not fit, `out` holds another run, or training broke down.
    """
    with joined_ranks() as ranks:
        return _train(config, ranks)


def _train(config: TrainConfig, ranks: Ranks) -> Path:
    store = open_store(config.store, mirror=config.mirror)
    folder = config.out / "checkpoints"
    found = load_latest(folder)
    # Everyone has looked before the first one writes.
    ranks.wait()
    config = _with_resident_shards(config, store, found)
    run = Run(config, store, choose_device(config.device), ranks)
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
        sae = run.result(member)
        if ranks.first:
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
            tracker = open_tracker(config.tracker, config.out, step, _flat(config.model_dump(mode="json")))
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


def _with_resident_shards(config: TrainConfig, store: Store, found: Checkpoint | None) -> TrainConfig:
    """`config` with `resident_shards` decided: it is part of the order of tokens, so it must stay with the run."""
    if config.resident_shards is not None:
        return config
    if found is not None:
        return config.model_copy(update={"resident_shards": found.record["config"].get("resident_shards")})
    if store.mirror is None:
        return config
    size_bytes = store.shard_object(choose_hook(store, specs(config)[0].config.hook), 0).stored.size_bytes
    if size_bytes * store.plan.shards <= config.mirror.budget:
        return config
    # Twice: while the last blocks of one group are read, the next one is fetched.
    fitting = max(1, int(config.mirror.budget) // (2 * size_bytes))
    return config.model_copy(update={"resident_shards": fitting})


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
    return _evaluate(run, steps, logs, report) or latest


def _read(run: Run, member: Member, metrics: Mapping[str, Tensor], whole: bool) -> dict[str, float]:
    """A step's metrics as numbers. A batch that is not `whole`, the run's last, may be too small to judge it by.

    Raises:
        TubeletError: training broke down.
    """
    values = {name: float(value) for name, value in metrics.items()}
    norm = member.learner.sae.W_enc.detach().norm(dim=1).mean()
    values["encoder_norm"] = float(run.ranks.sum(norm) / run.ranks.size)
    _refuse_breakdown(member, run.windows.step, values, whole)
    return values


def _evaluate(run: Run, step: int, logs: _Logs, report: ProgressReport) -> list[dict[str, float]]:
    if run.heldout is None:
        return []
    held = [evaluate(run.result(member), run.heldout, member.hook) for member in run.members]
    logs.write("eval", step, held)
    for member, line in zip(run.members, held, strict=True):
        name = f" {member.name}" if member.name else ""
        dead = f"dead {line['dead']:.1%} over {line['tokens']:,} tokens"
        report.note(f"step {step}:{name} held-out FVU {line['fvu']:.4f}  L0 {line['l0']:.1f}  {dead}")
    return held


def _refuse_breakdown(member: Member, step: int, metrics: Mapping[str, float], whole: bool) -> None:
    """Stop before bad weights reach a checkpoint."""
    where = f"Step {step} of {member.name}" if member.name else f"Step {step}"
    recipe = member.spec.config.sae
    wrong = [name for name in ("loss", "grad_norm", "encoder_norm") if not math.isfinite(metrics[name])]
    if wrong:
        raise TubeletError(
            f"{where}: {' and '.join(wrong)} not finite (learning rate {member.learner.lr:.2e})",
            "Lower optimiser.lr or raise optimiser.warmup_steps, and train into another --out",
        )
    if not whole:
        return
    silent = "All latents are dead" if metrics["dead"] == 1 else "No latent is active" if metrics["l0"] == 0 else None
    if silent is not None:
        lever = "Lower sae.sparsity" if isinstance(recipe, _PENALISED) else "Raise sae.k or sae.auxk_coef"
        raise TubeletError(
            f"{where}: {silent} ({recipe.latents_for(member.learner.sae.channels)} of them)",
            f"{lever} or lower optimiser.lr, and train into another --out",
        )
    # A healthy encoder keeps its rows within a small factor of the 1 they start from.
    if metrics["encoder_norm"] > _EXPLODED_NORM or metrics["fvu"] > _EXPLODED_FVU:
        raise TubeletError(
            f"{where}: training diverges (encoder rows of norm {metrics['encoder_norm']:.3g} on average, "
            f"FVU {metrics['fvu']:.3g})",
            "Lower optimiser.lr or raise optimiser.warmup_steps, and train into another --out",
        )


def _announce(run: Run, found: Checkpoint | None, report: ProgressReport) -> None:
    windows = run.windows
    held = 0 if run.heldout is None else len(run.heldout.clips)
    report.note(
        f"{', '.join(run.streams.hooks)}: {len(windows.clips)} clips to train on, {held} held out, "
        f"{run.streams.failed} failed; {windows.total_tokens:,} tokens in {windows.steps} steps"
    )
    report.note(str(measure_mixing(windows)))
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


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` is CUDA if there is one.

    Raises:
        TubeletError: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TubeletError(
            "device is 'cuda', but torch finds no GPU here", "Use --device cpu, or install torch for CUDA"
        )
    return torch.device(name)


def software() -> dict[str, JsonValue]:
    """Versions and thread count that bitwise repetition depends on."""
    return {
        "tubelet": version("tubelet"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
