"""The text of a catalog as a plain tree, parsed as `yaml.safe_load` would, with limits that are checked while parsing.

    text ─▶ parser events ─▶ dict, list, str, int, float, bool, None   and the line range of each entry

A catalog that others wrote could otherwise hold a YAML bomb (aliases of aliases), an object of an arbitrary type
(tags), or two values for one key, of which readers take different ones. None of these is needed in a catalog,
so anchors, aliases, tags and repeated keys are errors here. The tree of a text that passes is that of
`safe_load`, in a tenth of its time: only scalars that look like something else than text meet its resolver.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from tubelet.errors import TubeletError

MAX_BYTES = 64 << 20
"""Longest text read; 10,000 entries are some 7 MB."""
MAX_DEPTH = 12
"""Deepest nesting; entries need 6."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Section:
    """Line range of a top-level mapping, to insert and remove entries without touching the rest."""

    key_line: int
    """Line of its key, from 0."""
    is_block: bool = False
    """One line or more per entry, not in braces."""
    indent: int = 2
    """Column of its entries."""
    last_line: int = 0
    """Last line of its last entry (or of its key)."""
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First and last line of each entry."""


@dataclass
class Document:
    """A parsed catalog text."""

    tree: dict[str, Any]
    sections: dict[str, Section]
    braced: list[tuple[int, str]]
    """Every text with a brace in it, keys too, with its line (from 1): where Intake looks for what it evaluates."""


def parse(text: str, origin: str) -> Document:
    """The tree in `text`.

    Args:
        text: YAML.
        origin: What to call it in errors.

    Raises:
        TubeletError: it is not one YAML mapping, too long or too deep, or uses anchors, tags or repeated keys.
    """
    if len(text) > MAX_BYTES:
        raise TubeletError(f"{origin} is longer than {MAX_BYTES >> 20} MiB", "Split it into nested catalogs")
    builder = _Builder(origin)
    try:
        with _events(text) as events:
            builder.build(events)
    # ValueError: what looks like a date or a number, and is none.
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        raise TubeletError(f"{origin} is not valid YAML: {where}", "Fix the line named in the error") from error
    if not isinstance(builder.root, dict):
        raise TubeletError(f"{origin} holds no mapping", "A catalog begins with `version: 2`")
    return Document(builder.root, builder.sections, builder.braced)


@contextlib.contextmanager
def _events(text: str) -> Iterator[Iterator[Any]]:
    """As `yaml.parse` gives them, which asks twice for each."""
    parser = _LOADER(text)
    try:
        # An empty end: the parser gives None after the last event.
        with collecting_no_garbage():
            yield iter(parser.get_event, None)
    finally:
        parser.dispose()


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """No garbage collection while many objects are built and all are kept: it would take a sixth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Builder:
    """Builds the tree from events. One loop, few calls: there are a hundred events to an entry."""

    def __init__(self, origin: str) -> None:
        self.root: Any = None
        self.sections: dict[str, Section] = {}
        self.braced: list[tuple[int, str]] = []
        self._origin = origin

    def build(self, events: Iterable[Any]) -> None:
        opened: list[Any] = []  # containers that are not closed, innermost last
        keys: list[Any] = []  # of each, the key whose value comes next; _NO_KEY: a key comes next; _IN_LIST
        last: Any = None  # event at which what has been read so far ends
        documents = 0
        for event in events:
            kind = type(event)
            if kind is yaml.ScalarEvent:
                if event.tag is not None or event.anchor is not None:
                    self._refuse(event)
                last = event
                value = event.value
                if "{" in value:
                    self.braced.append((event.start_mark.line + 1, value))
                # Plain scalars may be numbers and so on; quoted ones are text.
                if value[:1] in _SUSPECT and event.implicit[0]:
                    value = _resolved(value)
                if keys and keys[-1] is _NO_KEY:
                    if type(value) is not str or value in opened[-1]:
                        self._refuse_key(value, event)
                    keys[-1] = value
                    if len(keys) <= 2:
                        self._begin(keys, event)
                    continue
            elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
                if event.tag is not None or event.anchor is not None:
                    self._refuse(event)
                if len(opened) == MAX_DEPTH:
                    self._refuse(event, f"it is nested deeper than {MAX_DEPTH} levels")
                if keys and keys[-1] is _NO_KEY:
                    self._refuse(event, "a key is not a string")
                is_mapping = kind is yaml.MappingStartEvent
                opened.append({} if is_mapping else [])
                keys.append(_NO_KEY if is_mapping else _IN_LIST)
                if len(keys) == 2 and keys[0] is not _IN_LIST:
                    self.sections[keys[0]].is_block = is_mapping and not event.flow_style
                continue
            elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
                value = opened.pop()
                keys.pop()
                # What has braces ends with one. Block containers end where the next token begins; what they hold ended
                # before.
                if event.start_mark.column != event.end_mark.column:
                    last = event
            else:
                documents += kind is yaml.DocumentStartEvent
                if kind is yaml.AliasEvent or documents > 1:
                    self._refuse(event, "it holds a second document" if documents > 1 else "")
                continue
            if not opened:
                self.root = value
            elif keys[-1] is _IN_LIST:
                opened[-1].append(value)
            else:
                key = keys[-1]
                opened[-1][key] = value
                keys[-1] = _NO_KEY
                if len(opened) == 2 and keys[0] is not _IN_LIST:
                    self._finish(self.sections[keys[0]], key, last)

    def _refuse_key(self, key: Any, event: Any) -> None:
        self._refuse(event, f"duplicate key '{key}'" if type(key) is str else f"the key {key!r} is not a string")

    def _begin(self, keys: list[Any], event: Any) -> None:
        """A section, or an entry of one, begins."""
        line = event.start_mark.line
        if len(keys) == 1:
            self.sections[keys[0]] = Section(line, last_line=line)
        elif keys[0] is not _IN_LIST and (section := self.sections[keys[0]]).is_block:
            section.indent = event.start_mark.column
            section.entries[keys[1]] = (line, line)

    def _finish(self, section: Section, key: str, last: Any) -> None:
        """An entry of a section ends."""
        if section.is_block:
            mark = last.end_mark
            # A block of text ends at the start of the line after it.
            section.last_line = mark.line if mark.column else mark.line - 1
            section.entries[key] = (section.entries[key][0], section.last_line)

    def _refuse(self, event: Any, why: str = "") -> None:
        tag = getattr(event, "tag", None)
        why = why or (f"it uses the tag {tag}" if tag else "it uses an anchor or alias")
        raise TubeletError(
            f"{self._origin}, line {event.start_mark.line + 1}: {why}",
            "A catalog is plain YAML: mappings, lists, text and numbers, each written out",
        )


class _Sentinel:
    pass


_NO_KEY, _IN_LIST = _Sentinel(), _Sentinel()

_RESOLVER = yaml.SafeLoader("")
# First characters at which a plain scalar may be something else than text; the empty scalar is null.
_SUSPECT = frozenset(first for first in yaml.SafeLoader.yaml_implicit_resolvers if first is not None)


@lru_cache(maxsize=65536)
def _resolved(text: str) -> Any:
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))
    if tag == "tag:yaml.org,2002:str":
        return text
    return _RESOLVER.construct_object(yaml.ScalarNode(tag, text))
