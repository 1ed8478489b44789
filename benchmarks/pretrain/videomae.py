"""Pre-training of the demo's VideoMAE: masked autoencoding, and predicting how each token's piece of the picture moves.

    clip ──tube mask (81 %)──▶ encoder ──▶ decoder ──▶ pixels of hidden tubelets   (Tong et al. 2022, arXiv 2203.12602)
                                  └─linear─▶ motion of the visible tubelets        (`motion`)
    clip ──nothing hidden────▶ encoder ──linear─▶ motion of all tubelets

Only the encoder is kept. No label is read. One thread: with the same versions of torch and FFmpeg the weights are the
same on every run.

    PYTHONPATH=benchmarks python -m pretrain.videomae --out DIR
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from pretrain.corpus import SIDE, draw_clips
from pretrain.motion import TARGETS, motion_targets
from pretrain.training import Clock, Curve, adamw, descend, learning_rate, parse_arguments, write_checkpoint
from tubelet_pipeline.backbones.tiny import IMAGENET_MEAN, IMAGENET_STD

FRAMES, PATCH, TUBELET, HIDDEN, LAYERS, HEADS = 16, 8, 2, 96, 4, 4
GRID = SIDE // PATCH
TIME = FRAMES // TUBELET
SPREAD_FLOOR = 0.05
"""Added to a clip's standard deviation before its pixels are divided by it. Pixels in 0..1."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    videos: int = 3072
    """Of the generator, twins counted."""
    steps: int = 1200
    masked: int = 12
    """Clips of a batch that are masked."""
    whole: int = 4
    """Clips of a batch of which nothing is hidden."""
    visible: int = 12
    """Places of the 64 that are not hidden: in all time steps the same, hence tubes."""
    decoded: int = 64
    """Hidden tubelets per clip that are decoded, drawn with a preference for those in which something changes."""
    decoder_hidden: int = 64
    decoder_layers: int = 2
    learning_rate: float = 2e-3
    warmup: int = 60
    weight_decay: float = 0.05
    motion_weight: float = 2.0
    seed: int = 0


class Pretraining(nn.Module):
    """transformers' VideoMAEForPreTraining and a linear head that reads motion off single tokens."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEForPreTraining

        config = VideoMAEConfig(
            image_size=SIDE,
            patch_size=PATCH,
            num_frames=FRAMES,
            tubelet_size=TUBELET,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            decoder_hidden_size=recipe.decoder_hidden,
            decoder_num_hidden_layers=recipe.decoder_layers,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=4 * recipe.decoder_hidden,
            use_mean_pooling=True,
            norm_pix_loss=False,
        )
        self.mae: Any = VideoMAEForPreTraining(config)
        self.motion = nn.Linear(HIDDEN, len(TARGETS))

    def encode(self, pixels: torch.Tensor, hidden_BN: torch.Tensor | None) -> torch.Tensor:
        """Tokens [B, visible, D] of clips [B, T, 3, H, W] in 0..1."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens: torch.Tensor = self.mae.videomae((pixels - mean) / std, bool_masked_pos=hidden_BN).last_hidden_state
        return tokens

    def decode(self, tokens: torch.Tensor, hidden_BN: torch.Tensor, wanted_BM: torch.Tensor) -> torch.Tensor:
        """Normalized pixels [B, M, 384] of the hidden tubelets number `wanted_BM`."""
        tokens = self.mae.encoder_to_decoder(tokens)
        table = self.mae.position_embeddings.to(tokens.dtype)[0]
        seen = table.expand(len(tokens), -1, -1)[~hidden_BN].view_as(tokens)
        asked = self.mae.mask_token + table[wanted_BM]
        logits: torch.Tensor = self.mae.decoder(torch.cat([tokens + seen, asked], 1), wanted_BM.shape[1]).logits
        return logits


def pixel_targets(clips: torch.Tensor) -> torch.Tensor:
    """Pixels of every tubelet in the order of VideoMAE's decoder, [B, N, 384].

    Normalized per clip, not per tubelet as VideoMAE's are: what a tubelet's own normalization leaves of these plain
    pictures is fine texture that cannot be guessed. Measured: after 430 steps that loss stood at 0.35, as at the start.
    """
    b = len(clips)
    spread = clips.std((1, 2, 3, 4), keepdim=True) + SPREAD_FLOOR
    normal = (clips - clips.mean((1, 3, 4), keepdim=True)) / spread
    cut = normal.view(b, TIME, TUBELET, 3, GRID, PATCH, GRID, PATCH).permute(0, 1, 4, 6, 2, 5, 7, 3)
    return cut.reshape(b, TIME * GRID * GRID, TUBELET * PATCH * PATCH * 3)


