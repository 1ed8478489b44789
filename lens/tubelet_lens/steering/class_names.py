"""Which classes of a data set a readout knows: by their names, since numbers differ between checkpoint and data set.

"pushing_something" and "Pushing  something" are one class: case, underscores and spaces do not count
any other difference makes another class; the nearest name is told to the reader, never taken
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_NAMED = 8
"""Unknown names told in full."""

_LISTED = 20
"""Names of the readout told."""


def places(names: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Number in `classes` of each of `names` that is there.

    A name as it stands comes first. One that two classes would fit, if case, underscores and spaces did not count, is
    left out.
    """
    exact = {name: number for number, name in enumerate(classes)}
    alike: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        alike.setdefault(_plain(name), []).append(number)
    found = {}
    for name in names:
        of_name = [exact[name]] if name in exact else alike.get(_plain(name), [])
        if len(of_name) == 1:
            found[name] = of_name[0]
    return found


def unknown_names(names: Iterable[str], classes: Sequence[str]) -> str | None:
    """Which of `names` are not in `classes`, the nearest class of each, and what classes there are; None: all are."""
    wanted = list(dict.fromkeys(names))
    known = places(wanted, classes)
    unknown = [name for name in wanted if name not in known]
    if not unknown:
        return None
    plain = {_plain(name): name for name in classes}
    told = []
    for name in unknown[:_NAMED]:
        close = difflib.get_close_matches(_plain(name), plain, n=1)
        told.append(f"'{name}'" + (f" (nearest: '{plain[close[0]]}')" if close else ""))
    told += [f"{len(unknown) - _NAMED:,} more"] if len(unknown) > _NAMED else []
    there = [f"'{name}'" for name in classes[:_LISTED]]
    there += [f"{len(classes) - _LISTED:,} more"] if len(classes) > _LISTED else []
    return (
        f"{len(unknown):,} of the data set's {len(wanted):,} classes are not among those that are read: "
        f"{', '.join(told)}. Read are {len(classes):,} classes: {', '.join(there)}. Classes are matched by name; case, "
        "underscores and spaces do not count."
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
