"""A run in training: its data, its SAEs, its position, and the checkpoint of all that.

All SAEs of a run see the same batches and train independently: training several together gives the weights that each
would have alone.
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
from tubelet_trainer.data.clip_mixing import Mixing, measure_mixing
from tubelet_trainer.data.source import choose_hook
from tubelet_trainer.data.streams import Stream, Streams
from tubelet_trainer.losses.coherence import coherence_terms
from tubelet_trainer.losses.objective import Objective, sharded_terms
from tubelet_trainer.losses.sparsity import sae_terms
from tubelet_trainer.optim.sae_group import SAEGroup
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.process_group import ALONE, ProcessGroup
from tubelet_trainer.run.checkpoint import Checkpoint
from tubelet_trainer.run.environment import software
from tubelet_trainer.run.heldout import evaluate, temporal_coherence
from tubelet_trainer.run.trackers import defined
from tubelet_trainer.sae.init import initialize, needs_tokens
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sharded import ShardedSAE, gather_state, own_state, split_batch
from tubelet_trainer.specs import Spec, flat, refuse_conflicts, specs

# A latent is dead after 10 million tokens without firing (Gao et al. 2024, appendix A.2). [RECON] At most after a tenth
# of the run's tokens: in a short run no latent would ever count as dead.
_DEAD_AFTER_TOKENS = 10_000_000
_DEAD_AFTER_SHARE = 10

# Fields that may differ when a run is resumed: they do not change what is learned. Stores are compared by identity.
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
    """SAEs in training: their data, weights, optimizers and position. `sae_group.learn` advances them by one batch.

    Args:
        config: The configuration.
        stores: The open stores: the run's own, and those mixed with it.
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
        refuse_conflicts(config, device, ranks)
        saes = specs(config)
        self.streams = Streams(config, saes, stores, device, ALONE if self.sharded else ranks)
        self.loader = self.streams.training
        self.heldout = self.streams.heldout
        self.sae_runs = [self._begin(spec) for spec in saes]
        hooks = [sae_run.hook for sae_run in self.sae_runs]
        self.diverged: dict[str, TubeletError] = {}
        """Why SAEs that have diverged cannot recover, by name. They are excluded: not logged, not exported."""
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
        return measure_mixing(self.loader)

    @property
    def sae_run(self) -> SAERun:
        """The first (or only) SAE."""
        return self.sae_runs[0]

    @property
    def sae(self) -> SAE:
        """The first (or only) SAE's weights."""
        return self.sae_run.sae_trainer.sae

    def _begin(self, spec: Spec) -> SAERun:
        """An SAE before its first step."""
        config, total = spec.config, self.streams.total_tokens
        hook = choose_hook(self.store, config.hook)
        moments = self.streams.moments(hook)
        normalization = Normalization.from_moments(moments, config.sae.normalization)
        # A split dictionary may be too large for one device.
        home = torch.device("cpu") if self.sharded else self.device
        sae = SAE(config.sae, normalization).to(home)
        init = config.sae.init
        tokens = self.streams.first_tokens(hook, init.tokens).to(home) if needs_tokens(init) else None
        initialize(sae, moments, tokens)
        variance = normalization.variance(moments)
        terms = sae_terms(config.sae, sae.channels, variance, self.loader.steps, self.device)
        terms += coherence_terms(config.objective, config.sae, sae.latents, variance)
        if self.sharded:
            sae, terms = ShardedSAE(sae, self.ranks).to(self.device), sharded_terms(terms, self.ranks)
        else:
            split_batch(sae, self.ranks)
        sae_trainer = SAETrainer(
            sae,
            Objective(terms),
            config.optimizer,
            self.loader.steps,
            _dead_after(config, total),
            torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32,
            ALONE if self.sharded else self.ranks,
            self.config.batch_tokens,
        )
        return SAERun(spec, hook, sae_trainer, moments)

    @property
    def sound(self) -> list[SAERun]:
        """The SAEs that have not diverged."""
        return [sae_run for sae_run in self.sae_runs if sae_run.name not in self.diverged]

    def result(self, sae_run: SAERun) -> SAE | None:
        """The whole SAE to export; a split one on the first rank only, None on the others. A collective call."""
        sae = sae_run.sae_trainer.result()
        return sae.gathered() if isinstance(sae, ShardedSAE) else sae

    def evaluate(self, sae_run: SAERun, heldout: Stream) -> dict[str, float]:
        """Figures of the SAE on held-out tokens (see `tubelet_trainer.run.heldout`); a collective call."""
        figures = evaluate(sae_run.sae_trainer.result(), heldout, sae_run.hook)
        if self.sharded:
            # Each rank saw all tokens through its own latents.
            own = torch.tensor([figures["l0"], figures["dead"]], dtype=torch.float64, device=self.device)
            l0, dead = self.ranks.sum(own).tolist()
            figures |= {"l0": l0, "dead": dead / self.ranks.size}
        return figures

    def coherence(self, sae_run: SAERun, heldout_pairs: Stream) -> dict[str, float]:
        """Temporal coherence of the SAE's codes on held-out tokens; a collective call."""
        return temporal_coherence(sae_run.sae_trainer.result(), heldout_pairs, sae_run.hook)

    def checkpoint(self, step: int) -> Checkpoint:
        """The state after `step` steps, complete on the first rank. A collective call."""
        record = {
            "config": self._tree,
            "store_identities": self.streams.identities,
            "hook": self.sae_run.hook,
            "loader": {**self.loader.state_dict(), "step": step},
            "software": software(),
            "diverged": {name: [fault.problem, fault.remedy] for name, fault in self.diverged.items()},
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
            TubeletError: it was written with another configuration or store.
        """
        self._refuse_other_run(checkpoint.record)
        for sae_run in self.sae_runs:
            prefix = _inside(sae_run, "")
            if not any(name.startswith(prefix) for name in checkpoint.tensors):
                raise TubeletError(
                    f"The checkpoint in {self.config.out} has no SAE '{sae_run.name}'", "Train into another --out"
                )
            state = {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items() if name.startswith(prefix)}
            sae_run.sae_trainer.load_state(own_state(state, self.ranks) if self.sharded else state)
        self.loader.load_state_dict(checkpoint.record["loader"])
        diverged = checkpoint.record.get("diverged", {})
        self.diverged = {name: TubeletError(problem, remedy) for name, (problem, remedy) in diverged.items()}

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
        # By identity: a store may have moved.
        if (before := record.get("store_identities")) != self.streams.identities:
            known = ", ".join(before) if before else "not recorded (an older version)"
            differ.append(f"store identities: {known} -> {', '.join(self.streams.identities)}")
        if differ:
            raise TubeletError(
                f"{self.config.out} holds a run with another configuration: {'; '.join(differ)}",
                "Use the run's own configuration to continue it, or another --out",
            )

    def provenance(self, sae_run: SAERun, metrics: Mapping[str, float]) -> dict[str, JsonValue]:
        """What an SAE was trained on, for `sae.json`."""
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
            "loader": self.loader.state_dict(),
            "tokens": self.loader.total_tokens,
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
