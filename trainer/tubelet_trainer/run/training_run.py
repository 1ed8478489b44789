"""A run in training: its data, its SAEs, its position; everything that a checkpoint holds.

All SAEs of a run see the same batches; each learns as if it were alone, so that training several together gives the
weights that each would have alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import JsonValue
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_store.reader import Store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.batch import Batch
from tubelet_trainer.data.mixing import Mixing, measure_mixing
from tubelet_trainer.data.source import choose_hook
from tubelet_trainer.data.streams import Stream, Streams
from tubelet_trainer.losses.coherence import coherence_terms
from tubelet_trainer.losses.objective import Objective
from tubelet_trainer.losses.sparsity import sae_terms
from tubelet_trainer.optim.cuda_graph import refuse_unrepeatable
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.optim.sharded_sae import (
    ShardedSAE,
    gather_state,
    own_state,
    refuse_unsplittable,
    sharded_terms,
    split_batch,
)
from tubelet_trainer.run.checkpoint import Checkpoint
from tubelet_trainer.run.environment import software
from tubelet_trainer.run.heldout import evaluate
from tubelet_trainer.run.metrics_log import defined
from tubelet_trainer.run.process_group import ALONE, ProcessGroup
from tubelet_trainer.run.specs import Spec, flat, specs
from tubelet_trainer.sae.init import initialize, needs_tokens
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

# Latents silent for 10 million tokens are dead (Gao et al. 2024, appendix A.2). A short run would never get there:
# a tenth of its tokens, if that is less. [RECON]
_DEAD_AFTER_TOKENS = 10_000_000
_DEAD_AFTER_SHARE = 10

# Fields that change what is shown or kept, or where it lies, not what is learned. The store is compared by identity.
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
    "cache",
    # What checkpoints written before called it.
    "mirror",
    "tracker",
    "parallel",
    "compile",
    "cuda_graphs",
)


@dataclass(frozen=True)
class SAERun:
    """One SAE of a run."""

    spec: Spec
    hook: str
    sae_trainer: SAETrainer
    moments: Moments
    """Of all tokens of the store at its hook, held-out videos included; of a mix, by its shares."""

    @property
    def name(self) -> str:
        """Its folder below the run's; empty where it is the only one."""
        return self.spec.name

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.spec.config.out


