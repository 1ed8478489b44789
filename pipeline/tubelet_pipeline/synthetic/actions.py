"""The actions: how objects move, and the SSv2-style template of each motion.

    stage, rng ──choreography──▶ tracks of the forward video ──twin──▶ tracks of its opposite

Lengths are in units of the frame's smaller side, the origin is the frame's center, x points right and y down. Hence a
growing angle turns clockwise for the viewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_pipeline.synthetic.appearance import REACH, SHAPES, TURNABLE

Series = NDArray[np.float64]
"""One value per frame, [frames]."""


@dataclass(frozen=True)
class Stage:
    """The space in which objects move."""

    frames: int
    half_width: float
    half_height: float

    def times(self) -> Series:
        """Time of each frame, from 0 (first) to 1 (last)."""
        return np.linspace(0, 1, self.frames)

    def place(self, rng: np.random.Generator, margin_x: float, margin_y: float) -> tuple[float, float]:
        """A random point with these margins from the frame's edges (the center if the margins are too large)."""
        x = max(self.half_width - margin_x, 0.0)
        y = max(self.half_height - margin_y, 0.0)
        return float(rng.uniform(-x, x)), float(rng.uniform(-y, y))


@dataclass(frozen=True, eq=False)
class Track:
    """Position, size, angle and opacity of one object in each frame."""

    x: Series
    y: Series
    radius: Series
    angle: Series
    """Radians, clockwise."""
    opacity: Series

    def at(self, order: NDArray[np.int64]) -> Track:
        """The track with its frames reordered: frame i is frame `order[i]` of this one."""
        return Track(self.x[order], self.y[order], self.radius[order], self.angle[order], self.opacity[order])


def still(stage: Stage, x: float, y: float, radius: float, angle: float) -> Track:
    """An opaque object at rest."""
    ones = np.ones(stage.frames)
    return Track(x * ones, y * ones, radius * ones, angle * ones, ones)


Choreography = Callable[[np.random.Generator, Stage], tuple[Track, ...]]


def _pace(rng: np.random.Generator, stage: Stage) -> Series:
    """Progress from 0 to 1: anything between steady and eased at both ends."""
    t = stage.times()
    ease = rng.uniform(0, 1)
    return (1 - ease) * t + ease * t * t * (3 - 2 * t)


def _radius(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.12, 0.17))


def _angle(rng: np.random.Generator) -> float:
    return float(rng.uniform(0, 2 * np.pi))


