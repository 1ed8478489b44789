"""A scene: everything that determines the frames of one video, drawn from (seed, index) only.

Indices 2k and 2k+1 are twins: they share background, objects, camera noise and choreography. So a data set is a prefix
of every longer one, classes are balanced after every 16 videos, and opposed classes consist of the same frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tubelet_pipeline.synthetic.actions import OPPOSITES, TEMPLATES, Stage, Track, fill, still
from tubelet_pipeline.synthetic.appearance import (
    BACKGROUND_COLORS,
    BACKGROUND_PATTERNS,
    OBJECT_COLORS,
    REACH,
    SHAPES,
    TEXTURES,
    backgrounds_for,
    paint,
)

BYSTANDER_SHARE = 0.4
"""Share of one-object scenes with a second object at rest: the objects in view must not reveal which one moves."""


@dataclass(frozen=True)
class Look:
    """Appearance of an object."""

    shape: str
    color: str
    texture: str
    second_tone_is_light: bool

    @property
    def phrase(self) -> str:
        """The object as a caption names it, such as "a red striped circle"."""
        words = f"{self.color} {self.shape}" if self.texture == "plain" else f"{self.color} {self.texture} {self.shape}"
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True, eq=False)
class Actor:
    """An object and its track."""

    look: Look
    track: Track


@dataclass(frozen=True, eq=False)
class Scene:
    """One video before rendering."""

    template: str
    actors: tuple[Actor, ...]
    """Mask value v is actor v - 1. The objects of the placeholders come first, a bystander last."""
    placeholders: tuple[str, ...]
    background_HWC: NDArray[np.float32]
    """Still background, 0..255."""
    order: NDArray[np.int64]
    """Frame of the choreography (and of the camera noise) that each frame shows, [frames]."""
    noise_seed: tuple[int, ...]

    @property
    def label(self) -> int:
        """Class number, the template's place in `TEMPLATES`."""
        return TEMPLATES.index(self.template)

    @property
    def caption(self) -> str:
        """The template with its placeholders filled."""
        return fill(self.template, list(self.placeholders))


def scene_at(seed: int, index: int, frames: int, height: int, width: int) -> Scene:
    """The scene of video `index` (0, 1, 2, ...): a pure function of its arguments."""
    twins, backward = divmod(index, 2)
    pair = OPPOSITES[twins % len(OPPOSITES)]
    rng = np.random.default_rng([seed, twins])
    short = min(height, width)
    stage = Stage(frames, width / short / 2, height / short / 2)

    tracks = pair.choreography(rng, stage)
    looks = _looks(rng, len(tracks) + 1, pair.shapes)
    actors = [Actor(look, track) for look, track in zip(looks, tracks, strict=False)]
    placeholders = tuple(actor.look.phrase for actor in actors)
    if len(tracks) == 1 and rng.random() < BYSTANDER_SHARE:
        actors.append(Actor(looks[-1], _bystander(rng, stage, tracks[0])))

    fit = backgrounds_for([OBJECT_COLORS[actor.look.color] for actor in actors])
    color = BACKGROUND_COLORS[int(rng.choice(fit))]
    background = paint(rng, str(rng.choice(list(BACKGROUND_PATTERNS))), color, height, width)
    return Scene(
        template=pair.backward if backward else pair.forward,
        actors=tuple(actors),
        placeholders=placeholders,
        background_HWC=background,
        order=pair.order(rng, frames, bool(backward)),
        noise_seed=(seed, twins, 1),
    )


def _looks(rng: np.random.Generator, count: int, shapes: tuple[str, ...]) -> list[Look]:
    """Looks of different colors; the first is one of `shapes`."""
    colors = rng.permutation(list(OBJECT_COLORS))
    kinds = [str(rng.choice(list(shapes if i == 0 else SHAPES))) for i in range(count)]
    textures = rng.choice(list(TEXTURES), count)
    return [
        Look(shape, str(color), str(texture), bool(rng.random() < 0.5))
        for shape, color, texture in zip(kinds, colors, textures, strict=False)
    ]


def _bystander(rng: np.random.Generator, stage: Stage, mover: Track) -> Track:
    """A small object at rest, at the one of eight random places that is farthest from the moving object's path."""
    radius = float(rng.uniform(0.08, 0.11))
    places = [stage.place(rng, radius * REACH, radius * REACH) for _ in range(8)]
    x, y = max(places, key=lambda p: float(np.min(np.hypot(mover.x - p[0], mover.y - p[1]) - mover.radius)))
    return still(stage, x, y, radius, float(rng.uniform(0, 2 * np.pi)))
