"""Colors: vivid ones for objects, muted ones for backgrounds, and the rule that the two must differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

OBJECT_COLORS: dict[str, Color] = {
    "red": (226, 48, 60),
    "orange": (247, 136, 18),
    "yellow": (255, 212, 64),
    "green": (52, 178, 92),
    "teal": (28, 188, 190),
    "blue": (52, 104, 240),
    "purple": (148, 74, 222),
    "pink": (255, 122, 190),
    "white": (244, 244, 240),
}
"""By the adjective a caption uses."""

BACKGROUND_COLORS: tuple[Color, ...] = (
    (54, 60, 76),
    (24, 28, 44),
    (78, 92, 74),
    (94, 74, 98),
    (116, 88, 76),
    (150, 160, 152),
    (204, 190, 164),
    (196, 204, 214),
)

MIN_CONTRAST = 105.0
"""Smallest distance in RGB between an object and the background behind it. The weakest pair this leaves (teal on gray
green) is plain to see on a contact sheet at 64 pixels."""


def backgrounds_for(colors: list[Color]) -> NDArray[np.int64]:
    """Numbers of the background colors on which every one of `colors` stands out. Never empty."""
    objects = np.array(colors, np.float64)
    distance = np.linalg.norm(np.array(BACKGROUND_COLORS)[:, None] - objects, axis=2).min(axis=1)
    fit = np.flatnonzero(distance >= MIN_CONTRAST)
    return fit if fit.size else np.array([int(distance.argmax())])
