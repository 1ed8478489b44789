"""`tubelet completion SHELL`: a script that completes verbs, options, values and file names."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from tubelet.cli.fields import Field, fields_of
from tubelet.cli.verb import Verb, is_installed, registered
from tubelet.config import Config

_FILE_ENDINGS = ("out", "run", "store", "root", "path", "dir", "directory", "file", "folder", "catalog", "checkpoint")
"""Last words of fields that take a path."""


class CompletionConfig(Config):
    """Which shell's completion to print."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell. For the running one: `eval "$(tubelet completion bash)"`."""


def script(shell: str) -> str:
    """The completion script for `shell`, of every verb that is installed."""
    import shtab

    parser = argparse.ArgumentParser("tubelet")
    verbs = parser.add_subparsers()
    for entry in registered().values():
        if is_installed(entry):
            verb: Verb[Any] = entry.load()
            _add_options(verbs.add_parser(verb.name, help=verb.summary), verb, shtab.FILE)
    helped = verbs.add_parser("help", help="Explain a verb.")
    helped.add_argument("verb", choices=list(registered()))
    text: str = shtab.complete(parser, shell)
    return text


def _add_options(parser: argparse.ArgumentParser, verb: Verb[Any], file: Any) -> None:
    for name in ("--help-all", "--example", "--print-config"):
        parser.add_argument(name, action="store_true")
    fields = {field.path: field for field in fields_of(verb.config())}
    for field in fields.values():
        if not field.is_section:
            _add(parser, f"--{field.path}", field, file)
    for name in verb.positionals:
        _add(parser, name.removesuffix("..."), fields[name.removesuffix("...")], file)
    if verb.settings_file:
        parser.add_argument("config_yaml", nargs="*").complete = file  # type: ignore[attr-defined]


def _add(parser: argparse.ArgumentParser, name: str, field: Field, file: Any) -> None:
    # zsh takes brackets and colons for its own marks.
    meaning = field.meaning.partition(". ")[0].translate(str.maketrans("", "", "[]:`%'\"$\\"))
    optional: dict[str, Any] = {} if name.startswith("--") else {"nargs": "?"}
    action = parser.add_argument(name, help=meaning, choices=field.values or None, **optional)
    if not field.values and field.path.rpartition(".")[2].rpartition("_")[2] in _FILE_ENDINGS:
        action.complete = file  # type: ignore[attr-defined]


def _run(config: CompletionConfig) -> int:
    print(script(config.shell))
    return 0


COMPLETION = Verb(
    "completion",
    "Print a script that completes verbs and options in a shell.",
    lambda: CompletionConfig,
    _run,
    positionals=("shell",),
    settings_file=False,
)
