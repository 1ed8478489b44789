"""Refreshes the settings tables of the pages: `python docs/fields.py`.

A table stands between `<!-- fields:VERB -->` and `<!-- /fields -->` and is made from the verb's own model, from which
`tubelet VERB --help` is printed too.
"""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tubelet_store.cli import Verb
from tubelet_store.fields import REQUIRED, Field, fields_of

PAGES = Path(__file__).parent / "verbs"
_TABLE = re.compile(r"(<!-- fields:(\w+) -->\n).*?(<!-- /fields -->)", re.DOTALL)

# Defaults that the machine decides, said in words.
_COMPUTED = {("extract", "cluster.workers"): "half the cores"}


def load_verb(name: str) -> Verb[Any]:
    """The verb called `name`."""
    verb: Verb[Any] = entry_points(group="tubelet.verbs")[name].load()
    return verb


def table(name: str) -> str:
    """Markdown table of the settings of verb `name`."""
    rows = [_row(name, field) for field in fields_of(load_verb(name).config())]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows]) + "\n"


def refresh(page: str) -> str:
    """`page` with each of its tables as the code has it."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", page)


def _row(verb: str, field: Field) -> str:
    meaning = field.meaning
    if field.values:
        meaning += f" One of {', '.join(f'`{value}`' for value in field.values)}."
    if field.kinds:
        meaning = f"({' or '.join(field.kinds)}) {meaning}"
    if field.is_section:
        meaning = f"**{meaning.removesuffix('.')}**"
    default = _COMPUTED.get((verb, field.path)) or (field.default if field.default == REQUIRED else _code(field.default))
    return f"| `{field.path}` | {default} | {_escape(meaning)} |"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(refresh(path.read_text()))
