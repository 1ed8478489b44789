"""Training of the demo's frame-wise backbone, of DINOv2's architecture: supervised, not by DINO.

    frame ──▶ encoder ──linear─▶ of every patch: object or background;
                                 of patches of an object: shape, color, texture, the object's center and radius

Labels come from the generator (`frame_labels`), one frame at a time: it contains no motion. One thread: with
the same versions of torch and FFmpeg the weights are the same on every run.

    PYTHONPATH=benchmarks python -m pretrain.dinov2 --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pretrain.corpus import FRAMES, SIDE, VOCABULARIES, FrameLabels, frame_labels
from pretrain.training import Clock, Curve, adamw, descend, learning_rate, parse_arguments, write_checkpoint
from tubelet_pipeline.backbones.tiny import IMAGENET_MEAN, IMAGENET_STD

PATCH, HIDDEN, LAYERS, HEADS = 8, 96, 4, 4
NOISE = 0.008
"""Standard deviation of the noise added to pixels in 0..1, at most."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    videos: int = 3072
    """Of the generator, twins counted."""
    steps: int = 800
    batch: int = 48
    """Frames, each of another video."""
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Frames and their labels."""

    pixels: torch.Tensor
    """[B, 3, H, W] in 0..1."""
    objects: torch.Tensor
    """bool [B, S]: the patch belongs to an object."""
    looks: torch.Tensor
    """int64 [P, 3]: for those patches, in order, shape, color and texture."""
    poses: torch.Tensor
    """[P, 3]: center x, center y, radius."""


class Training(nn.Module):
    """transformers' Dinov2Model and linear heads on its normalized patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            image_size=SIDE,
            patch_size=PATCH,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
        )
        self.encoder: Any = Dinov2Model(config)
        self.presence = nn.Linear(HIDDEN, 1)
        self.looks = nn.ModuleList(nn.Linear(HIDDEN, len(names)) for names in VOCABULARIES.values())
        self.pose = nn.Linear(HIDDEN, 3)

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Cross-entropies in nats, and the squared error of the pose in halves of the frame, times ten."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.encoder((batch.pixels - mean) / std).last_hidden_state[:, 1:]
        objects = tokens[batch.objects]
        presence = self.presence(tokens)[..., 0]
        losses = {"object": F.binary_cross_entropy_with_logits(presence, batch.objects.float())}
        for head, name, wanted in zip(self.looks, VOCABULARIES, batch.looks.T, strict=True):
            losses[name] = F.cross_entropy(head(objects), wanted)
        losses["pose"] = 10 * F.mse_loss(self.pose(objects), batch.poses)
        return losses


def draw_frames(corpus: NDArray[np.uint8], labels: FrameLabels, size: int, rng: np.random.Generator) -> Batch:
    """One augmented frame from each of `size` random videos: mirrored, lightened or darkened, noised."""
    rows = rng.integers(len(corpus), size=size)
    times = rng.integers(FRAMES, size=size)
    pixels = torch.from_numpy(corpus[rows, times]).float() / 255
    owner = torch.from_numpy(labels.owner[rows, times])
    poses = torch.from_numpy(labels.poses[rows, times])
    for axis, place in ((-1, 0), (-2, 1)):
        mirrored = torch.from_numpy(rng.random(size) < 0.5)
        pixels[mirrored] = pixels[mirrored].flip(axis)
        owner[mirrored] = owner[mirrored].flip(axis)
        poses[mirrored, :, place] *= -1
    light = torch.from_numpy(rng.uniform(-0.05, 0.05, (size, 1, 1, 1)).astype(np.float32))
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32)) * rng.uniform(0, NOISE)
    owner_BS = owner.flatten(1)
    frame, patch = owner_BS.nonzero(as_tuple=True)
    actor = owner_BS[frame, patch] - 1
    return Batch(
        pixels=(pixels + light + noise).clamp(0, 1),
        objects=owner_BS > 0,
        looks=torch.from_numpy(labels.looks[rows])[frame, actor],
        poses=poses[frame, actor],
    )


def train(recipe: Recipe, corpus: NDArray[np.uint8], labels: FrameLabels) -> tuple[Training, list[dict[str, float]]]:
    """Train on `corpus` (uint8 [video, 48, 3, 64, 64]).

    Returns:
        The model, and the losses averaged over each fiftieth of the steps.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = Training()
    optimizer = adamw(model, recipe.weight_decay)
    curve = Curve(recipe.steps)
    for step in range(recipe.steps):
        losses = model.losses(draw_frames(corpus, labels, recipe.batch, rng))
        loss = torch.stack(list(losses.values())).sum()
        descend(optimizer, model, loss, learning_rate(recipe.learning_rate, step, recipe.warmup, recipe.steps))
        curve.add(step, losses)
    return model, curve.points


def main() -> None:
    """Render, train, write the encoder to `--out`."""
    arguments, recipe = parse_arguments(__doc__), Recipe()
    corpus = arguments.open_corpus(recipe.videos)
    labels = frame_labels(recipe.videos, PATCH)
    clock = Clock()
    model, curve = train(recipe, corpus, labels)
    write_checkpoint(arguments.out, model.encoder, "BitImageProcessor", recipe, clock, curve)


if __name__ == "__main__":
    main()