def motion_loss(predicted: torch.Tensor, target: torch.Tensor, power_of_means: float) -> torch.Tensor:
    """Squared error of single tokens, and of the means over space at each time step, each relative to the targets'.

    Args:
        predicted: [B, T', S, 6].
        target: The same, in units of the root mean square of each column.
        power_of_means: Mean square of `target`'s means over space.
    """
    error = predicted - target
    return error.square().mean() + error.mean(2).square().mean() / power_of_means


def train(recipe: Recipe, corpus: NDArray[np.uint8]) -> tuple[Pretraining, list[dict[str, float]]]:
    """Train on `corpus` (uint8 [video, 48, 3, 64, 64]).

    Returns:
        The model, and the losses averaged over each fiftieth of the steps.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = Pretraining(recipe)
    optimizer = adamw(model, recipe.weight_decay)
    sample = motion_targets(draw_clips(corpus, rng.integers(len(corpus), size=128), FRAMES, rng), GRID)
    unit = sample.square().mean((0, 1, 2)).sqrt()
    power_of_means = float((sample / unit).mean(2).square().mean())
    curve = Curve(recipe.steps)
    for step in range(recipe.steps):
        rows = rng.integers(len(corpus), size=recipe.masked + recipe.whole)
        clips = draw_clips(corpus, rows, FRAMES, rng)
        losses = _losses(model, recipe, clips, motion_targets(clips, GRID) / unit, power_of_means)
        loss = losses["pixels"] + recipe.motion_weight * (losses["motion"] + losses["motion, whole"]) / 2
        descend(optimizer, model, loss, learning_rate(recipe.learning_rate, step, recipe.warmup, recipe.steps))
        curve.add(step, losses)
    return model, curve.points


def _losses(
    model: Pretraining, recipe: Recipe, clips: torch.Tensor, target: torch.Tensor, power_of_means: float
) -> dict[str, torch.Tensor]:
    masked = clips[: recipe.masked]
    places = torch.rand(len(masked), GRID * GRID).argsort(1)[:, : recipe.visible].sort(1).values
    hidden = torch.ones(len(masked), GRID * GRID, dtype=torch.bool).scatter_(1, places, False)
    hidden_BN = hidden[:, None].expand(-1, TIME, -1).flatten(1)
    tokens = model.encode(masked, hidden_BN)
    change = target[: recipe.masked, ..., TARGETS.index("energy")].flatten(1)
    # Gumbel's trick: the largest of log weight + noise are a draw without replacement.
    noise = -torch.log(-torch.log(torch.rand_like(change).clamp(1e-9, 1 - 1e-7)))
    score = ((change + 0.2).log() + noise).masked_fill(~hidden_BN, -torch.inf)
    wanted = score.topk(recipe.decoded, dim=1).indices
    pixels = model.decode(tokens, hidden_BN, wanted)
    truth = pixel_targets(masked).gather(1, wanted[..., None].expand_as(pixels))
    seen = target[: recipe.masked].gather(2, places[:, None, :, None].expand(-1, TIME, -1, len(TARGETS)))
    whole = model.motion(model.encode(clips[recipe.masked :], None)).view(-1, TIME, GRID * GRID, len(TARGETS))
    return {
        "pixels": F.mse_loss(pixels, truth),
        "motion": motion_loss(model.motion(tokens).view_as(seen), seen, power_of_means),
        "motion, whole": motion_loss(whole, target[recipe.masked :], power_of_means),
    }


def main() -> None:
    """Render, train, write the encoder to `--out`."""
    arguments, recipe = parse_arguments(__doc__), Recipe()
    corpus = arguments.open_corpus(recipe.videos)
    clock = Clock()
    model, curve = train(recipe, corpus)
    write_checkpoint(arguments.out, model.mae.videomae, "VideoMAEImageProcessor", recipe, clock, curve)


if __name__ == "__main__":
    main()
