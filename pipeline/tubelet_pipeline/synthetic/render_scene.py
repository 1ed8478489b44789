"""Drawing a scene: frames and masks as arrays.

Only the box around an object is computed in each frame; a 64-frame video of 128 x 128 pixels takes about 50 ms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tubelet_pipeline.synthetic.appearance import OBJECT_COLORS, REACH, SHAPES, TEXTURES, Plane
from tubelet_pipeline.synthetic.scene import Actor, Look, Scene

NOISE_SIGMA = 2.0
"""Camera noise, standard deviation in gray levels: visible in the raw frames, cheap for the codec."""

RIM_PIXELS_AT_128 = 1.6
"""Width of the darker rim around each object, in pixels of a 128-pixel frame."""


def render(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw `scene`.

    Returns:
        frames_THWC: uint8 RGB.
        masks_THW: uint8; v where actor v - 1 contributes at least half of the pixel's color (an object faded by half
            has no mask), 0 elsewhere. If actors overlap, the first one is in front.
    """
    frames = len(scene.order)
    height, width = scene.background_HWC.shape[:2]
    picture_THWC = np.repeat(scene.background_HWC[None], frames, axis=0)
    masks_THW = np.zeros((frames, height, width), np.uint8)
    for value in range(len(scene.actors), 0, -1):
        actor = scene.actors[value - 1]
        for t in range(frames):
            _draw(picture_THWC[t], masks_THW[t], actor, t, value)
    noise_THW = np.random.default_rng(scene.noise_seed).standard_normal((frames, height, width), np.float32)
    picture_THWC += np.float32(NOISE_SIGMA) * noise_THW[..., None]
    frames_THWC = np.clip(np.rint(picture_THWC), 0, 255).astype(np.uint8)
    return frames_THWC[scene.order], masks_THW[scene.order]


def _draw(picture_HWC: NDArray[np.float32], mask_HW: NDArray[np.uint8], actor: Actor, t: int, value: int) -> None:
    """Draw `actor` at frame `t` of its track, in place."""
    height, width = mask_HW.shape
    short = min(height, width)
    track = actor.track
    opacity = np.float32(track.opacity[t])
    if opacity == 0:
        return
    radius = float(track.radius[t]) * short
    center_x = width / 2 + float(track.x[t]) * short - 0.5
    center_y = height / 2 + float(track.y[t]) * short - 0.5
    reach = radius * REACH + 1
    rows = slice(max(int(center_y - reach), 0), max(min(int(center_y + reach) + 2, height), 0))
    columns = slice(max(int(center_x - reach), 0), max(min(int(center_x + reach) + 2, width), 0))
    dy = ((np.arange(rows.start, rows.stop) - center_y) / radius).astype(np.float32)[:, None]
    dx = ((np.arange(columns.start, columns.stop) - center_x) / radius).astype(np.float32)[None, :]
    cos, sin = np.float32(np.cos(track.angle[t])), np.float32(np.sin(track.angle[t]))
    x, y = cos * dx + sin * dy, cos * dy - sin * dx

    depth_px = SHAPES[actor.look.shape](x, y) * np.float32(-radius)
    share = opacity * np.clip(depth_px + np.float32(0.5), 0, 1)
    color_HWC = _surface(actor.look, x, y, depth_px, short)
    patch = picture_HWC[rows, columns]
    patch += share[..., None] * (color_HWC - patch)
    mask_HW[rows, columns][share >= 0.5] = value


def _surface(look: Look, x: Plane, y: Plane, depth_px: Plane, short: int) -> NDArray[np.float32]:
    """Color of the object at each point, [rows, columns, 3] in 0..255."""
    first = np.array(OBJECT_COLORS[look.color], np.float32)
    light = look.second_tone_is_light and look.color != "white"
    second = first + np.float32(0.68) * (255 - first) if light else first * np.float32(0.5)
    tone = TEXTURES[look.texture](x, y)[..., None]
    rim_px = RIM_PIXELS_AT_128 * short / 128
    rim = np.clip(depth_px - np.float32(rim_px) + np.float32(0.5), 0, 1)[..., None]
    return (first + tone * (second - first)) * (np.float32(0.55) + np.float32(0.45) * rim)
