"""The result of an evaluation, as written to `evaluation.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from tubelet.config import Config, validate
from tubelet.errors import TubeletError, nearest
from tubelet_lens.results.section import Figure, Section

FEWEST_VIDEOS = 20
"""Below this many videos a share or an interval means little."""


class Coverage(Config):
    """What was looked at."""

    split: str
    clips: int
    """Clips evaluated."""
    videos: int
    """Videos they come from."""
    tokens: int
    clips_in_store: int
    failed_clips: int
    """Clips of the store that hold no activations; never read."""
    clips_with_repeated_frames: int
    """Evaluated clips of which some latent steps cover repeated frames: left out of pairs in time only."""


class Evaluation(Config):
    """Every figure of one SAE on one store, with its definition and where it comes from."""

    format: Literal["tubelet-evaluation"] = "tubelet-evaluation"
    schema_version: Literal[1] = 1
    """Raised when a reader of older files would misread a newer one; new figures do not raise it."""
    coverage: Coverage
    config: dict[str, JsonValue]
    """How the evaluation was made."""
    sae: dict[str, JsonValue]
    """Recipe and provenance of the SAE."""
    store: dict[str, JsonValue]
    """Identity and plan of the store."""
    software: dict[str, JsonValue]
    sections: tuple[Section, ...]
    not_measured: dict[str, str] = Field(default_factory=dict)
    """Topics that were requested and not measured, with what they lack."""

    @property
    def cautions(self) -> tuple[str, ...]:
        """What limits the evaluation: too few videos, topics that were not measured."""
        videos = self.coverage.videos
        few = (f"Too few videos ({videos}): below {FEWEST_VIDEOS}, shares and intervals over videos say little.",)
        by_reason: dict[str, list[str]] = {}
        for topic, reason in self.not_measured.items():
            by_reason.setdefault(reason, []).append(topic)
        missing = (f"Not measured: {', '.join(topics)}: {reason}." for reason, topics in by_reason.items())
        return (*(few if videos < FEWEST_VIDEOS else ()), *missing)

    def figures(self) -> Iterator[Figure]:
        """All figures, in the report's order."""
        for section in self.sections:
            yield from section.figures

    def figure(self, name: str) -> Figure:
        """The figure called `name`.

        Raises:
            TubeletError: there is none.
        """
        by_name = {figure.name: figure for figure in self.figures()}
        if name not in by_name:
            raise TubeletError(f"The evaluation has no figure '{name}'", nearest(name, by_name))
        return by_name[name]

    def write(self, path: Path) -> None:
        """Write as JSON; the figures carry their definitions along."""
        path.write_text(self.model_dump_json(indent=2) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Inverse of `Evaluation.write`.

    Raises:
        TubeletError: the file is missing, is not JSON, or is not an evaluation of this schema.
    """
    if not path.is_file():
        raise TubeletError(f"No evaluation at {path}", "Make one with `tubelet evaluate`")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise TubeletError(f"{path} is not valid JSON: {error}", "Run `tubelet evaluate` again") from error
    return validate(Evaluation, tree, str(path))
