"""A settings table says what the code says: the page as it is equals the page made anew."""

from __future__ import annotations

import re
from importlib.metadata import entry_points

import pages
import pytest

VERBS = sorted(entry_points(group="tubelet.verbs").names)
FILES = (".json", ".pt", ".safetensors", ".yaml")


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_of_a_verb_is_what_its_model_says(verb):
    from fields import refresh

    page = (pages.DOCS / "verbs" / f"{verb}.md").read_text()
    assert f"<!-- fields:{verb} -->" in page
    assert page == refresh(page), "run `python docs/fields.py`"


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_has_a_meaning(verb):
    from tubelet.cli.fields import fields_of
    from tubelet.cli.verb import load_verb

    assert [field.path for field in fields_of(load_verb(verb).config()) if not field.meaning] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_names_only_fields_that_exist(verb):
    """`decode.backend` in running text is a field, if its first part is a section of any verb."""
    from tubelet.cli.fields import fields_of
    from tubelet.cli.verb import load_verb

    known = {field.path for name in VERBS for field in fields_of(load_verb(name).config())}
    sections = {path.partition(".")[0] for path in known if "." in path}
    named = {
        word.partition(":")[0]
        for word in pages.inline(pages.DOCS / "verbs" / f"{verb}.md")
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+(: \w+)?", word)
        and word.partition(".")[0] in sections
        and not word.endswith(FILES)
    }
    assert named - known == set()


def test_the_navigation_has_a_page_for_every_verb():
    navigation = (pages.ROOT / "mkdocs.yml").read_text()
    assert [verb for verb in VERBS if f"verbs/{verb}.md" not in navigation] == []
