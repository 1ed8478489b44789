"""A data set's root, local or remote: one listing of its files, its annotation files as text, and its videos.

No call asks about a single file: on object storage each such call is a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import fsspec
from pydantic import Field

from tubelet.config import Config
from tubelet.errors import TubeletError

VIDEO_SUFFIXES = (".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")


class DatasetBase(Config):
    """Fields of every kind of data set."""

    root: str
    """Folder of the data set: a local path, or a URL such as s3://bucket/ssv2."""
    limit: int | None = Field(default=None, ge=1)
    """Number of videos to use, from the first one; for trials. None: all."""


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a data set, before it becomes rows of the clip table.

    Attributes:
        video_id: Name within the data set.
        uri: Path relative to the data set's root, with "/"; an absolute path or URL for a video outside of it.
        label: Class number, or None.
        label_name, caption, split: Text, or None.
    """

    video_id: str
    uri: str
    label: int | None = None
    label_name: str | None = None
    caption: str | None = None
    split: str | None = None


class Root:
    """The folder `url`.

    Raises:
        TubeletError: there is no such folder.
    """

    def __init__(self, url: str) -> None:
        self.url = resolved(url)
        try:
            self._filesystem, self._path = fsspec.core.url_to_fs(self.url)
            exists = self._filesystem.isdir(self._path)
        except Exception as error:  # each file system raises its own exceptions
            raise TubeletError(
                f"Data set root {url} cannot be read: {type(error).__name__}: {error}",
                "Check the URL and the credentials in the environment",
            ) from error
        if not exists:
            raise TubeletError(f"Data set root {url} is not a folder", "Set dataset.root to the folder of the videos")

    @cached_property
    def files(self) -> list[str]:
        """Paths of all files below the root except hidden ones, relative to it, sorted."""
        if "://" in self.url:
            prefix = self._path.rstrip("/") + "/"
            paths = [path.removeprefix(prefix) for path in self._filesystem.find(self._path)]
        else:
            paths = list(_walk(self.url))
        return sorted(path for path in paths if not any(part.startswith(".") for part in path.split("/")))

    @cached_property
    def videos(self) -> list[str]:
        """The video files among `files`, by suffix."""
        return [path for path in self.files if path.lower().endswith(VIDEO_SUFFIXES)]

    @cached_property
    def by_stem(self) -> dict[str, str]:
        """The first of `videos` for each file name without suffix."""
        stems: dict[str, str] = {}
        for path in self.videos:
            stems.setdefault(stem(path), path)
        return stems

    def require_videos(self) -> list[str]:
        """`videos`, which must not be empty."""
        if not self.videos:
            raise TubeletError(
                f"No video files under {self.url}",
                f"Check dataset.root; recognized extensions: {', '.join(VIDEO_SUFFIXES)}",
            )
        return self.videos

    def read_text(self, path: str) -> str:
        """Text of the file at `path`, relative to the root or absolute."""
        try:
            with fsspec.open(resolve_uri(self.url, path), "r", encoding="utf-8-sig") as file:
                content: str = file.read()
        except FileNotFoundError as error:
            raise TubeletError(f"Annotation file {path} does not exist under {self.url}", "Check the path") from error
        except UnicodeDecodeError as error:
            raise TubeletError(f"Annotation file {path} is not UTF-8 text", "Check the path") from error
        return content


def resolved(url: str) -> str:
    """`url` without file://, ~ or a trailing slash; a local path absolute."""
    if "://" in url and not url.startswith("file://"):
        return url.rstrip("/")
    return os.path.abspath(os.path.expanduser(url.removeprefix("file://")))


def resolve_uri(root: str, uri: str) -> str:
    """Path or URL of a clip table's `uri`, given the data set's root."""
    if "://" in uri or uri.startswith("/"):
        return uri
    return f"{resolved(root)}/{uri}"


def relative_uri(root: str, uri: str) -> str:
    """`uri` relative to `root` if it is below it, else unchanged."""
    return uri.removeprefix(resolved(root) + "/")


def stem(path: str) -> str:
    """File name of `path` without its suffix."""
    return PurePosixPath(path).stem


def class_name(directory: str) -> str:
    """Class of a directory: its name, with spaces for underscores."""
    return PurePosixPath(directory).name.replace("_", " ")


def _walk(root: str) -> Iterable[str]:
    # Class folders are often symbolic links into shared storage; a link to a parent must not cause an endless loop.
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        prefix = "" if folder == root else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        yield from (prefix + name for name in names)
