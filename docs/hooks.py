"""What the pages take from the code while the site is built: MkDocs calls `on_page_markdown` for every page.

A page marks the place, and the code fills it, so that no table can say something else than the code:

    <!-- fields:VERB -->              settings of a verb, from the model that `tubelet VERB --help` is printed from
    <!-- fields:VERB not:OTHER -->    those that OTHER does not have
    <!-- backbones -->                families of backbones with a published checkpoint of each
    <!-- backbone:FAMILY -->          facts about that checkpoint and a configuration of `tubelet extract`
    <!-- open-choices -->             every choice of ours that a paper leaves open: the text around each [RECON] tag
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.cli.fields import REQUIRED, Field, fields_of
from tubelet.cli.verb import load_verb

ROOT = Path(__file__).parents[1]
PACKAGES = {"store": "Store", "pipeline": "Pipeline", "trainer": "Trainer", "lens": "Lens"}
TAG = "[RECON"
_MARKER = re.compile(r"^<!-- (fields|backbones|backbone|open-choices)(?::(\w+))?(?: not:(\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """`markdown` with its markers replaced; the name and the signature are MkDocs'."""
    return _MARKER.sub(lambda marker: _generate(marker[1], marker[2], marker[3]), markdown)


def _generate(what: str, name: str | None, without: str | None) -> str:
    if what == "fields":
        return fields_table(name or "", without)
    if what == "backbone":
        return backbone_section(name or "")
    return backbones_table() if what == "backbones" else open_choices_list()


# Settings of verbs


def fields_table(name: str, without: str | None = None) -> str:
    """Markdown table of the settings of verb `name`, without those that the verb `without` has too."""
    known = {field.path for field in fields_of(load_verb(without).config())} if without else set()
    fields = [field for field in fields_of(load_verb(name).config()) if field.path not in known]
    return "\n".join(["| field | default | meaning |", "|---|---|---|", *map(_field_row, fields)]) + "\n"


def _field_row(field: Field) -> str:
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


# Backbones


def backbones_table() -> str:
    """Markdown table of the families, with links to their pages."""
    from tubelet_pipeline.backbones.reference import REFERENCE_CHECKPOINTS

    rows = [
        f"| [{each.title}]({family}.md) | `{each.checkpoint}` | {each.layers} | {each.width} | {_grid(each)} | "
        f"{each.special_tokens or ''} |"
        for family, each in REFERENCE_CHECKPOINTS.items()
    ]
    header = "| family | a published checkpoint | blocks | channels | tokens of a clip | special tokens |"
    return "\n".join([header, "|---|---|---|---|---|---|", *rows]) + "\n"


def backbone_section(family: str) -> str:
    """Facts about the published checkpoint of `family`, and a configuration of `tubelet extract` for it."""
    from tubelet_pipeline.backbones.reference import REFERENCE_CHECKPOINTS
    from tubelet_pipeline.backbones.registry import FAMILIES

    each = REFERENCE_CHECKPOINTS[family]
    hooks = [f"`blocks.0` to `blocks.{each.layers - 1}`"]
    if each.block_parts:
        hooks.append("`blocks.I.attn` and `blocks.I.mlp`")
    if each.final_norm:
        hooks.append("`final_norm`")
    clip_bytes = each.grid[0] * each.grid[1] * each.grid[2] * each.width * 2
    facts = [
        ("paper", each.paper),
        ("`model_type` of the checkpoints", ", ".join(f"`{name}`" for name in FAMILIES[family].model_types)),
        ("published checkpoint", f"`{each.checkpoint}`: {each.layers} blocks, {each.width} channels"),
        ("input", f"{each.frames} frames of {each.image} x {each.image} pixels"),
        ("a token", f"{each.tubelet_frames} frame(s) of {each.patch} x {each.patch} pixels"),
        ("tokens of a clip", _grid(each)),
        ("special tokens", str(each.special_tokens or "none")),
        ("hooks", ", ".join(hooks)),
        ("size in a store", f"{clip_bytes / 1e6:.1f} MB per clip and hook"),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts), ""]
    if each.note:
        lines += [each.note, ""]
    lines += ["```yaml", f"# extract-{family}.yaml", each.extract_yaml().rstrip(), "```", ""]
    return "\n".join(lines)


def _grid(each: Any) -> str:
    time, height, width = each.grid
    return f"{time} x {height} x {width} = {time * height * width:,}"


# Choices that the papers leave open


@dataclass(frozen=True)
class OpenChoice:
    """A place in the code where a paper leaves something open and we chose."""

    path: Path
    """Relative to the repository."""
    line: int
    name: str
    """The class, function or field it belongs to; empty for the module."""
    text: str
    """What was chosen and why, without the tag."""


def open_choices() -> list[OpenChoice]:
    """All of them, by package, file and line."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [choice for path in paths for choice in _choices_in(path)]


def open_choices_list() -> str:
    """Markdown list of them, under a heading per package."""
    choices = open_choices()
    lines: list[str] = []
    for package, title in PACKAGES.items():
        lines += [f"### {title}", ""]
        for choice in choices:
            if choice.path.parts[0] == package:
                module = ".".join(choice.path.with_suffix("").parts[1:])
                where = f"{module}.{choice.name}" if choice.name else module
                lines.append(f"- `{where}`  \n  {_escape(choice.text)}")
        lines.append("")
    return "\n".join(lines)


def _choices_in(path: Path) -> list[OpenChoice]:
    source = path.read_text()
    if TAG not in source:
        return []
    found = [
        OpenChoice(path.relative_to(ROOT), line, name, _paragraph(text))
        for line, name, text in (*_docstrings(ast.parse(source)), *_comments(source))
        if TAG in text
    ]
    return sorted(found, key=lambda choice: choice.line)


def _docstrings(tree: ast.AST, name: str = "") -> Iterator[tuple[int, str, str]]:
    """Line, name and text of every paragraph of the docstrings in `tree`, those below fields included."""
    last_field = ""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            owner = ".".join(part for part in (name, last_field) if part)
            lines = textwrap.dedent("\n" + node.value.value).strip("\n")
            for paragraph in re.split(r"\n\s*\n", lines):
                yield node.lineno, owner, paragraph
        last_field = ""
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last_field = node.target.id
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(node, f"{name}.{node.name}".lstrip("."))


def _comments(source: str) -> Iterator[tuple[int, str, str]]:
    """Line and text of every block of comment lines, with the name that the line below assigns."""
    lines = source.splitlines()
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            block.append(token.string.lstrip("# "))
            end = token.end[0]
        elif block and token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT):
            below = lines[end].split() if end < len(lines) else []
            name = below[0].rstrip(":") if len(below) > 1 and below[1] == "=" else ""
            yield end, name, "\n".join(block)
            block = []


def _paragraph(text: str) -> str:
    """`text` on one line, without the tag."""
    one_line = " ".join(text.split())
    # What stands behind a tag that ends a sentence begins the next one.
    one_line = re.sub(r"(^|\. )\[RECON\] ([a-z])", lambda tag: tag[1] + tag[2].upper(), one_line)
    one_line = re.sub(r"\s*\[RECON(?:: ([^\]]*))?\]", lambda tag: f" ({tag[1]})" if tag[1] else "", one_line)
    return re.sub(r"\s+([.,:;])", r"\1", one_line).strip()


def _escape(text: str) -> str:
    return re.sub(r"([*_<>\[\]`])", r"\\\1", text)
