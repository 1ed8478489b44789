"""Every verb has a page with a table of its settings, which the site's build fills from the code."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

import hooks
import pages
import pytest

from tubelet.cli.fields import fields_of
from tubelet.cli.verb import load_verb

VERBS = sorted(entry_points(group="tubelet.verbs").names)
FILES = (".json", ".parquet", ".pt", ".safetensors", ".yaml")


def test_a_page_is_filled_with_the_settings_of_its_verb():
    filled = hooks.on_page_markdown("before\n<!-- fields:train -->\nafter")
    rows = [line for line in filled.splitlines() if line.startswith("| `")]
    assert len(rows) == len(fields_of(load_verb("train").config()))
    assert any(row.startswith("| `sae.k` | `32` |") for row in rows)
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter")


def test_a_table_can_leave_out_what_another_verb_has():
    table = hooks.fields_table("estimate", "extract")
    assert "`calibration_clips`" in table
    assert "`sampling.frames`" not in table


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_a_verb_has_its_settings(verb):
    text = (pages.DOCS / "verbs" / f"{verb}.md").read_text()
    assert re.search(rf"^<!-- fields:{verb}( not:\w+)? -->$", text, re.MULTILINE)


def test_every_marker_on_a_page_is_filled():
    for page in pages.PAGES:
        for marker in re.findall(r"^<!-- (?!parsed: ).* -->$", page.read_text(), re.MULTILINE):
            assert hooks.on_page_markdown(marker) != marker, (page.name, marker)


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_has_a_meaning(verb):
    assert [field.path for field in fields_of(load_verb(verb).config()) if not field.meaning] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_names_only_fields_that_exist(verb):
    """`decode.backend` in running text is a field, if its first part is a section of any verb."""
    known = {path for name in VERBS for path in pages.field_names(name)}
    sections = {path.partition(".")[0] for path in known if "." in path}
    named = {
        word.partition(":")[0]
        for word in pages.inline(pages.DOCS / "verbs" / f"{verb}.md")
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(: \w+)?", word)
        and word.partition(".")[0] in sections
        and not word.endswith(FILES)
    }
    assert named - known == set()


def test_the_navigation_has_every_page():
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    sources = [*pages.DOCS.rglob("*.md"), *(pages.DOCS / "notebooks").glob("*.py")]
    names = [str(page.relative_to(pages.DOCS)) for page in sources]
    assert [name for name in names if name not in navigation] == []