def _leftward(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    return (_straight(rng, stage, horizontal=True),)


def _upward(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    return (_straight(rng, stage, horizontal=False),)


def _straight(rng: np.random.Generator, stage: Stage, horizontal: bool) -> Track:
    radius = _radius(rng)
    half = stage.half_width if horizontal else stage.half_height
    room = 2 * (half - radius * REACH)
    length = rng.uniform(0.65, 0.95) * room
    drift = rng.uniform(-0.12, 0.12) * length
    along, across = (length, abs(drift)) if horizontal else (abs(drift), length)
    x, y = stage.place(rng, radius * REACH + along / 2, radius * REACH + across / 2)
    progress = 0.5 - _pace(rng, stage)
    base = still(stage, x, y, radius, _angle(rng))
    if horizontal:
        return Track(x + length * progress, y + drift * progress, base.radius, base.angle, base.opacity)
    return Track(x + drift * progress, y + length * progress, base.radius, base.angle, base.opacity)


def _nearing(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    small, large = rng.uniform(0.07, 0.1), rng.uniform(0.2, 0.28)
    x, y = stage.place(rng, large * REACH, large * REACH)
    base = still(stage, x, y, 1.0, _angle(rng))
    # An object approaching at constant relative speed grows exponentially in the image.
    return (Track(base.x, base.y, small * (large / small) ** _pace(rng, stage), base.angle, base.opacity),)


def _turning(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    radius = rng.uniform(0.16, 0.24)
    x, y = stage.place(rng, radius * REACH, radius * REACH)
    base = still(stage, x, y, radius, 0.0)
    sweep = np.deg2rad(rng.uniform(150, 300))
    return (Track(base.x, base.y, base.radius, _angle(rng) + sweep * _pace(rng, stage), base.opacity),)


def _appearing(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    radius = rng.uniform(0.13, 0.22)
    x, y = stage.place(rng, radius * REACH, radius * REACH)
    begin, end = rng.uniform(0.1, 0.35), rng.uniform(0.6, 0.9)
    base = still(stage, x, y, radius, _angle(rng))
    return (Track(base.x, base.y, base.radius, base.angle, np.clip((stage.times() - begin) / (end - begin), 0, 1)),)


def _meeting(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    first, second = rng.uniform(0.09, 0.13, 2)
    touching = (first + second) * REACH + 0.01
    reach_x = stage.half_width - max(first, second) * REACH
    reach_y = stage.half_height - max(first, second) * REACH
    bearing = _angle(rng)
    toward_x, toward_y = np.cos(bearing), np.sin(bearing)
    # The farthest apart that two objects can be on this bearing, each as far from the center as the other.
    farthest = 2 * min(reach_x / max(abs(toward_x), 1e-9), reach_y / max(abs(toward_y), 1e-9))
    apart = rng.uniform(0.85, 1.0) * farthest
    half = (apart + (touching - apart) * _pace(rng, stage)) / 2
    tracks = []
    for radius, side in ((first, -1), (second, 1)):
        base = still(stage, 0.0, 0.0, radius, _angle(rng))
        tracks.append(Track(side * half * toward_x, side * half * toward_y, base.radius, base.angle, base.opacity))
    return tuple(tracks)


def _circling(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    radius = rng.uniform(0.1, 0.14)
    orbit = rng.uniform(0.2, 0.3)
    x, y = stage.place(rng, radius * REACH + orbit, radius * REACH + orbit)
    bearing = _angle(rng) + np.deg2rad(rng.uniform(300, 420)) * _pace(rng, stage)
    base = still(stage, 0.0, 0.0, radius, _angle(rng))
    return (Track(x + orbit * np.cos(bearing), y + orbit * np.sin(bearing), base.radius, base.angle, base.opacity),)


def _shaking(rng: np.random.Generator, stage: Stage) -> tuple[Track, ...]:
    radius = rng.uniform(0.13, 0.19)
    swing = rng.uniform(0.07, 0.11)
    x, y = stage.place(rng, radius * REACH + swing, radius * REACH + swing)
    bearing = rng.uniform(0, np.pi)
    # At most 4 oscillations per clip: 16 sampled frames then sample each oscillation at 4 points.
    offset = swing * np.sin(2 * np.pi * rng.uniform(2.5, 4) * stage.times() + rng.uniform(0, 2 * np.pi))
    base = still(stage, 0.0, 0.0, radius, _angle(rng))
    track = Track(x + offset * np.cos(bearing), y + offset * np.sin(bearing), base.radius, base.angle, base.opacity)
    return (track,)


@dataclass(frozen=True)
class Opposites:
    """Two actions that consist of the same single frames."""

    forward: str
    """Template of the choreography."""
    backward: str
    """Template of its twin."""
    choreography: Choreography
    twin_is_frozen: bool = False
    """The twin repeats one frame of the forward video. Otherwise it is the forward video played backwards."""
    shapes: tuple[str, ...] = tuple(SHAPES)
    """Shapes on which the action is visible."""

    def order(self, rng: np.random.Generator, frames: int, backward: bool) -> NDArray[np.int64]:
        """Which frame of the choreography each frame of the video shows."""
        frozen = int(rng.integers(frames))
        if not backward:
            return np.arange(frames)
        return np.full(frames, frozen) if self.twin_is_frozen else np.arange(frames)[::-1]


OPPOSITES: tuple[Opposites, ...] = (
    Opposites("Moving [something] left", "Moving [something] right", _leftward),
    Opposites("Moving [something] up", "Moving [something] down", _upward),
    Opposites("Moving [something] toward the camera", "Moving [something] away from the camera", _nearing),
    Opposites("Turning [something] clockwise", "Turning [something] counter-clockwise", _turning, shapes=TURNABLE),
    Opposites("Making [something] appear", "Making [something] vanish", _appearing),
    Opposites(
        "Moving [something] and [something] closer to each other",
        "Moving [something] and [something] away from each other",
        _meeting,
    ),
    Opposites(
        "Moving [something] in a circle clockwise", "Moving [something] in a circle counter-clockwise", _circling
    ),
    Opposites("Shaking [something]", "Holding [something] still", _shaking, twin_is_frozen=True),
)

TEMPLATES: tuple[str, ...] = tuple(t for pair in OPPOSITES for t in (pair.forward, pair.backward))
"""All templates; 2k and 2k+1 are opposed. The position is the class number."""


def class_name(template: str) -> str:
    """The template without brackets, as SSv2's labels.json has it."""
    return template.replace("[", "").replace("]", "")


def fill(template: str, placeholders: list[str]) -> str:
    """The caption: each "[something]" replaced, in order."""
    caption = template
    for phrase in placeholders:
        caption = caption.replace("[something]", phrase, 1)
    return caption
