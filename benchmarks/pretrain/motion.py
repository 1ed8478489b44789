"""What moves where in a clip, estimated from its pixels alone: the targets of the auxiliary loss.

    two frames of a tubelet ──gradients──▶ normal equations of Lucas and Kanade per cell ──▶ flow ──▶ six numbers

Predicting motion statistics as a pretext task: Wang et al. 2019 (arXiv 1904.03597). Theirs are histograms over regions
of a clip; these are one vector per token, so that each token has to encode its motion. [RECON] All constants: the paper
has others, for natural videos; these were chosen for rendered videos of 64 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TARGETS = ("right", "down", "clockwise", "outward", "contrast", "energy")
"""Flow to the right and downwards; flow around and away from the clip's center of motion; growth of local contrast;
size of the temporal change."""

DAMPING = 1e-3
"""Added to the normal equations' diagonal: what a cell without structure has instead of a flow is none."""

MAX_FLOW = 3.0
"""Pixels at half size from one frame to the next; larger estimates are nonsense."""


def motion_targets(clips: torch.Tensor, grid: int) -> torch.Tensor:
    """Motion of every tubelet of two frames.

    Args:
        clips: float32 [B, T, 3, H, W] in 0..1.
        grid: Cells per side, G; H / 2 and W / 2 are multiples of it.

    Returns:
        float32 [B, T / 2, G * G, 6] in the order of `TARGETS`. Flow in half-size pixels per sampled frame, lever
        arms in halves of the frame.
    """
    batch, frames = clips.shape[:2]
    small = F.avg_pool2d(clips.flatten(0, 1), 2)
    small = small.unflatten(0, (batch, frames))
    first, second = small[:, 0::2], small[:, 1::2]
    middle = F.pad(((first + second) / 2).flatten(0, 1), (1, 1, 1, 1), mode="replicate")
    gx = ((middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2).unflatten(0, first.shape[:2])
    gy = ((middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2).unflatten(0, first.shape[:2])
    gt = second - first
    products = [gx * gx, gx * gy, gy * gy, gx * gt, gy * gt, gt * gt]
    xx, xy, yy, xt, yt, tt = _cells(torch.stack([p.sum(2) for p in products], 2), grid).unbind(2)
    xx, yy = xx + DAMPING, yy + DAMPING
    determinant = xx * yy - xy * xy
    right = ((xy * yt - yy * xt) / determinant).clamp(-MAX_FLOW, MAX_FLOW)
    down = ((xy * xt - xx * yt) / determinant).clamp(-MAX_FLOW, MAX_FLOW)

    axis = (torch.arange(grid) + 0.5) * 2 / grid - 1
    y, x = axis.repeat_interleave(grid), axis.repeat(grid)
    weight = tt / tt.sum((1, 2), keepdim=True).clamp_min(1e-9)
    x = x - (weight * x).sum((1, 2), keepdim=True)
    y = y - (weight * y).sum((1, 2), keepdim=True)
    contrast = _contrast(second, grid) - _contrast(first, grid)
    return torch.stack([right, down, x * down - y * right, x * right + y * down, contrast, tt.sqrt()], -1)


def _contrast(frames: torch.Tensor, grid: int) -> torch.Tensor:
    """Standard deviation within each cell, [B, T / 2, G * G]."""
    mean = _cells(frames, grid)
    return (_cells(frames * frames, grid) - mean * mean).clamp_min(0).sum(2).add(1e-6).sqrt()


def _cells(maps: torch.Tensor, grid: int) -> torch.Tensor:
    """Means over windows of twice a cell's side, centered on the cells: [B, T, C, H, W] to [B, T, C, G * G]."""
    side = maps.shape[-1] // grid
    means = F.avg_pool2d(maps.flatten(0, 1), 2 * side, side, side // 2, count_include_pad=False)
    return means.flatten(-2).unflatten(0, maps.shape[:2])
