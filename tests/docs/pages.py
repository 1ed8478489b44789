"""The documentation as the tests see it: its pages, and the parts of them that can be compared with the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tubelet.cli.fields import fields_of
from tubelet.cli.verb import load_verb

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

# A block that is parsed and not run has a comment above it that says why: <!-- parsed: cluster -->
_FENCE = re.compile(r"^(?:<!-- parsed: ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Snippet:
    """A piece of code on a page."""

    page: Path
    line: int
    text: str
    language: str = ""
    parsed: str = ""
    """Why it is not run here, such as `cluster` or `gpu`; empty: it runs."""

    @property
    def where(self) -> str:
        """For messages and test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(language: str, page: Path | None = None) -> list[Snippet]:
    """The fenced blocks of `language` (or of several, `bash|python`) on all pages, or on one, in order."""
    return [
        Snippet(page, text.count("\n", 0, block.start()) + 1, block[3], block[2], block[1] or "")
        for page in (PAGES if page is None else [page])
        for text in [page.read_text()]
        for block in _FENCE.finditer(text)
        if block[2] in language.split("|")
    ]


@cache
def field_names(verb: str) -> frozenset[str]:
    """Paths of the settings of a verb."""
    return frozenset(field.path for field in fields_of(load_verb(verb).config()))


def inline(page: Path) -> list[str]:
    """What stands between single backticks on `page`, outside fenced blocks."""
    return _INLINE.findall(_FENCE.sub("", page.read_text()))
