"""The text of a catalogue as a plain tree, parsed as `yaml.safe_load` would, with limits held while the text goes by.

    text ─▶ parser events ─▶ dict, list, str, int, float, bool, None   and the lines where each entry stands

Whoever can write a catalogue that others read could otherwise hand them a bomb (aliases of aliases), an object of a
type of his choice (tags), or two values for one key, of which each reader takes another. None of these is needed in a
catalogue, so anchors, aliases, tags and repeated keys are errors here. The tree of a text that passes is that of
`safe_load`, in a tenth of its time: only scalars that look like something else than text meet its resolver.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from tubelet_store.errors import TubeletError

MAX_BYTES = 64 << 20
"""Longest text read; 10,000 entries are some 7 MB."""
MAX_DEPTH = 12
"""Deepest nesting; entries need 6."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Section:
    """Where a top-level mapping stands in the text, to insert and remove entries without touching the rest."""

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
    """A parsed catalogue text."""

    tree: dict[str, Any]
    sections: dict[str, Section]


def parse(text: str, origin: str) -> Document:
    """The tree in `text`.

    Args:
        text: YAML.
        origin: What to call it in errors.

    Raises:
        TubeletError: it is not one YAML mapping, or longer, deeper or cleverer than a catalogue needs to be.
    """
    if len(text) > MAX_BYTES:
        raise TubeletError(f"{origin} is longer than {MAX_BYTES >> 20} MiB", "Split it into nested catalogues")
    builder = _Builder(origin)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.take(event)
    # ValueError: what looks like a date or a number, and is none.
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())
        raise TubeletError(f"{origin} is not valid YAML: {where}", "Mend the line it names") from error
    if not isinstance(builder.root, dict):
        raise TubeletError(f"{origin} holds no mapping", "A catalogue begins with `version: 2`")
    return Document(builder.root, builder.sections)


class _Builder:
    """Builds the tree from events; `_open` holds the containers that are not closed, innermost last."""

    def __init__(self, origin: str) -> None:
        self.root: Any = None
        self.sections: dict[str, Section] = {}
        self._origin = origin
        self._open: list[Any] = []
        self._keys: list[Any] = []
        self._documents = 0
        self._last: Any = None
        self._steps = {
            yaml.ScalarEvent: self._scalar,
            yaml.MappingStartEvent: self._mapping,
            yaml.SequenceStartEvent: self._sequence,
            yaml.MappingEndEvent: self._close,
            yaml.SequenceEndEvent: self._close,
            yaml.AliasEvent: self._alias,
            yaml.DocumentStartEvent: self._document,
        }

    def take(self, event: Any) -> None:
        step = self._steps.get(type(event))
        if step is not None:
            step(event)

    def _scalar(self, event: Any) -> None:
        if event.tag is not None or event.anchor is not None:
            self._refuse(event)
        text = event.value
        # Plain scalars may be numbers and so on; quoted ones are text.
        value = _resolved(text) if event.implicit[0] and text[:1] in _SUSPECT else text
        self._last = event
        if self._open and self._keys[-1] is _NO_KEY:
            self._set_key(value, event)
        else:
            self._place(value)

    def _set_key(self, value: Any, event: Any) -> None:
        if not isinstance(value, str):
            self._refuse(event, f"the key {value!r} is no text")
        if value in self._open[-1]:
            self._refuse(event, f"the key '{value}' stands twice")
        self._keys[-1] = value
        depth = len(self._open)
        if depth == 1:
            self.sections[value] = Section(event.start_mark.line, last_line=event.start_mark.line)
        elif depth == 2 and (section := self.sections[self._keys[0]]).is_block:
            section.indent = event.start_mark.column
            section.entries[value] = (event.start_mark.line, event.end_mark.line)

    def _place(self, value: Any) -> None:
        if not self._open:
            self.root = value
            return
        container = self._open[-1]
        if type(container) is list:
            container.append(value)
        else:
            key = self._keys[-1]
            container[key] = value
            self._keys[-1] = _NO_KEY
            if len(self._open) == 2 and (section := self.sections[self._keys[0]]).is_block:
                mark = self._last.end_mark
                # A block of text ends at the start of the line after it.
                section.last_line = mark.line if mark.column else mark.line - 1
                section.entries[key] = (section.entries[key][0], section.last_line)

    def _mapping(self, event: Any) -> None:
        self._enter(event, {}, _NO_KEY)
        if len(self._open) == 2 and isinstance(self._open[0], dict):
            self.sections[self._keys[0]].is_block = not event.flow_style

    def _sequence(self, event: Any) -> None:
        self._enter(event, [], _IN_LIST)

    def _enter(self, event: Any, container: Any, key: Any) -> None:
        if event.tag is not None or event.anchor is not None:
            self._refuse(event)
        if len(self._open) == MAX_DEPTH:
            self._refuse(event, f"it is nested deeper than {MAX_DEPTH} levels")
        if self._keys and self._keys[-1] is _NO_KEY:
            self._refuse(event, "a key is no text")
        self._open.append(container)
        self._keys.append(key)

    def _close(self, event: Any) -> None:
        container = self._open.pop()
        self._keys.pop()
        # What has braces ends with one. Block containers end where the next token begins; what they hold ended before.
        if event.start_mark.column != event.end_mark.column:
            self._last = event
        self._place(container)

    def _alias(self, event: Any) -> None:
        self._refuse(event)

    def _document(self, event: Any) -> None:
        self._documents += 1
        if self._documents > 1:
            self._refuse(event, "it holds a second document")

    def _refuse(self, event: Any, why: str = "") -> None:
        tag = getattr(event, "tag", None)
        why = why or (f"it uses the tag {tag}" if tag else "it uses an anchor or alias")
        raise TubeletError(
            f"{self._origin}, line {event.start_mark.line + 1}: {why}",
            "A catalogue is plain YAML: mappings, lists, text and numbers, each written out",
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
