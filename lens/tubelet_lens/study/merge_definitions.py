"""What a column of a table is, told once for all cells.

Every figure carries its own definition, with numbers of its own cell in it (clips, a chosen penalty). Definitions that
are alike but for some words become one, with the words of each in braces:

    "... penalty (chosen: 0.01) ..."  and  "... penalty (chosen: 0.1) ..."  ─▶  "... penalty (chosen: {0.01 | 0.1}) ..."

Those that say something else stay apart, each with the cells for which it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ALIKE = 0.7
"""Share of words that definitions have in common to be one."""

_SHOWN = 4
"""Different words shown at one place."""

# Between words, kept: spaces and the marks around a word, but not the point and the comma inside a number.
_BETWEEN = re.compile(r"(\s|[();:]|[.,](?=\s|$))")


def merged(told: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The definitions of one column, from (name of the cell, its definition) of all cells."""
    cells_of: dict[str, list[str]] = {}
    for cell, definition in told:
        cells_of.setdefault(definition, []).append(cell)
    groups: list[list[str]] = []
    for definition in cells_of:
        alike = next((group for group in groups if _alike(group[0], definition)), None)
        if alike is None:
            groups.append([definition])
        else:
            alike.append(definition)
    if len(groups) == 1:
        return (_one(groups[0]),)
    return tuple(
        f"{', '.join(cell for definition in group for cell in cells_of[definition])}: {_one(group)}" for group in groups
    )


def _alike(one: str, other: str) -> bool:
    words, others = _BETWEEN.split(one), _BETWEEN.split(other)
    same = sum(a == b for a, b in zip(words, others, strict=False))
    return len(words) == len(others) and same >= _ALIKE * len(words)


def _one(definitions: Sequence[str]) -> str:
    places = zip(*(_BETWEEN.split(definition) for definition in definitions), strict=True)
    return "".join(_word(tuple(dict.fromkeys(words))) for words in places)


def _word(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    more = " | …" if len(words) > _SHOWN else ""
    return f"{{{' | '.join(words[:_SHOWN])}{more}}}"
