"""`tubelet edit`: run clips through the backbone with and without an edit, and report what changes.

run, store ─▶ SAE, its usage on the store ┐
checkpoint ─▶ backbone, readout           ┴─▶ EditEngine ─▶ Trial of each clip ─▶ EditReport
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet_lens.inputs.clip_selection import choose_clips, stratified_sample
from tubelet_lens.inputs.trained_sae import check_store, load_trained
from tubelet_lens.steering.clip_source import Clip, ClipSource
from tubelet_lens.steering.config import EditConfig
from tubelet_lens.steering.edit_controls import measure_usage
from tubelet_lens.steering.edit_engine import EditEngine, Outcome, Trial
from tubelet_lens.steering.edit_report import (
    ClassChange,
    ClipEffect,
    Compared,
    DownstreamLatents,
    EditedLatent,
    EditReport,
    HookChange,
    LatentChange,
    Spread,
)
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.readout import (
    LastTokenProbe,
    Readout,
    fit_probe,
    last_tokens,
    later_hooks,
    own_classifier,
)
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.redecode import backbone_of
from tubelet_store.reader import Store, open_store
from tubelet_trainer.config import HoldoutConfig
from tubelet_trainer.run.environment import software
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sae_files import load_record, load_sae

_DOWNSTREAM_LATENTS = 10
"""Latents reported of each downstream SAE."""


@dataclass(frozen=True, eq=False)
class DownstreamSAE:
    """An SAE at a later hook of the same backbone."""

    name: str
    hook: str
    sae: SAE


def edit(config: EditConfig) -> EditReport:
    """Make the changes of `config` on its clips.

    Raises:
        TubeletError: SAE, store and backbone do not belong together; a latent, clip or region does not exist; or a
            video cannot be read.
    """
    device = choose_device(config.device)
    trained = load_trained(config.run, str(device))
    store = open_store(config.store)
    check_store(trained, store, other_store=True)
    if store.plan.tokens is not None and store.plan.tokens.kind == "pooled":
        raise TubeletError(
            f"The SAE in {config.run} was trained on averages of tokens ({store.url} is pooled), which the backbone "
            "itself does not produce",
            "Use an SAE of single tokens",
        )
    sae = load_sae(config.run, str(device))
    # Latents are checked before anything slow.
    LatentEdits(sae, [Edit(change.latent, change.operation) for change in config.changes], torch.zeros(sae.latents))
    backbone = backbone_of(store, config.checkpoint, str(device))
    hook = backbone.resolve_hook(trained.hook)
    downstream = tuple(_downstream_sae(run, backbone, trained.hook, str(device)) for run in config.downstream)
    source = ClipSource(store, backbone, config.root, config.decode)
    sampled = choose_clips(store, "all", HoldoutConfig(), config.usage_clips)
    readout = _readout(config, store, source)
    engine = EditEngine(
        backbone=backbone,
        hook=hook,
        sae=sae,
        usage=measure_usage(store, trained.hook, sae, sampled, device),
        readout=readout,
        hooks=tuple(dict.fromkeys((hook, *later_hooks(backbone, hook), *(each.hook for each in downstream)))),
    )
    effects = []
    with Progress("editing", len(config.videos) + len(config.clips), "clips") as progress:
        for clip in chain(source.videos(config.videos), source.clips(config.clips)):
            edits = engine.edits(config.changes, clip.frame_times_s)
            trial = engine.trial(clip.pixels, edits, config.controls, config.seed)
            effects.append(_clip_effect(engine, clip, trial, downstream))
            progress.advance()
    return EditReport(
        run=config.run.name,
        hook=hook,
        backbone=backbone.checkpoint.name,
        changes=config.changes,
        readout=None if readout is None else readout.description,
        readout_accuracy=readout.accuracy if isinstance(readout, LastTokenProbe) else None,
        clips=tuple(effects),
        config=config.model_dump(mode="json"),
        software={**software(), "device": device.type},
    )


def _readout(config: EditConfig, store: Store, source: ClipSource) -> Readout | None:
    """The checkpoint's classifier, else a probe of labeled clips of other videos; None where neither can be had."""
    own = own_classifier(source.backbone)
    if own is not None or not config.probe_clips:
        return own
    table = store.clips()
    labels, videos = table["label"].to_pylist(), table["video_id"].to_pylist()
    edited = {videos[clip] for clip in config.clips if clip < len(videos)}
    fit = [
        row
        for row, (status, label, video) in enumerate(zip(table["status"].to_pylist(), labels, videos, strict=True))
        if status == "ok" and label is not None and video not in edited
    ]
    fit = [fit[place] for place in stratified_sample(np.array([labels[row] for row in fit]), config.probe_clips)]
    numbers = sorted({labels[row] for row in fit})
    if len(numbers) < 2:
        return None
    names = dict(zip(labels, table["label_name"].to_pylist(), strict=True))
    rows_ND = last_tokens(store, source, [table["clip"][row].as_py() for row in fit])
    class_N = np.searchsorted(numbers, [labels[row] for row in fit]).astype(np.int64)
    classes = [str(names[number] if names[number] is not None else number) for number in numbers]
    return fit_probe(source.backbone, rows_ND, class_N, classes, [videos[row] for row in fit], config.seed)


