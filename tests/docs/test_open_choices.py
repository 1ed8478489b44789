"""The page of choices that papers leave open lists every tag in the code, with a reason; no other page has the tag."""

from __future__ import annotations

from importlib.metadata import entry_points

import hooks
import pages
import pytest

PAGE = pages.DOCS / "papers-leave-open.md"


def test_every_tag_in_the_code_is_on_the_page():
    sources = [path for package in hooks.PACKAGES for path in (pages.ROOT / package).rglob("*.py")]
    in_code = sum(path.read_text().count(hooks.TAG) for path in sources)
    listed = hooks.open_choices()
    assert in_code > 20
    assert len(listed) == in_code
    assert "<!-- open-choices -->" in PAGE.read_text()


@pytest.mark.parametrize("choice", hooks.open_choices(), ids=lambda choice: f"{choice.path.name}:{choice.line}")
def test_a_choice_is_explained(choice):
    assert len(choice.text.split()) >= 8
    assert "[" not in choice.text.split()


def test_no_other_page_and_no_help_text_has_the_tag():
    from tubelet.cli.fields import fields_of
    from tubelet.cli.verb import load_verb

    tagged = {page.name for page in pages.PAGES if hooks.TAG in page.read_text()}
    assert tagged == {PAGE.name, "CONTRIBUTING.md"}
    verbs = [load_verb(name) for name in entry_points(group="tubelet.verbs").names]
    in_help = {field.path for verb in verbs for field in fields_of(verb.config()) if hooks.TAG in field.meaning}
    assert in_help == set()


def test_nothing_refers_to_notes_that_are_not_in_the_repository():
    sources = [path for package in ("tubelet", *hooks.PACKAGES) for path in (pages.ROOT / package).rglob("*.py")]
    found = {
        str(path.relative_to(pages.ROOT)): words
        for path in [*sources, *pages.PAGES]
        for words in ("science note", "Paper A", "Paper B", "../shared")
        if words.lower() in path.read_text().lower()
    }
    assert found == {}
