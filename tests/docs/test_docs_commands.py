"""A command on a page is a command: its verb exists, and its options are fields of that verb."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points

import pages
import pytest
import yaml

from tubelet.cli.arguments import parse_arguments
from tubelet.cli.verb import load_verb
from tubelet.config import validate

NAMES = entry_points(group="tubelet.verbs").names
REQUIRED = {
    "extract": {
        "dataset": {"kind": "folder", "root": "videos"},
        "sampling": {"kind": "dense", "frames": 16},
        "backbone": {"id": "model"},
        "hooks": ["blocks.-1"],
        "store": "store.zarr",
    }
}
"""What a part of a configuration is completed with."""
_SWITCHES = {"--help", "--help-all", "--example", "--print-config", "--version", "help"}


def _commands() -> list[tuple[str, str]]:
    found = []
    for snippet in pages.snippets("bash"):
        for line in snippet.text.splitlines():
            # With `torchrun` before it, too.
            words = re.sub(r"^torchrun .* tubelet", "tubelet", line.partition(" #")[0].strip())
            if words.startswith("tubelet "):
                found.append((snippet.where, words))
    for page in pages.PAGES:
        # `tubelet VERB ...` speaks of verbs in general.
        found += [(page.name, words) for words in pages.inline(page) if re.match(r"tubelet (--)?[a-z]", words)]
    return found


@pytest.mark.parametrize(("where", "command"), _commands(), ids=lambda text: text.replace("/", "_"))
def test_the_verb_exists_and_its_options_are_fields(where, command):
    _, name, *arguments = shlex.split(command.partition(" > ")[0])
    if name in _SWITCHES:
        return
    assert name in NAMES
    verb = load_verb(name)
    _, overrides = parse_arguments(verb, [word for word in arguments if word not in _SWITCHES])
    assert set(overrides) <= pages.field_names(name)


@pytest.mark.parametrize("snippet", [s for s in pages.snippets("bash") if s.parsed], ids=lambda s: s.where)
def test_the_configuration_of_a_command_that_is_not_run_is_on_its_page(snippet):
    """So that it is parsed: for `tubelet extract NAME.yaml` a block, maybe a generated one, begins with # NAME.yaml."""
    from hooks import on_page_markdown

    files = re.findall(r"^(?:torchrun .*)?tubelet \w+ ([\w-]+\.yaml)", snippet.text, re.MULTILINE)
    page = on_page_markdown(snippet.page.read_text())
    assert [file for file in files if f"# {file}" not in page and file not in ("extract.yaml", "job.yaml")] == []


def test_there_are_commands_for_every_verb():
    assert {command.split()[1] for _, command in _commands()} >= set(NAMES)


@pytest.mark.parametrize("snippet", pages.snippets("yaml"), ids=lambda snippet: snippet.where)
def test_a_configuration_on_a_page_is_valid(snippet):
    """Its first line names the file, `# VERB....yaml` or `# part of VERB.yaml`, and so the verb."""
    named = re.match(r"# (part of )?(\w+)[\w-]*\.yaml", snippet.text)
    assert named is not None, "say which file it is: # extract-something.yaml"
    rest = REQUIRED[named[2]] if named[1] else {}
    config = validate(load_verb(named[2]).config(), {**rest, **yaml.safe_load(snippet.text)}, snippet.where)
    assert config is not None


@pytest.mark.parametrize("snippet", pages.snippets("bash"), ids=lambda snippet: snippet.where)
def test_make_targets_exist(snippet):
    targets = re.findall(r"^([a-z-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in snippet.text.splitlines():
        if line.startswith("make "):
            assert line.split()[1] in targets


def test_extras_exist():
    pyproject = (pages.ROOT / "pyproject.toml").read_text()
    for page in pages.PAGES:
        for extra in re.findall(r"(?:tubelet|\.)\[(\w+)\]", page.read_text()):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), (page.name, extra)
