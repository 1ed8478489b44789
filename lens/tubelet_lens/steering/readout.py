"""Classes of a clip as the backbone gives them: logits of its own classifier, or of a linear probe of its last tokens.

    classifier   the head of a fine-tuned checkpoint
    probe        logistic regression on the mean over tokens of the last hidden state, fitted on labeled clips

[RECON] Stevens et al. (arXiv 2502.06755) probe the CLS token of the next layer; here the mean over patches is probed,
because not every family has a CLS token.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet.progress import Progress
from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.inputs.clip_stream import read_clip
from tubelet_lens.stats.linear_models import choose_penalty
from tubelet_lens.stats.linear_models import fit_probe as fit_logistic_probe
from tubelet_lens.steering.clip_source import ClipSource
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.backbones.classifier import Classifier, has_classifier
from tubelet_store.reader import Store

BATCH = 8
"""Clips per forward pass."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties to choose from on a fifth of the videos; the same as for the action probe."""

_VALIDATION = 0.2

_UNKNOWN_LISTED = 8
"""Unknown names listed in an error."""

_LISTED = 20
"""Classes of the readout listed in an error."""


class Readout(Protocol):
    """Logits of clips, from forward passes in which rewrites take effect."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the logits."""

    @property
    def description(self) -> str:
        """What it is, for reports."""

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [B, C] from pixels [B, T, 3, h, w]."""


def final_hook(backbone: Backbone) -> str:
    """The last hook of `backbone`: its final norm where it has one, else its last block."""
    return "final_norm" if "final_norm" in backbone.hook_names else backbone.resolve_hook("blocks.-1")


def later_hooks(backbone: Backbone, hook: str) -> tuple[str, ...]:
    """Hooks that an edit at `hook` can change: residual streams after it, then the final norm."""
    block = len(backbone.blocks) if hook == "final_norm" else int(hook.split(".")[1])
    # What a part of a block adds changes that block's own output.
    first = block if hook.count(".") > 1 else block + 1
    later = tuple(f"blocks.{i}" for i in range(first, len(backbone.blocks)))
    return later + (("final_norm",) if hook != "final_norm" and "final_norm" in backbone.hook_names else ())


@dataclass(frozen=True, eq=False)
class OwnClassifier:
    """The checkpoint's own head."""

    head: Classifier

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.head.classes

    @property
    def description(self) -> str:
        """What it is, for reports."""
        return "the backbone's own classifier"

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [B, C]"""
        return self.head.logits(pixels)


@dataclass(frozen=True, eq=False)
class LastTokenProbe:
    """A linear probe of the mean token at `hook`.

    Attributes:
        weights_CD: float32, of raw activations.
        bias_C: float32
        clips: Number of clips it was fitted on.
        accuracy: On the validation videos (a fifth), of a probe fitted on the other videos with the same penalty.
    """

    backbone: Backbone
    hook: str
    classes: tuple[str, ...]
    weights_CD: Tensor
    bias_C: Tensor
    clips: int
    accuracy: float | None

    @property
    def description(self) -> str:
        """What it is, for reports."""
        return f"a linear probe of the mean token at {self.hook}, fitted on {self.clips} clips"

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [B, C]"""
        return self.read(self.backbone.activations(pixels, [self.hook])[self.hook].tokens)

    def read(self, tokens: Tensor) -> Tensor:
        """float32 [B, C] from tokens [B, T', S, D] at `hook`."""
        return tokens.float().flatten(1, 2).mean(1) @ self.weights_CD.T + self.bias_C


def last_tokens(store: Store, source: ClipSource, clips: Sequence[int]) -> Tensor:
    """float32 [N, D] Mean token of each clip at the last hook: from the store where it has that hook, else from the
    videos."""
    backbone, hook = source.backbone, final_hook(source.backbone)
    if store.plan.tokens is None and any(stored.name == hook for stored in store.plan.hooks):
        return torch.stack([read_clip(store, hook, clip).flatten(0, 1).mean(0) for clip in clips])
    means = []
    with Progress("running the backbone for the probe", len(clips), "clips") as progress:
        for batch in in_batches(clip.pixels for clip in source.clips(clips)):
            means.append(backbone.activations(batch, [hook])[hook].tokens.float().flatten(1, 2).mean(1))
            progress.advance(len(batch))
    return torch.cat(means)