def _downstream_sae(run: Path, backbone: Backbone, hook: str, device: str) -> DownstreamSAE:
    record = load_record(run)
    trained_on, at = record.provenance.get("backbone"), str(record.provenance.get("hook"))
    digest = trained_on.get("weights_digest") if isinstance(trained_on, dict) else None
    if digest != backbone.weights_digest:
        raise TubeletError(
            f"The SAE in {run} was trained on another backbone", "Give SAEs of the same backbone as --downstream"
        )
    if at not in later_hooks(backbone, hook):
        raise TubeletError(
            f"The SAE in {run} was trained on '{at}', which does not come after '{hook}'",
            f"Give SAEs of {', '.join(later_hooks(backbone, hook)) or 'a later hook, and edit at an earlier one'}",
        )
    return DownstreamSAE(run.name, at, load_sae(run, device))


def _clip_effect(engine: EditEngine, clip: Clip, trial: Trial, downstream: Sequence[DownstreamSAE]) -> ClipEffect:
    before, after = trial.before, trial.after

    def compared(figure: Callable[[Outcome], float]) -> Compared:
        return Compared(
            edit=figure(after),
            matched=_spread([figure(outcome) for outcome in trial.matched]),
            random=_spread([figure(outcome) for outcome in trial.random]),
        )

    def change_at(hook: str) -> Callable[[Outcome], float]:
        return lambda outcome: _relative_change(before.tokens[hook], outcome.tokens[hook])

    tokens_TSD = before.tokens[engine.hook]
    step_TS = (after.tokens[engine.hook] - tokens_TSD).norm(dim=-1)
    changed_TS = step_TS > 0
    share_N = (step_TS / tokens_TSD.norm(dim=-1).clamp_min(1e-30))[changed_TS]
    readout, times = engine.readout, clip.frame_times_s
    return ClipEffect(
        name=clip.name,
        clip=clip.clip,
        seconds=None if np.isnan(times).any() else (float(times[0]), float(times[-1])),
        tokens=changed_TS.numel(),
        changed_tokens=int(changed_TS.sum()),
        step=float(share_N.mean()) if len(share_N) else 0.0,
        latents=_edited_latents(engine, trial.edits, tokens_TSD),
        top_before=None if readout is None else readout.classes[int(before.logits_C.argmax())],
        top_after=None if readout is None else readout.classes[int(after.logits_C.argmax())],
        kl=None if readout is None else compared(lambda outcome: _kl(before.logits_C, outcome.logits_C)),
        classes=() if readout is None else _class_changes(readout, before.logits_C, after.logits_C, compared),
        hooks=tuple(HookChange(hook=hook, change=compared(change_at(hook))) for hook in engine.hooks),
        downstream=tuple(_downstream_latents(each, trial) for each in downstream),
    )


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean=float(np.mean(values)), low=min(values), high=max(values), draws=len(values))


