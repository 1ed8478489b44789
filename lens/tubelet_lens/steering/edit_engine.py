"""The edit engine: runs a clip through the backbone as it is, with edits at the SAE's hook, and with their controls.

pixels ─▶ backbone, tokens rewritten at the SAE's hook ─▶ Outcome: tokens at each later hook, logits of the readout
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.steering.config import ChangeConfig
from tubelet_lens.steering.edit_controls import LatentUsage, matched_edits, random_directions
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.operations import region_mask
from tubelet_lens.steering.readout import LastTokenProbe, Readout
from tubelet_pipeline.backbones import Backbone, rewriting
from tubelet_pipeline.backbones.rewrite import Rewrite
from tubelet_trainer.sae.model import SAE


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the backbone computes from a clip.

    Attributes:
        tokens: float32 [T', S, D] by hook.
        logits_C: float32 on the CPU; [0] without a readout.
    """

    tokens: dict[str, Tensor]
    logits_C: Tensor


@dataclass(frozen=True, eq=False)
class Trial:
    """One clip without an edit, with it, and with each of its controls.

    Attributes:
        edits: The edit.
        before: Without it.
        after: With it.
        matched: With the same operations on other latents.
        random: With steps of the same length along random directions.
    """

    edits: LatentEdits
    before: Outcome
    after: Outcome
    matched: tuple[Outcome, ...]
    random: tuple[Outcome, ...]


@dataclass(frozen=True, eq=False)
class EditEngine:
    """A backbone, the SAE at one of its hooks, and what is read downstream.

    Attributes:
        backbone: Not compiled.
        hook: The SAE's.
        sae: Its latents are edited.
        usage: How the latents fire on the store.
        readout: Classes of a clip; None: none are read.
        hooks: Where tokens are recorded, `hook` first.
    """

    backbone: Backbone
    hook: str
    sae: SAE
    usage: LatentUsage
    readout: Readout | None
    hooks: tuple[str, ...]

    def run(self, pixels: Tensor, rewrite: Rewrite | None = None) -> Outcome:
        """Run the clip `pixels` [T, 3, h, w] with `rewrite` at the SAE's hook; None: as it is."""
        readout = self.readout
        probe_hook = (readout.hook,) if isinstance(readout, LastTokenProbe) else ()
        with nullcontext() if rewrite is None else rewriting(self.backbone, self.hook, rewrite):
            captured = self.backbone.activations(pixels[None], dict.fromkeys((*self.hooks, *probe_hook)))
            if isinstance(readout, LastTokenProbe):
                logits = readout.read(captured[readout.hook].tokens)[0].cpu()
            else:
                logits = torch.empty(0) if readout is None else readout.logits(pixels[None])[0].cpu()
        return Outcome({hook: captured[hook].tokens[0].float() for hook in self.hooks}, logits)

    def edits(self, changes: Sequence[ChangeConfig], frame_times_s: NDArray[np.float64] | None = None) -> LatentEdits:
        """The rewrite that makes `changes`; `frame_times_s` [T] place regions given in seconds.

        Raises:
            TubeletError: a latent or region that does not exist.
        """
        masks = [region_mask(change.where, self.backbone.grid, frame_times_s) for change in changes]
        edits = [
            Edit(change.latent, change.operation, None if mask is None else torch.from_numpy(mask))
            for change, mask in zip(changes, masks, strict=True)
        ]
        return LatentEdits(self.sae, edits, torch.from_numpy(self.usage.largest_F))

    def trial(self, pixels: Tensor, edits: LatentEdits, controls: int, seed: int) -> Trial:
        """Run one clip without `edits`, with them, and with `controls` of each kind of control drawn by `seed`."""
        before = self.run(pixels)
        matched = matched_edits(self.sae, edits.edits, before.tokens[self.hook], self.usage, controls, seed)
        return Trial(
            edits=edits,
            before=before,
            after=self.run(pixels, edits),
            matched=tuple(self.run(pixels, control) for control in matched),
            random=tuple(self.run(pixels, control) for control in random_directions(edits, controls, seed)),
        )