def fit_probe(
    backbone: Backbone,
    rows_ND: Tensor,
    class_N: NDArray[np.int64],
    classes: Sequence[str],
    videos: Sequence[str],
    seed: int = 0,
) -> LastTokenProbe:
    """Fit a probe of the mean last token.

    The penalty is chosen on a fifth of the videos, then the probe is fitted on all.

    Args:
        backbone: The backbone to probe.
        rows_ND: Mean token of each clip at `final_hook`.
        class_N: Classes 0 ... C - 1.
        classes: Their names.
        videos: [N] Video of each clip.
        seed: Draws the videos on which the penalty is chosen.

    Raises:
        TubeletError: fewer than two classes among the clips.
    """
    if len(np.unique(class_N)) < 2:
        raise TubeletError(
            f"The {len(class_N)} labeled clips are of fewer than two classes, so no probe can be fitted",
            "Give a store with labels of two classes or more, or a checkpoint with a classifier",
        )
    rows, device = rows_ND.cpu().numpy(), backbone.device
    validation_N = partition(videos, validation=_VALIDATION, ranking=0, seed=seed).validation
    penalty = choose_penalty(rows, class_N, validation_N, len(classes), PENALTIES)
    model = fit_logistic_probe(rows, class_N, len(classes), penalty)
    rest = fit_logistic_probe(rows[~validation_N], class_N[~validation_N], len(classes), penalty)
    right = rest.logits(rows[validation_N]).argmax(1) == class_N[validation_N]
    return LastTokenProbe(
        backbone=backbone,
        hook=final_hook(backbone),
        classes=tuple(classes),
        weights_CD=torch.from_numpy(model.weights_CF).float().to(device),
        bias_C=torch.from_numpy(model.bias_C).float().to(device),
        clips=len(class_N),
        accuracy=float(right.mean()) if len(right) else None,
    )


def own_classifier(backbone: Backbone) -> OwnClassifier | None:
    """The checkpoint's classifier, where it has one."""
    return OwnClassifier(Classifier(backbone)) if has_classifier(backbone) else None


def in_batches(pixels: Iterable[Tensor]) -> Iterator[Tensor]:
    """Clips [T, 3, h, w] in stacks of `BATCH`; the last may be smaller."""
    waiting: list[Tensor] = []
    for clip in pixels:
        waiting.append(clip)
        if len(waiting) == BATCH:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


def match_class_names(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Index in `classes` of each of `names` that is there; names without a match are left out.

    Classes are matched by name, because numbers differ between checkpoint and data set. An exact match comes first,
    then one that ignores case, underscores and spaces; a name that matches two classes that way is left out.
    """
    exact = {name: number for number, name in enumerate(classes)}
    alike: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        alike.setdefault(_plain(name), []).append(number)
    matched = {}
    for name in names:
        candidates = [exact[name]] if name in exact else alike.get(_plain(name), [])
        if len(candidates) == 1:
            matched[name] = candidates[0]
    return matched


def unknown_names(names: Iterable[str], classes: Sequence[str]) -> str | None:
    """Says which of `names` are not in `classes`, and the nearest class of each; None: all are there."""
    wanted = list(dict.fromkeys(names))
    known = match_class_names(wanted, classes)
    unknown = [name for name in wanted if name not in known]
    if not unknown:
        return None
    plain = {_plain(name): name for name in classes}
    listed = []
    for name in unknown[:_UNKNOWN_LISTED]:
        close = difflib.get_close_matches(_plain(name), plain, n=1)
        listed.append(f"'{name}'" + (f" (nearest: '{plain[close[0]]}')" if close else ""))
    listed += [f"{len(unknown) - _UNKNOWN_LISTED:,} more"] if len(unknown) > _UNKNOWN_LISTED else []
    present = [f"'{name}'" for name in classes[:_LISTED]]
    present += [f"{len(classes) - _LISTED:,} more"] if len(classes) > _LISTED else []
    return (
        f"{len(unknown):,} of the data set's {len(wanted):,} classes are not among those of the readout: "
        f"{', '.join(listed)}. The readout has {len(classes):,} classes: {', '.join(present)}. Classes are matched by "
        "name, ignoring case, underscores and spaces."
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
