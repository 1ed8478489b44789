"""What a running backbone says of a clip: logits of its own classifier, or of a linear probe of its last tokens.

    classifier   the head that a fine-tuned checkpoint brings along
    probe        logistic regression on the mean over tokens of the last hidden state, fitted on labeled clips

Paper B (Stevens et al., science note 2.5) reads a probe of the next layer's CLS; here the mean over patches, which
every family has [RECON].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet.errors import TubeletError
from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.stats.linear_models import choose_penalty
from tubelet_lens.stats.linear_models import fit_probe as fit_logistic_probe
from tubelet_pipeline.backbones import Backbone
from tubelet_pipeline.backbones.classifier import Classifier, has_classifier

BATCH = 8
"""Clips in one pass."""

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 penalties that a probe chooses from, on a fifth of its videos; the range of the action probe."""

_VALIDATION = 0.2


class Readout(Protocol):
    """Logits of clips, from passes that rewritings act on."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of the logits."""

    @property
    def what(self) -> str:
        """What it is, for people."""

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [B, C] from pixels [B, T, 3, h, w]."""


def final_hook(backbone: Backbone) -> str:
    """The last place of `backbone`: after its final norm where it has one, else its last block."""
    return "final_norm" if "final_norm" in backbone.hook_names else backbone.resolve_hook("blocks.-1")


def later_hooks(backbone: Backbone, hook: str) -> tuple[str, ...]:
    """Residual streams after `hook`, then the final norm: where an edit at `hook` may be felt."""
    block = len(backbone.blocks) if hook == "final_norm" else int(hook.split(".")[1])
    # What a part of a block adds is felt in that block's own output.
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
    def what(self) -> str:
        """What it is."""
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
        clips: Clips it was fitted on.
        accuracy: Of the same probe fitted without the videos on which its penalty was chosen, on these.
    """

    backbone: Backbone
    hook: str
    classes: tuple[str, ...]
    weights_CD: Tensor
    bias_C: Tensor
    clips: int
    accuracy: float | None

    @property
    def what(self) -> str:
        """What it is."""
        return f"a linear probe of the mean token at {self.hook}, fitted on {self.clips} clips"

    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [B, C]"""
        tokens = self.backbone.activations(pixels, [self.hook])[self.hook].tokens
        return tokens.float().flatten(1, 2).mean(1) @ self.weights_CD.T + self.bias_C


def pooled_tokens(backbone: Backbone, hook: str, pixels: Iterable[Tensor]) -> Tensor:
    """float32 [N, D] Mean token at `hook` of each clip; `pixels` [T, 3, h, w] each."""
    means = [
        backbone.activations(batch, [hook])[hook].tokens.float().flatten(1, 2).mean(1) for batch in in_batches(pixels)
    ]
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
        backbone: What will be read.
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
            f"The {len(class_N)} labeled clips are all of one class or none, so no probe can be fitted",
            "Give a store with labels of two classes or more, or a checkpoint with a classifier",
        )
    rows, device = rows_ND.cpu().numpy(), backbone.device
    validation_N = partition(videos, validation=_VALIDATION, ranking=0, seed=seed).validation
    penalty = choose_penalty(rows, class_N, validation_N, len(classes), PENALTIES, device)
    model = fit_logistic_probe(rows, class_N, len(classes), penalty, device)
    rest = fit_logistic_probe(rows[~validation_N], class_N[~validation_N], len(classes), penalty, device)
    right = rest.probabilities(rows[validation_N]).argmax(1).cpu().numpy() == class_N[validation_N]
    at_zero = model.model.logits(model.basis.coordinates(np.zeros((1, rows.shape[1]))))[0]
    return LastTokenProbe(
        backbone=backbone,
        hook=final_hook(backbone),
        classes=tuple(classes),
        weights_CD=torch.from_numpy(model.weights(rows.shape[1])).float().to(device),
        bias_C=at_zero.float(),
        clips=len(class_N),
        accuracy=float(right.mean()) if len(right) else None,
    )


def own_classifier(backbone: Backbone) -> OwnClassifier | None:
    """The checkpoint's classifier, where it has one."""
    return OwnClassifier(Classifier(backbone)) if has_classifier(backbone) else None


def in_batches(pixels: Iterable[Tensor]) -> Iterator[Tensor]:
    """Clips [T, 3, h, w] stacked, `BATCH` at a time; what is left comes last."""
    waiting: list[Tensor] = []
    for clip in pixels:
        waiting.append(clip)
        if len(waiting) == BATCH:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)
