"""Refreshes the settings tables of the pages: `python docs/fields.py`.

A table stands between `<!-- fields:VERB -->` and `<!-- /fields -->` and is made from the verb's own model, from which
`tubelet VERB --help` is printed too.
"""

from __future__ import annotations

import re
from pathlib import Path

from tubelet.cli.fields import REQUIRED, Field, fields_of
from tubelet.cli.verb import load_verb

PAGES = Path(__file__).parent / "verbs"
_TABLE = re.compile(r"(<!-- fields:(\w+) -->\n).*?(<!-- /fields -->)", re.DOTALL)


def table(name: str) -> str:
    """Markdown table of the settings of verb `name`."""
    rows = [_row(field) for field in fields_of(load_verb(name).config())]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *rows]) + "\n"


def refresh(page: str) -> str:
    """`page` with each of its tables as the code has it."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", page)


def _row(field: Field) -> str:
    meaning = field.meaning
    if field.values:
        meaning += f" One of {', '.join(f'`{value}`' for value in field.values)}."
    if field.kinds:
        meaning = f"({' or '.join(field.kinds)}) {meaning}"
    if field.is_section:
        meaning = f"**{meaning.removesuffix('.')}**"
    # A bar would end the cell.
    meaning = meaning.replace("|", "\\|")
    default = f"`{field.default}`" if field.default not in ("", REQUIRED) else field.default
    return f"| `{field.path}` | {default} | {meaning} |"


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(refresh(path.read_text()))
