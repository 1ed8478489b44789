"""Help texts: the list of verbs, and the fields of one verb, wrapped to the terminal's width."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from tubelet.cli.verb import Verb, is_installed

if TYPE_CHECKING:
    from tubelet.cli.fields import Field

_GROUPS = {
    "tubelet_pipeline": "Extract activations",
    "tubelet_store": "Use and share stores",
    "tubelet_trainer": "Train",
    "tubelet_lens": "Analyze",
}
"""Heading of the verbs of each package, in order; those of other packages come last."""

_SHORT_HELP_FIELDS = 16
"""With more fields, `--help` shows the common ones only."""
_NAME_WIDTH = 26
_WIDEST = 110


def overview(available: dict[str, EntryPoint]) -> str:
    """Every verb with its summary, by package; those whose extra is missing are named at the end."""
    lines = [*_wrapped("Cache activations of frozen video backbones, train sparse autoencoders on them, analyze them.")]
    lines += ["", "usage: tubelet VERB [CONFIG.yaml] [--field value ...]"]
    shown = [entry for entry in available.values() if is_installed(entry)]
    packages = {entry.name: entry.module.partition(".")[0] for entry in shown}
    for package, heading in {**_GROUPS, **{name: "More" for name in packages.values() if name not in _GROUPS}}.items():
        verbs = [entry.load() for entry in shown if packages[entry.name] == package]
        if verbs:
            lines += ["", f"{heading}:", *_two_columns((verb.name, verb.summary) for verb in verbs)]
    hidden = [entry for entry in available.values() if entry not in shown]
    if hidden:
        missing = ((entry.name, f"pip install 'tubelet[{entry.extras[0]}]'") for entry in hidden)
        lines += ["", "Not installed here:", *_two_columns(missing)]
    lines += [
        "",
        *_two_columns(
            (
                ("tubelet help VERB", "Common options of a verb; also `tubelet VERB --help`."),
                ("tubelet VERB --help-all", "All options."),
                ("tubelet VERB --example", "A commented configuration that runs on the demo's data."),
                ("tubelet VERB --print-config", "The configuration that would run, defaults included."),
            ),
            30,
        ),
    ]
    return "\n".join(lines)


def usage(verb: Verb[Any], all_fields: bool) -> str:
    """How to call `verb`, and its fields: the common ones, or all."""
    from tubelet.cli.fields import fields_of

    model = verb.config()
    fields = fields_of(model)
    words = [name.upper() for name in verb.positionals]
    call = " ".join(
        ["usage: tubelet", verb.name, *words, *["[CONFIG.yaml]"] * verb.settings_file, "[--field value ...]"]
    )
    lines = [call, "", *_wrapped(verb.summary), ""]
    if all_fields or len(fields) <= _SHORT_HELP_FIELDS or not model.COMMON:
        return "\n".join([*lines, "Options:", *describe_fields(fields)])
    common = [field for path in model.COMMON for field in fields if field.path == path]
    lines += ["Common options:", *describe_fields(common)]
    sections = [field for field in fields if field.is_section and "." not in field.path]
    others = sum(not field.is_section for field in fields) - len(common)
    lines += ["", f"{others} more options, with `tubelet {verb.name} --help-all`; in sections:"]
    lines += _two_columns((f"--{field.path}.…", field.meaning) for field in sections)
    return "\n".join(lines)


def describe_fields(fields: Iterable[Field]) -> Iterator[str]:
    """Lines for `fields`: name, meaning, values, the kinds that have it, default; sections are headings."""
    for field in fields:
        if field.is_section and not field.values:
            yield from ("", *_two_columns([(f"--{field.path}.…", field.meaning)]))
            continue
        meaning = field.meaning
        if field.values:
            meaning += f" One of {', '.join(field.values)}."
        if field.kinds:
            meaning = f"[{' or '.join(field.kinds)}] {meaning}"
        if field.is_required:
            meaning += " (required)"
        elif field.default not in ("", "null", "[]", "{}"):
            meaning += f" (default: {field.default})"
        yield from _two_columns([(f"--{field.path}", meaning)])


def _two_columns(rows: Iterable[tuple[str, str]], width: int = _NAME_WIDTH) -> list[str]:
    lines = []
    width = min(width, _columns() // 2 - 2)
    for name, text in rows:
        head = f"  {name}"
        first, *more = _wrapped(text, indent=width + 2) or [""]
        if len(head) > width:
            lines += [head, first] if first else [head]
        else:
            lines.append(f"{head.ljust(width + 2)}{first.strip()}".rstrip())
        lines += more
    return lines


def _wrapped(text: str, indent: int = 0) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(
        text,
        _columns(),
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _columns() -> int:
    return max(40, min(shutil.get_terminal_size().columns, _WIDEST))
