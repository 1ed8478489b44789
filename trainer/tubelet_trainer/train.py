"""The training loop.

    store ─▶ Windows ─▶ batch ─▶ Objective ─▶ gradient ─▶ project, clip, Adam, unit norm ─▶ metrics, checkpoints

What a run leaves in its folder:

    config.yaml                        the configuration, defaults included
    metrics.jsonl                      one line per logged step ("train") and evaluation ("eval")
    checkpoints/                       see `checkpoint`
    sae.safetensors, sae.json          the trained SAE with its normalisation and provenance; written at the end

Killed at any point, the same command continues to the same weights: bit for bit on the CPU with the same number of
threads.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor

from tubelet_store import Store, TubeletError, open_store
from tubelet_store.config import dump_yaml
from tubelet_trainer.checkpoint import Checkpoint, load_latest, save_checkpoint
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.evaluation import evaluate
from tubelet_trainer.files import replace_file
from tubelet_trainer.metrics_log import MetricsLog
from tubelet_trainer.objective import AuxK, FiringClock, Forward, Objective, Reconstruction, Term
from tubelet_trainer.progress import ProgressReport
from tubelet_trainer.sae.export import RECORD, load_record, save_sae
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalisation import Normalisation
from tubelet_trainer.source import Source, choose_hook
from tubelet_trainer.split import held_out
from tubelet_trainer.windows import Batch, Windows

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
)


class Run:
    """One SAE in training: its data, weights, optimiser and position. `step` advances it by one batch.

    Args:
        config: The configuration.
        store: The open store.
        device: Where to train.

    Raises:
        TubeletError: the configuration does not fit the store.
    """

    def __init__(self, config: TrainConfig, store: Store, device: torch.device) -> None:
        self.config = config
        self.store = store
        source = Source(store, config.hook, config.block_patches)
        self.hook = source.hook
        training, heldout = self._split()
        loader: dict[str, Any] = {
            "batch_tokens": config.batch_tokens,
            "resident_shards": config.resident_shards,
            "device": device,
        }
        total = config.total_tokens(len(training) * store.plan.grid.tokens)
        self.windows = Windows(
            source, training, window_tokens=config.window_tokens, total_tokens=total, seed=config.seed, **loader
        )
        self.heldout: Windows | None = None
        if len(heldout):
            # The first tokens of a shuffled pass over all held-out ones; its seed is fixed, so always the same tokens.
            tokens = min(config.eval_tokens, len(heldout) * store.plan.grid.tokens)
            self.heldout = Windows(source, heldout, window_tokens=tokens, total_tokens=tokens, **loader)
        normalisation = Normalisation.from_moments(store.moments(self.hook))
        self.sae = SAE(config.sae, normalisation).to(device)
        self.clock = FiringClock(self.sae.latents, self._dead_after(total), device)
        auxk = config.sae.auxk if config.sae.auxk is not None else max(1, self.sae.channels // 2)
        # By construction of the scale, the variance of normalised tokens is their number of channels.
        self.objective = Objective([Reconstruction(self.sae.channels), AuxK(auxk, config.sae.auxk_coef)])
        self._peak_lr = config.optimiser.peak_lr(self.sae.latents)
        options = config.optimiser
        betas = (options.beta1, options.beta2)
        self._optimiser = torch.optim.Adam(self.sae.parameters(), lr=self._peak_lr, betas=betas, eps=options.eps)

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Clips to train on and clips held out, without those that failed."""
        table, ok = self.store.clips(), self.store.ok()
        out = np.zeros(self.store.plan.clips, dtype=bool)
        out[table["clip"].to_numpy()] = held_out(table["video_id"].to_pylist(), self.config.holdout)
        if not (ok & ~out).any():
            raise TubeletError(
                f"{self.store.url}: no clip is left to train on ({int(ok.sum())} of {len(ok)} hold activations, "
                f"{int((ok & out).sum())} of those are held out)",
                "Lower holdout.fraction, or extract more clips",
            )
        return np.flatnonzero(ok & ~out), np.flatnonzero(ok & out)

    def _dead_after(self, total_tokens: int) -> int:
        chosen = self.config.sae.dead_after_tokens
        return chosen if chosen is not None else max(1, min(_DEAD_AFTER_TOKENS, total_tokens // _DEAD_AFTER_SHARE))

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return float(self._optimiser.param_groups[0]["lr"])

    def learn(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """Step number `step` (from 0): learn from `batch`; its metrics, on the device, with `grad_norm`."""
        factor = self.config.optimiser.lr_factor(step, self.windows.steps)
        self._optimiser.param_groups[0]["lr"] = self._peak_lr * factor
        forward = Forward.of(self.sae, batch.tokens, self.clock.dead_F)
        total: Term = self.objective(forward)
        self._optimiser.zero_grad(set_to_none=True)
        total.loss.backward()
        self.sae.project_decoder_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.optimiser.grad_clip)
        self._optimiser.step()
        self.sae.normalise_decoder()
        self.clock.update(forward.codes)
        return {**total.metrics, "grad_norm": norm}

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that decides the rest of the run, after `step` steps."""
        tensors = {f"sae/{name}": tensor for name, tensor in self.sae.state_dict().items()}
        names = [name for name, _ in self.sae.named_parameters()]
        for index, moments in self._optimiser.state_dict()["state"].items():
            tensors |= {f"adam/{names[index]}/{key}": value for key, value in moments.items()}
        tensors["clock/silent_tokens"] = self.clock.silent_tokens_F
        record = {
            "config": self.config.model_dump(mode="json"),
            "store_identity": self.store.identity,
            "hook": self.hook,
            "loader": {**self.windows.state_dict(), "step": step},
            "software": software(),
        }
        return Checkpoint(step, tensors, record)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`.

        Raises:
            TubeletError: it was made with another configuration or store.
        """
        self._refuse_other_run(checkpoint.record)
        parts: dict[str, dict[str, Tensor]] = {"sae": {}, "adam": {}, "clock": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = tensor
        self.sae.load_state_dict(parts["sae"])
        state: dict[int, dict[str, Tensor]] = {}
        for index, (parameter, _) in enumerate(self.sae.named_parameters()):
            prefix = f"{parameter}/"
            state[index] = {key.removeprefix(prefix): t for key, t in parts["adam"].items() if key.startswith(prefix)}
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.clock.silent_tokens_F.copy_(parts["clock"]["silent_tokens"])
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

    def provenance(self, metrics: Mapping[str, float]) -> dict[str, JsonValue]:
        """Where the SAE comes from, for `sae.json`."""
        plan = self.store.plan
        described = {
            "store": Path(self.store.url).name,
            "store_identity": self.store.identity,
            "plan_digest": plan.digest,
            "hook": self.hook,
            "backbone": plan.backbone,
            "dataset": plan.dataset,
            "holdout": self.config.holdout.model_dump(mode="json"),
            "loader": self.windows.state_dict(),
            "tokens": self.windows.total_tokens,
            "metrics": dict(metrics),
            "software": software(),
        }
        return cast("dict[str, JsonValue]", described)


def train(config: TrainConfig) -> Path:
    """Train the SAE that `config` describes, continuing a run found in `config.out`; the run's folder.

    Raises:
        TubeletError: the store or configuration does not fit, `out` holds another run, or training broke down.
    """
    store = open_store(config.store, mirror=config.mirror)
    folder = config.out / "checkpoints"
    found = load_latest(folder)
    config = _with_resident_shards(config, store, found)
    run = Run(config, store, choose_device(config.device))
    if found is not None and not config.resume:
        raise TubeletError(
            f"{config.out} already holds a run", "Choose another --out, or let it continue with --resume true"
        )
    if found is not None:
        run.restore(found)
    done = run.windows.step
    config.out.mkdir(parents=True, exist_ok=True)
    replace_file(config.out / "config.yaml", dump_yaml(config).encode())
    if done == run.windows.steps and _exported(config.out, run):
        return config.out
    log = MetricsLog(config.out / "metrics.jsonl", done)
    try:
        with ProgressReport(run.windows.steps, done) as report:
            _announce(run, found, report)
            final = _loop(run, folder, log, report)
    finally:
        log.close()
    save_sae(config.out, run.sae, run.provenance(final))
    return config.out


def _with_resident_shards(config: TrainConfig, store: Store, found: Checkpoint | None) -> TrainConfig:
    """`config` with `resident_shards` decided: it is part of the order of tokens, so it must stay with the run."""
    if config.resident_shards is not None:
        return config
    if found is not None:
        return config.model_copy(update={"resident_shards": found.record["config"].get("resident_shards")})
    if store.mirror is None:
        return config
    size_bytes = store.shard_object(choose_hook(store, config.hook), 0).stored.size_bytes
    if size_bytes * store.plan.shards <= config.mirror.budget:
        return config
    # Twice: while the last blocks of one group are read, the next one is fetched.
    fitting = max(1, int(config.mirror.budget) // (2 * size_bytes))
    return config.model_copy(update={"resident_shards": fitting})


def _loop(run: Run, folder: Path, log: MetricsLog, report: ProgressReport) -> dict[str, float]:
    """Train to the end; the last evaluation, or without held-out videos the last training metrics."""
    config, steps = run.config, run.windows.steps
    latest: dict[str, float] = {}
    tokens, since = 0, time.monotonic()
    for batch in run.windows:
        step = run.windows.step
        metrics = run.learn(batch, step - 1)
        tokens += len(batch)
        logs = step % config.log_every == 0 or step == steps
        saves = step % config.checkpoint_every == 0 or step == steps
        if logs or saves:
            latest = {name: float(value) for name, value in metrics.items()}
            _refuse_breakdown(run, step, latest)
        if logs:
            speed = tokens / (time.monotonic() - since)
            tokens, since = 0, time.monotonic()
            log.write("train", step, lr=run.lr, tokens_per_s=round(speed, 1), **latest)
            report.metrics(step, speed, latest["fvu"], latest["l0"], latest["dead"])
        if step % config.eval_every == 0 and step < steps:
            _evaluate(run, step, log, report)
        if saves:
            save_checkpoint(folder, run.checkpoint(step), config.keep_checkpoints)
    return _evaluate(run, steps, log, report) or latest


def _evaluate(run: Run, step: int, log: MetricsLog, report: ProgressReport) -> dict[str, float]:
    if run.heldout is None:
        return {}
    held = evaluate(run.sae, run.heldout)
    log.write("eval", step, **held)
    dead = f"dead {held['dead']:.1%} over {held['tokens']:,} tokens"
    report.note(f"step {step}: held-out FVU {held['fvu']:.4f}  L0 {held['l0']:.1f}  {dead}")
    return held


def _refuse_breakdown(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Stop before bad weights reach a checkpoint."""
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if wrong:
        raise TubeletError(
            f"Step {step}: {' and '.join(wrong)} not finite (learning rate {run.lr:.2e})",
            "Lower optimiser.lr or raise optimiser.warmup_steps, and train into another --out",
        )
    if metrics["dead"] == 1:
        raise TubeletError(
            f"Step {step}: all {run.sae.latents} latents are dead",
            "Lower optimiser.lr, raise sae.k or sae.auxk_coef, and train into another --out",
        )


def _announce(run: Run, found: Checkpoint | None, report: ProgressReport) -> None:
    windows = run.windows
    plan = run.store.plan
    held = 0 if run.heldout is None else len(run.heldout.clips)
    failed = plan.clips - len(windows.clips) - held
    report.note(
        f"{run.hook}: {len(windows.clips)} clips to train on, {held} held out, {failed} failed; "
        f"{windows.total_tokens:,} tokens in {windows.steps} steps; "
        f"{run.sae.latents} latents for {run.sae.channels} channels"
    )
    if found is None:
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
