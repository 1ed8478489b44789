"""The SAEs of a run: `saes` (a list) times `sweep` (a grid), each with its own configuration.

    base ──▶ x saes[i] ──▶ x one value of each swept field ──▶ name, TrainConfig

An SAE's configuration does not depend on the others: trained alone it gives the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tubelet.config import set_dotted, validate
from tubelet.errors import TubeletError, nearest
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.process_group import ProcessGroup
from tubelet_trainer.sae.config import AbsTopKConfig, BatchTopKConfig, RandomPrefixes, SAEConfig, TopKConfig

# What may differ between SAEs that see the same tokens in the same order.
OWN_FIELDS = ("sae", "objective", "optimizer", "hook")


@dataclass(frozen=True)
class Spec:
    """One SAE of a run."""

    name: str
    """Its folder below the run's; empty where it is the only one."""
    config: TrainConfig


def specs(config: TrainConfig) -> list[Spec]:
    """The SAEs that `config` describes, in the order of the list and the grid.

    Raises:
        TubeletError: a field belongs to the stream, is unknown or invalid, or two SAEs have one name.
    """
    if not config.saes and not config.sweep:
        return [Spec("", config)]
    base = config.model_dump(mode="json", exclude_unset=True, exclude={"saes", "sweep"})
    grid = _grid(config.sweep)
    saes: list[Spec] = []
    for number, entry in enumerate(config.saes or ({},)):
        own = dict(entry)
        name = str(own.pop("name", f"sae-{number}" if config.saes else ""))
        for values in itertools.product(*grid.values()):
            swept = dict(zip(grid, values, strict=True))
            tree = deepcopy(base)
            for dotted, value in {**flat(own), **swept}.items():
                _refuse_shared(dotted)
                set_dotted(tree, dotted, value)
            words = [name, *(f"{_short(dotted, grid)}={_word(value)}" for dotted, value in swept.items())]
            full = ",".join(word for word in words if word)
            tree["out"] = str(config.out / full)
            saes.append(Spec(full, validate(TrainConfig, tree, f"SAE '{full}'")))
    _refuse_names(saes)
    return saes


def _grid(sweep: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid = flat(sweep)
    for dotted, values in grid.items():
        if not isinstance(values, list) or not values:
            raise TubeletError(
                f"sweep.{dotted} is {values!r}, not a list of values", f"Write sweep: {{{dotted}: [a, b]}}"
            )
    return grid


def _refuse_shared(dotted: str) -> None:
    top = dotted.partition(".")[0]
    if top in OWN_FIELDS:
        return
    if top in TrainConfig.model_fields:
        raise TubeletError(
            f"'{dotted}' is the same for all SAEs of a run: they share one stream of tokens",
            f"What may differ: {', '.join(OWN_FIELDS)}. Train runs that differ in {top} one after another",
        )
    raise TubeletError(f"Unknown field '{dotted}' in saes or sweep", nearest(top, OWN_FIELDS))


def _refuse_names(saes: list[Spec]) -> None:
    names = [spec.name for spec in saes]
    for name in names:
        if name.startswith(".") or Path(name).name != name or name == "checkpoints":
            raise TubeletError(f"'{name}' cannot name an SAE's folder", "Give it another `name` in saes")
        if names.count(name) > 1:
            raise TubeletError(f"Two SAEs of the run are called '{name}'", "Give each a different `name` in saes")


def _short(dotted: str, grid: Mapping[str, Any]) -> str:
    """The last part of a field's name where no other swept field ends the same."""
    leaf = dotted.rpartition(".")[2]
    return leaf if sum(other.rpartition(".")[2] == leaf for other in grid) == 1 else dotted


def _word(value: Any) -> str:
    """A swept value as part of a folder's name."""
    if isinstance(value, Mapping):
        # Of a section its kind says most: {kind: random, prefixes: 4} is random-prefixes-4.
        parts = [str(value["kind"])] if "kind" in value else []
        return "-".join([*parts, *(f"{name}-{_word(part)}" for name, part in value.items() if name != "kind")])
    return "+".join(_word(part) for part in value) if isinstance(value, list | tuple) else str(value)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`tree` with dotted names in place of levels."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def refuse_conflicts(config: TrainConfig, device: torch.device, ranks: ProcessGroup) -> None:
    """Refuse options that do not go together.

    Raises:
        TubeletError: cuda_graphs or compile for steps that differ from one to the next; a split dictionary with an
            objective or an optimizer that needs whole codes.
    """
    if config.cuda_graphs and device.type != "cuda":
        raise TubeletError(f"cuda_graphs needs a GPU, and device is {device.type}", "Set cuda_graphs false")
    if config.cuda_graphs and ranks.size > 1:
        raise TubeletError("cuda_graphs does not go with several processes", "Set cuda_graphs false")
    for spec in specs(config):
        if config.cuda_graphs or config.compile:
            _refuse_changing_shapes(spec.config.sae)
        if config.parallel == "dictionary" and ranks.size > 1:
            _refuse_unsplittable(spec.config)


def _refuse_changing_shapes(sae: SAEConfig) -> None:
    if isinstance(sae.nesting, RandomPrefixes) and not isinstance(sae, TopKConfig | BatchTopKConfig | AbsTopKConfig):
        raise TubeletError(
            "Random prefixes of a kind without k are products of another shape in every step",
            "Set compile and cuda_graphs false, or choose sae.kind topk, batchtopk or abstopk",
        )


def _refuse_unsplittable(config: TrainConfig) -> None:
    weights = ("lambda_t", "lambda_s", "lambda_smooth", "lambda_slow")
    conflicting = [f"objective.{name}" for name in weights if getattr(config.objective, name)]
    if config.optimizer.resample_every is not None:
        conflicting.append("optimizer.resample_every")
    if conflicting:
        raise TubeletError(
            f"--parallel dictionary does not go with {', '.join(conflicting)}", "Use --parallel data, or set them off"
        )
