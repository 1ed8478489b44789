"""The Python on the pages is Python, and names of the public API in it exist. `make docs-run` runs it."""

from __future__ import annotations

import ast
import re

import pages
import pytest

import tubelet

FIRST_PAGES = {pages.ROOT / "README.md", pages.DOCS / "index.md"}
NOTEBOOKS = sorted((pages.DOCS / "notebooks").glob("*.py"))


def test_both_first_pages_have_an_example():
    assert {snippet.page for snippet in pages.snippets("python")} >= FIRST_PAGES


@pytest.mark.parametrize("snippet", pages.snippets("python"), ids=lambda snippet: snippet.where)
def test_an_example_names_what_exists(snippet):
    _check(snippet.text, snippet.where)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_what_exists(notebook):
    _check(notebook.read_text(), notebook.name)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_in_a_notebook_are_commands(notebook):
    from tubelet.cli.arguments import parse_arguments

    commands = re.findall(r"^# !tubelet (\w+) ([^\n>|]*?)(?: 2>.*)?$", notebook.read_text(), re.MULTILINE)
    assert commands
    from tubelet.cli.fields import fields_of
    from tubelet.cli.verb import load_verb

    for name, arguments in commands:
        verb = load_verb(name)
        _, overrides = parse_arguments(verb, arguments.split())
        assert set(overrides) <= {field.path for field in fields_of(verb.config())}


def test_every_public_name_is_in_the_reference():
    page = (pages.DOCS / "reference" / "index.md").read_text()
    assert [name for name in dir(tubelet) if not name.startswith("_") and f"::: tubelet.{name}\n" not in page] == []


def _check(text: str, where: str) -> None:
    for node in ast.walk(ast.parse(text, where)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tubelet":
            assert node.attr in dir(tubelet), (where, node.attr)


@pytest.mark.parametrize("page", sorted((pages.DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_reference_lists_exists(page):
    from pkgutil import resolve_name

    for target in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        assert resolve_name(target) is not None