def _relative_change(before: Tensor, after: Tensor) -> float:
    """||x' - x|| / ||x|| over all tokens of a clip, [T', S, D] each."""
    return float((after - before).double().norm() / before.double().norm())


def _kl(old_C: Tensor, new_C: Tensor) -> float:
    old, new = old_C.double().log_softmax(0), new_C.double().log_softmax(0)
    return max(0.0, float(nnf.kl_div(new, old, log_target=True, reduction="sum")))


def _edited_latents(engine: EditEngine, edits: LatentEdits, tokens_TSD: Tensor) -> tuple[EditedLatent, ...]:
    with torch.no_grad():
        codes_TSF = engine.sae.encode(tokens_TSD.flatten(0, 1)).unflatten(0, tokens_TSD.shape[:2])
    change_TSE = edits.step(tokens_TSD[None]).code_change[0]
    edited = []
    for column, latent in enumerate(edits.latents):
        inside_TS = torch.zeros(tokens_TSD.shape[:2], dtype=torch.bool, device=tokens_TSD.device)
        for each in edits.edits:
            if each.latent == latent:
                inside_TS |= True if each.mask_TS is None else each.mask_TS.to(inside_TS.device)
        f_TS = codes_TSF[..., latent]
        edited.append(
            EditedLatent(
                latent=latent,
                active_tokens=int((f_TS != 0).sum()),
                mean_before=float(f_TS[inside_TS].mean()),
                mean_after=float((f_TS + change_TSE[..., column])[inside_TS].mean()),
                largest_observed=float(engine.usage.largest_F[latent]),
            )
        )
    return tuple(edited)


def _class_changes(
    readout: Readout, old_C: Tensor, new_C: Tensor, compared: Callable[[Callable[[Outcome], float]], Compared]
) -> tuple[ClassChange, ...]:
    def change_of(number: int) -> Callable[[Outcome], float]:
        return lambda outcome: float(outcome.logits_C[number] - old_C[number])

    return tuple(
        ClassChange(
            name=readout.classes[number],
            probability_before=float(old_C.softmax(0)[number]),
            probability_after=float(new_C.softmax(0)[number]),
            logit_before=float(old_C[number]),
            logit_change=compared(change_of(number)),
        )
        for number in (new_C - old_C).abs().argsort(descending=True).tolist()
    )


def _downstream_latents(downstream: DownstreamSAE, trial: Trial) -> DownstreamLatents:
    def mean_code(outcome: Outcome) -> Tensor:
        with torch.no_grad():
            codes_NF = downstream.sae.encode(outcome.tokens[downstream.hook].flatten(0, 1))
        return codes_NF.mean(0, dtype=torch.float64).cpu()

    old_F, new_F = mean_code(trial.before), mean_code(trial.after)
    matched = [mean_code(outcome) - old_F for outcome in trial.matched]
    random = [mean_code(outcome) - old_F for outcome in trial.random]
    most = (new_F - old_F).abs().argsort(descending=True)[:_DOWNSTREAM_LATENTS].tolist()
    return DownstreamLatents(
        run=downstream.name,
        hook=downstream.hook,
        latents=tuple(
            LatentChange(
                latent=latent,
                before=float(old_F[latent]),
                after=float(new_F[latent]),
                change=Compared(
                    edit=float(new_F[latent] - old_F[latent]),
                    matched=_spread([float(change_F[latent]) for change_F in matched]),
                    random=_spread([float(change_F[latent]) for change_F in random]),
                ),
            )
            for latent in most
        ),
    )
