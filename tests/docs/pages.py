"""The documentation as the tests see it: its pages, and the pieces of them that can be held against the code."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

# docs/fields.py makes the tables; it is a script beside the pages, not part of a package.
sys.path.insert(0, str(DOCS))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Snippet:
    """A piece of code on a page."""

    page: Path
    line: int
    text: str

    @property
    def where(self) -> str:
        """For messages and test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(language: str) -> list[Snippet]:
    """The fenced blocks of `language` on all pages."""
    return [
        Snippet(page, text.count("\n", 0, found.start()) + 1, found[2])
        for page in PAGES
        for text in [page.read_text()]
        for found in _FENCE.finditer(text)
        if found[1] == language
    ]


def inline(page: Path) -> list[str]:
    """What stands between single backticks on `page`, outside fenced blocks."""
    return _INLINE.findall(_FENCE.sub("", page.read_text()))
