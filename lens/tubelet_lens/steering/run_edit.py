"""`tubelet edit`: load what belongs together, run every clip with and without the edit, say what changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from rich.progress import track
from torch import Tensor

from tubelet.device import choose_device
from tubelet.errors import TubeletError
from tubelet_lens.inputs.clip_selection import choose_clips, stratified_sample
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.inputs.trained_sae import check_store, load_trained
from tubelet_lens.steering.clip_source import Clip, ClipSource
from tubelet_lens.steering.config import ChangeConfig, EditConfig
from tubelet_lens.steering.edit_report import (
    ClassChange,
    ClipEffect,
    Compared,
    EditedLatent,
    EditReport,
    HookChange,
    LatentChange,
    LaterSae,
    Spread,
)
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.latent_usage import Usage, usage
from tubelet_lens.steering.readout import (
    LastTokenProbe,
    Readout,
    final_hook,
    fit_probe,
    later_hooks,
    own_classifier,
    pooled_tokens,
)
from tubelet_lens.steering.region import region_mask
from tubelet_lens.steering.trial import Outcome, matched_edits, outcome, random_directions, relative_change
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.backbones.rewrite import Rewrite
from tubelet_pipeline.redecode import backbone_of
from tubelet_store.reader import Store, open_store
from tubelet_trainer.data.split import HoldoutConfig
from tubelet_trainer.run.environment import software
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.sae_files import load_record, load_sae

_LATER_LATENTS = 10
"""Latents shown of each later SAE."""


@dataclass(frozen=True, eq=False)
class DownstreamSAE:
    """An SAE of a later hook."""

    name: str
    hook: str
    sae: SAE


@dataclass(frozen=True, eq=False)
class EditContext:
    """Everything that the clips share."""

    backbone: Backbone
    hook: str
    sae: SAE
    usage: Usage
    readout: Readout | None
    later: tuple[DownstreamSAE, ...]
    config: EditConfig


def edit(config: EditConfig) -> EditReport:
    """Make the changes of `config` on its clips.

    Raises:
        TubeletError: SAE, store and backbone do not belong together; no such latent or clip; a region without a token;
            a video that cannot be read.
    """
    device = choose_device(config.device)
    trained = load_trained(config.run, str(device))
    store = open_store(config.store)
    check_store(trained, store, other_store=True)
    if store.plan.tokens is not None and store.plan.tokens.kind == "pooled":
        raise TubeletError(
            f"The SAE in {config.run} was trained on averages of tokens ({store.url} is pooled), which the backbone "
            "itself does not have",
            "Edit with an SAE of single tokens",
        )
    sae = load_sae(config.run, str(device))
    # Latents are checked before anything slow.
    LatentEdits(sae, [Edit(change.latent, change.operation) for change in config.changes], torch.zeros(sae.latents))
    backbone = backbone_of(store.plan, config.checkpoint, str(device))
    clip_source = ClipSource(store, backbone, config.root, config.decode)
    seen = choose_clips(store, "all", HoldoutConfig(), config.usage_clips)
    bench = EditContext(
        backbone=backbone,
        hook=backbone.resolve_hook(trained.hook),
        sae=sae,
        usage=usage(store, trained.hook, sae, seen, device),
        readout=_readout(config, store, clip_source),
        later=tuple(_later(run, backbone, trained.hook, str(device)) for run in config.later),
        config=config,
    )
    effects = []
    for shots in (clip_source.videos(config.videos), clip_source.clips(config.clips)):
        effects += [_effect(bench, shot) for shot in shots]
    readout = bench.readout
    return EditReport(
        run=config.run.name,
        hook=bench.hook,
        backbone=backbone.checkpoint.name,
        changes=config.changes,
        readout=None if readout is None else readout.what,
        readout_accuracy=readout.accuracy if isinstance(readout, LastTokenProbe) else None,
        clips=tuple(effects),
        config=config.model_dump(mode="json"),
        software={**software(), "device": device.type},
    )


def _readout(config: EditConfig, store: Store, clip_source: ClipSource) -> Readout | None:
    own = own_classifier(clip_source.backbone)
    if own is not None or not config.probe_clips:
        return own
    table = store.clips()
    labels, videos = table["label"].to_pylist(), table["video_id"].to_pylist()
    edited = {videos[clip] for clip in config.clips if clip < len(videos)}
    fit = [
        row
        for row, (ok, label, video) in enumerate(
            zip(table["status"].to_pylist(), labels, videos, strict=True),
        )
        if ok == "ok" and label is not None and video not in edited
    ]
    fit = [fit[place] for place in stratified_sample(np.array([labels[row] for row in fit]), config.probe_clips)]
    numbers = sorted({labels[row] for row in fit})
    if len(numbers) < 2:
        return None
    names = dict(zip(labels, table["label_name"].to_pylist(), strict=True))
    rows_ND = last_tokens(store, clip_source, [table["clip"][row].as_py() for row in fit])
    class_N = np.searchsorted(numbers, [labels[row] for row in fit]).astype(np.int64)
    classes = [str(names[number] if names[number] is not None else number) for number in numbers]
    return fit_probe(clip_source.backbone, rows_ND, class_N, classes, [videos[row] for row in fit], config.seed)


def last_tokens(store: Store, clip_source: ClipSource, clips: Sequence[int]) -> Tensor:
    """float32 [N, D] Mean last token of each clip: from the store where it holds them, else from the videos."""
    backbone, hook = clip_source.backbone, final_hook(clip_source.backbone)
    if store.plan.tokens is None and any(stored.name == hook for stored in store.plan.hooks):
        return torch.stack([read_clip(store, hook, clip).flatten(0, 1).mean(0) for clip in clips])
    shots = track(clip_source.clips(clips), "Reading clips for the probe", total=len(clips), transient=True)
    return pooled_tokens(backbone, hook, (shot.pixels for shot in shots))


def _later(run: Path, backbone: Backbone, hook: str, device: str) -> DownstreamSAE:
    record = load_record(run)
    trained_on, at = record.provenance.get("backbone"), str(record.provenance.get("hook"))
    digest = trained_on.get("weights_digest") if isinstance(trained_on, dict) else None
    if digest != backbone.weights_digest:
        raise TubeletError(f"The SAE in {run} is of another backbone", "Give SAEs of the same backbone as --later")
    if at not in later_hooks(backbone, hook):
        raise TubeletError(
            f"The SAE in {run} reads '{at}', which does not come after '{hook}'",
            f"Give SAEs of {', '.join(later_hooks(backbone, hook)) or 'an earlier edit'}",
        )
    return DownstreamSAE(run.name, at, load_sae(run, device))


def _effect(bench: EditContext, shot: Clip) -> ClipEffect:
    backbone, hook, config = bench.backbone, bench.hook, bench.config
    edits = _edits(bench, config.changes, shot)
    hooks = tuple(dict.fromkeys((hook, *later_hooks(backbone, hook), *(later.hook for later in bench.later))))

    def run(rewrite: Rewrite | None) -> Outcome:
        return outcome(backbone, hook, rewrite, shot.pixels, hooks, bench.readout)

    before = run(None)
    tokens_TSD = before.tokens[hook]
    rewrite = LatentEdits(bench.sae, edits, torch.from_numpy(bench.usage.largest_F))
    after = run(rewrite)
    matched = [
        run(control)
        for control in matched_edits(bench.sae, edits, tokens_TSD, bench.usage, config.controls, config.seed)
    ]
    random = [run(control) for control in random_directions(rewrite, config.controls, config.seed)]

    def compared(figure: Callable[[Outcome], float]) -> Compared:
        return Compared(edit=figure(after), matched=_spread(matched, figure), random=_spread(random, figure))

    def change_at(name: str) -> Callable[[Outcome], float]:
        return lambda o: relative_change(before.tokens[name], o.tokens[name])

    step_TS = (after.tokens[hook] - tokens_TSD).norm(dim=-1)
    changed_TS = step_TS > 0
    share_N = (step_TS / tokens_TSD.norm(dim=-1).clamp_min(1e-30))[changed_TS]
    times = shot.frame_times_s
    return ClipEffect(
        name=shot.name,
        clip=shot.clip,
        seconds=None if np.isnan(times).any() else (float(times[0]), float(times[-1])),
        tokens=changed_TS.numel(),
        changed_tokens=int(changed_TS.sum()),
        step=float(share_N.mean()) if len(share_N) else 0.0,
        latents=_edited(bench, edits, rewrite, tokens_TSD),
        top_before=_top(bench.readout, before),
        top_after=_top(bench.readout, after),
        kl=None if bench.readout is None else compared(lambda o: _kl(before.logits_C, o.logits_C)),
        classes=_class_changes(bench.readout, before, after, compared),
        hooks=tuple(HookChange(hook=name, change=compared(change_at(name))) for name in hooks),
        later=tuple(_later_changes(later, before, after, matched, random) for later in bench.later),
    )


def _edits(bench: EditContext, changes: Sequence[ChangeConfig], shot: Clip) -> list[Edit]:
    masks = [region_mask(change.where, bench.backbone.grid, shot.frame_times_s) for change in changes]
    return [
        Edit(change.latent, change.operation, None if mask is None else torch.from_numpy(mask))
        for change, mask in zip(changes, masks, strict=True)
    ]


def _spread(outcomes: Sequence[Outcome], figure: Callable[[Outcome], float]) -> Spread | None:
    values = [figure(each) for each in outcomes]
    if not values:
        return None
    return Spread(mean=float(np.mean(values)), low=min(values), high=max(values), draws=len(values))


def _edited(
    bench: EditContext, edits: Sequence[Edit], rewrite: LatentEdits, tokens_TSD: Tensor
) -> tuple[EditedLatent, ...]:
    with torch.no_grad():
        codes_TSF = bench.sae.encode(tokens_TSD.flatten(0, 1)).unflatten(0, tokens_TSD.shape[:2])
    change_TSE = rewrite.code_change(tokens_TSD[None])[0]
    found = []
    for place, latent in enumerate(rewrite.latents):
        reached_TS = torch.zeros(tokens_TSD.shape[:2], dtype=torch.bool, device=tokens_TSD.device)
        for each in edits:
            if each.latent == latent:
                reached_TS |= True if each.mask_TS is None else each.mask_TS.to(reached_TS.device)
        f_TS = codes_TSF[..., latent]
        found.append(
            EditedLatent(
                latent=latent,
                active_tokens=int((f_TS != 0).sum()),
                mean_before=float(f_TS[reached_TS].mean()),
                mean_after=float((f_TS + change_TSE[..., place])[reached_TS].mean()),
                largest_observed=float(bench.usage.largest_F[latent]),
            )
        )
    return tuple(found)


def _top(readout: Readout | None, of: Outcome) -> str | None:
    return None if readout is None else readout.classes[int(of.logits_C.argmax())]


def _class_changes(
    readout: Readout | None, before: Outcome, after: Outcome, compared: Callable[[Callable[[Outcome], float]], Compared]
) -> tuple[ClassChange, ...]:
    if readout is None:
        return ()
    old_C, new_C = before.logits_C, after.logits_C

    def change_of(number: int) -> Callable[[Outcome], float]:
        return lambda o: float(o.logits_C[number] - old_C[number])

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


def _kl(old_C: Tensor, new_C: Tensor) -> float:
    old, new = old_C.double().log_softmax(0), new_C.double().log_softmax(0)
    return max(0.0, float(nnf.kl_div(new, old, log_target=True, reduction="sum")))


def _later_changes(
    later: DownstreamSAE, before: Outcome, after: Outcome, matched: Sequence[Outcome], random: Sequence[Outcome]
) -> LaterSae:
    def mean_code(of: Outcome) -> Tensor:
        with torch.no_grad():
            return later.sae.encode(of.tokens[later.hook].flatten(0, 1)).mean(0, dtype=torch.float64).cpu()

    old_F, new_F = mean_code(before), mean_code(after)
    controls = {"matched": [mean_code(o) - old_F for o in matched], "random": [mean_code(o) - old_F for o in random]}

    def spread(kind: str, latent: int) -> Spread | None:
        values = [float(change_F[latent]) for change_F in controls[kind]]
        if not values:
            return None
        return Spread(mean=float(np.mean(values)), low=min(values), high=max(values), draws=len(values))

    most = (new_F - old_F).abs().argsort(descending=True)[:_LATER_LATENTS].tolist()
    return LaterSae(
        run=later.name,
        hook=later.hook,
        latents=tuple(
            LatentChange(
                latent=latent,
                before=float(old_F[latent]),
                after=float(new_F[latent]),
                change=Compared(
                    edit=float(new_F[latent] - old_F[latent]),
                    matched=spread("matched", latent),
                    random=spread("random", latent),
                ),
            )
            for latent in most
        ),
    )
