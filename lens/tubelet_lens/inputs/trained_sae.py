"""The SAE under evaluation, and whether a store suits it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.errors import TubeletError
from tubelet_lens.codes.sparse_codes import SparseCoder
from tubelet_store.plan import differences
from tubelet_store.reader import Store
from tubelet_trainer.config import HoldoutConfig
from tubelet_trainer.sae.sae_files import load_record, load_sae


@dataclass(frozen=True, eq=False)
class TrainedSae:
    """An SAE with the provenance in its run folder."""

    folder: Path
    coder: SparseCoder
    channels: int
    recipe: dict[str, Any]
    """Its configuration."""
    provenance: dict[str, Any]
    """What it was trained on."""
    hook: str
    holdout: HoldoutConfig


def load_trained(folder: Path, device: str) -> TrainedSae:
    """The SAE in the run folder `folder`, on `device`.

    Raises:
        TubeletError: there is none, it is damaged, or it does not say what it was trained on.
    """
    record = load_record(folder)
    if "hook" not in record.provenance:
        raise TubeletError(
            f"The SAE in {folder} does not record its hook",
            "Import it again with --hook, as the store names it",
        )
    return TrainedSae(
        folder=folder,
        coder=load_sae(folder, device),
        channels=record.channels,
        recipe=record.config.model_dump(mode="json"),
        provenance=record.provenance,
        hook=str(record.provenance["hook"]),
        holdout=HoldoutConfig.model_validate(record.provenance.get("holdout", {"fraction": 0})),
    )


def check_store(sae: TrainedSae, store: Store, other_store: bool) -> None:
    """Refuse a store whose activations are not what `sae` was trained on.

    Raises:
        TubeletError: the store lacks the SAE's hook, its width or backbone differ, or its plan differs and
            `other_store` is false.
    """
    hooks = {hook.name: hook.channels for hook in store.plan.hooks}
    if sae.hook not in hooks:
        raise TubeletError(
            f"The SAE in {sae.folder} was trained on hook '{sae.hook}', which {store.url} does not hold "
            f"(it holds {', '.join(hooks)})",
            "Give the store it was trained on",
        )
    if hooks[sae.hook] != sae.channels:
        raise TubeletError(
            f"The SAE in {sae.folder} takes {sae.channels} channels; {store.url} has {hooks[sae.hook]} at '{sae.hook}'",
            "Give the store it was trained on",
        )
    if sae.provenance.get("plan_digest") == store.plan.digest:
        return
    if "backbone" not in sae.provenance:
        if not other_store:
            raise TubeletError(
                f"The SAE in {sae.folder} does not record its backbone: it was not written by `tubelet train`",
                f"If {store.url} holds the same backbone's activations, give --other_store true and --split all",
            )
        return
    differ = differences(
        {name: sae.provenance.get(name) for name in ("backbone", "dataset")},
        {"backbone": store.plan.backbone, "dataset": store.plan.dataset},
    )
    if sae.provenance["backbone"] != store.plan.backbone:
        differing = [line for line in differ if line.startswith(("backbone.family:", "backbone.id:"))] or differ
        raise TubeletError(
            f"The SAE in {sae.folder} was trained on another backbone than {store.url} holds: {'; '.join(differing)}",
            "Give a store of the same backbone",
        )
    if not other_store:
        detail = f": {'; '.join(differ)}" if differ else " (sampling, preprocessing, grid, clips or dtype differ)"
        raise TubeletError(
            f"{store.url} has another plan than the store the SAE in {sae.folder} was trained on{detail}",
            "Give that store, or accept this one with --other_store true",
        )