class Run:
    """SAEs in training: their data, weights, optimizers and position. `learn` advances them by one batch.

    Args:
        config: The configuration.
        stores: The open stores: its own, and those that are mixed with it.
        device: Where to train.
        ranks: The processes of the run.

    Raises:
        TubeletError: the configuration does not fit the store.
    """

    def __init__(
        self, config: TrainConfig, stores: Sequence[Store], device: torch.device, ranks: ProcessGroup = ALONE
    ) -> None:
        self.config, self.store, self.device, self.ranks = config, stores[0], device, ranks
        self.sharded = ranks.size > 1 and config.parallel == "dictionary"
        found = specs(config)
        self.streams = Streams(config, found, stores, device, ALONE if self.sharded else ranks)
        self.windows = self.streams.training
        self.heldout = self.streams.heldout
        self.sae_runs = [self._begin(spec) for spec in found]
        hooks = [sae_run.hook for sae_run in self.sae_runs]
        self.broken: dict[str, TubeletError] = {}
        """What is wrong with SAEs that have broken down, by name. They are not looked at any more."""
        refuse_unrepeatable(config, device, ranks)
        self.sae_group = SAEGroup(
            [sae_run.sae_trainer for sae_run in self.sae_runs],
            hooks,
            config.batch_tokens,
            compiled=config.compile,
            captured=config.cuda_graphs,
        )

    @cached_property
    def mixing(self) -> Mixing:
        """How well batches mix clips."""
        return measure_mixing(self.windows)

    @property
    def sae_run(self) -> SAERun:
        """The first (or only) SAE."""
        return self.sae_runs[0]

    @property
    def sae(self) -> SAE:
        """The SAE in training, where there is one."""
        return self.sae_run.sae_trainer.sae

    def _begin(self, spec: Spec) -> SAERun:
        """An SAE before its first step."""
        config, total = spec.config, self.streams.total_tokens
        hook = choose_hook(self.store, config.hook)
        moments = self.streams.moments(hook)
        normalization = Normalization.from_moments(moments, config.sae.normalization)
        # A dictionary that is split because it is too large for a device is begun elsewhere.
        home = torch.device("cpu") if self.sharded else self.device
        sae = SAE(config.sae, normalization).to(home)
        wanted = needs_tokens(config.sae.init)
        initialize(sae, moments, self.streams.first_tokens(hook, config.sae.init.tokens).to(home) if wanted else None)
        variance = normalization.variance(moments)
        terms = sae_terms(config.sae, sae.channels, variance, self.windows.steps, self.device)
        terms += coherence_terms(config.objective, config.sae, sae.latents, variance)
        if self.sharded:
            refuse_unsplittable(config)
            sae, terms = ShardedSAE(sae, self.ranks).to(self.device), sharded_terms(terms, self.ranks)
        else:
            split_batch(sae, self.ranks)
        sae_trainer = SAETrainer(
            sae,
            Objective(terms),
            config.optimizer,
            self.windows.steps,
            _dead_after(config, total),
            torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32,
            ALONE if self.sharded else self.ranks,
            self.config.batch_tokens,
        )
        return SAERun(spec, hook, sae_trainer, moments)

    @property
    def sound(self) -> list[SAERun]:
        """The SAEs that have not broken down."""
        return [sae_run for sae_run in self.sae_runs if sae_run.name not in self.broken]

    def learn(self, batch: Batch, step: int) -> list[Mapping[str, Tensor]]:
        """Step number `step` (from 0): learn from `batch`; metrics of each SAE, on the device, with `grad_norm`."""
        return self.sae_group.learn(batch, step)

    def result(self, sae_run: SAERun) -> SAE | None:
        """The SAE to export, whole; a split one on the first rank alone, None on the others. A collective call."""
        sae = sae_run.sae_trainer.result()
        return sae.gathered() if isinstance(sae, ShardedSAE) else sae

    def evaluate(self, sae_run: SAERun, heldout: Stream) -> dict[str, float]:
        """Figures of the SAE on held-out tokens (see `evaluation`); a collective call."""
        found = evaluate(sae_run.sae_trainer.result(), heldout, sae_run.hook)
        if self.sharded:
            # Every rank saw all tokens through its own latents.
            own = torch.tensor([found["l0"], found["dead"]], dtype=torch.float64, device=self.device)
            l0, dead = self.ranks.sum(own).tolist()
            found |= {"l0": l0, "dead": dead / self.ranks.size}
        return found

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything that decides the rest of the run, after `step` steps: complete on the first rank. A collective
        call.
        """
        record = {
            "config": self._tree,
            "store_identities": self.streams.identities,
            "hook": self.sae_run.hook,
            "loader": {**self.windows.state_dict(), "step": step},
            "software": software(),
            "broken": {name: [fault.problem, fault.remedy] for name, fault in self.broken.items()},
        }
        tensors: dict[str, Tensor] = {}
        for sae_run in self.sae_runs:
            state = sae_run.sae_trainer.state()
            state = gather_state(state, self.ranks) if self.sharded else state
            tensors |= {_inside(sae_run, name): tensor for name, tensor in state.items()}
        return Checkpoint(step, tensors, record)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`, with any number of ranks.

        Raises:
            TubeletError: it was made with another configuration or store.
        """
        self._refuse_other_run(checkpoint.record)
        for sae_run in self.sae_runs:
            prefix = _inside(sae_run, "")
            if not any(name.startswith(prefix) for name in checkpoint.tensors):
                raise TubeletError(
                    f"The checkpoint in {self.config.out} has no SAE '{sae_run.name}'", "Train into another --out"
                )
            found = {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
            sae_run.sae_trainer.load_state(own_state(found, self.ranks) if self.sharded else found)
        self.windows.load_state_dict(checkpoint.record["loader"])
        broken = checkpoint.record.get("broken", {})
        self.broken = {name: TubeletError(problem, remedy) for name, (problem, remedy) in broken.items()}

    @property
    def _tree(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json")

    def _refuse_other_run(self, record: Mapping[str, Any]) -> None:
        then, now = (
            flat({**tree, "mix": list(tree.get("mix", {}).values())}) for tree in (record["config"], self._tree)
        )
        differ = [
            f"{name}: {then.get(name)} -> {now.get(name)}"
            for name in sorted(then.keys() | now.keys())
            if name.partition(".")[0] not in _FREE_FIELDS and then.get(name) != now.get(name)
        ]
        # Stores may have moved: what counts is what they hold.
        if (before := record.get("store_identities")) != self.streams.identities:
            known = ", ".join(before) if before else "not recorded (an older version)"
            differ.append(f"store identities: {known} -> {', '.join(self.streams.identities)}")
        if differ:
            raise TubeletError(
                f"{self.config.out} holds a run with another configuration: {'; '.join(differ)}",
                "Use the run's own configuration to continue it, or another --out",
            )

    def provenance(self, sae_run: SAERun, metrics: Mapping[str, float]) -> dict[str, JsonValue]:
        """Where an SAE comes from, for `sae.json`."""
        plan, config = self.store.plan, sae_run.spec.config
        described = {
            "store": Path(self.store.url).name,
            "store_identity": self.store.identity,
            "plan_digest": plan.digest,
            "hook": sae_run.hook,
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
            "mixing": asdict(self.mixing),
            "metrics": defined(metrics),
            "software": software(),
        }
        return cast("dict[str, JsonValue]", described)


def _dead_after(config: TrainConfig, total_tokens: int) -> int:
    chosen = config.sae.dead_after_tokens
    return chosen if chosen is not None else max(1, min(_DEAD_AFTER_TOKENS, total_tokens // _DEAD_AFTER_SHARE))


def _inside(sae_run: SAERun, name: str) -> str:
    """Key of a tensor in a checkpoint."""
    return f"{sae_run.name}/{name}" if sae_run.name else name
