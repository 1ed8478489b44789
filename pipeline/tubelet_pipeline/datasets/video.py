"""One video of a data set, before it becomes rows of the clip table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Video:
    """A video and what is known of it.

    Attributes:
        video_id: Name within the data set.
        uri: Path relative to the data set's root, "/" between its parts; a whole path or URL where it lies outside.
        label: Class number; None where there is none.
        label_name, caption, split: None where there is none.
    """

    video_id: str
    uri: str
    label: int | None = None
    label_name: str | None = None
    caption: str | None = None
    split: str | None = None
