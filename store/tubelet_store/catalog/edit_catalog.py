"""Adds and removes entries. All other lines, comments included, stay byte for byte."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from tubelet.errors import TubeletError
from tubelet_store.catalog.catalog import load, place, read_one
from tubelet_store.catalog.document import Document, Section, parse
from tubelet_store.catalog.entry import (
    ANONYMOUSLY,
    CATALOG_DIR,
    CATALOG_FILE,
    CATALOG_OBJECT,
    CATALOG_READER,
    DASK_ARRAY,
    DASK_ZARR,
    NAME_PATTERN,
    ZARR,
    CatalogBlock,
    HookBlock,
    StoreEntry,
    read_entries,
)
from tubelet_store.object_keys import ACTIVATIONS
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.storage.s3 import split_anonymous

if TYPE_CHECKING:
    from tubelet_store.store_state import StoreState

_EMPTY = """\
# Activation stores. A valid Intake v2 catalog: intake.open_catalog opens it, `tubelet catalog list` searches it.
# Names are aliases; the id under metadata.tubelet is the digest of a store's manifest, and what is opened must have it.
version: 2
metadata:
  tubelet: {schema: 1}
user_parameters: {}
aliases: {}
data: {}
entries: {}
"""

_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def describe(
    state: StoreState,
    name: str,
    license: str | None = None,
    owner: str | None = None,
    description: str | None = None,
    pin: bool = True,
) -> tuple[HookBlock, ...]:
    """The catalog blocks of a store named `name`, one per hook.

    Args:
        state: Of the store, complete.
        name: Its name in the catalog.
        license: Its license.
        owner: Contact person or team.
        description: One line.
        pin: Note its identity.

    Raises:
        TubeletError: the store is unfinished, or the name cannot be one.
    """
    if not state.complete:
        raise TubeletError(f"The store of '{name}' is unfinished", "Finish its extraction, then add it")
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise TubeletError(
            f"'{name}' cannot be a store's name in a catalog",
            "Use letters, digits and single '.', '-', '_' between them",
        )
    plan, provenance = state.plan, state.provenance
    grid = (plan.grid.time, plan.grid.height, plan.grid.width)
    created = str(provenance.get("created_utc") or datetime.now(UTC).isoformat(timespec="seconds"))
    parents = provenance.get("parents")
    return tuple(
        HookBlock(
            store=name,
            hook=hook.name,
            id=state.identity if pin else None,
            shape=(plan.clips if pin else None, *plan.clip_shape(hook)),
            dtype=plan.dtype,
            grid=grid,
            backbone=_short(plan.backbone),
            dataset=_short(plan.dataset),
            sampling=_short(plan.sampling),
            created=created,
            parents=tuple(str(p["identity"]) for p in parents if isinstance(p, dict))
            if isinstance(parents, list)
            else (),
            license=license,
            owner=owner,
            description=description,
        )
        for hook in plan.hooks
    )


def add_store(catalog: str, url: str, blocks: tuple[HookBlock, ...], replace: bool = False) -> str | None:
    """List the store at `url` in `catalog`, which is created if it does not exist.

    Args:
        catalog: Path or URL of the catalog.
        url: Location of the store.
        blocks: From `describe`.
        replace: The name may be in use; the store it meant keeps an entry, under the name that is returned.

    Raises:
        TubeletError: the name is in use, or the catalog cannot be edited.
    """
    with _editing(catalog) as text:
        stores, _ = read_entries(text.document, catalog, text.root.url)
        name = blocks[0].store
        present = {entry.name: entry for entry in stores}
        kept = None
        if name in present:
            if not replace:
                raise TubeletError(f"{catalog} already has a store '{name}'", "Choose another name, or give --replace")
            old = present[name]
            _remove_entry(text, old)
            if old.identity is not None and old.identity != blocks[0].id:
                kept = f"{name}-{old.identity.removeprefix('sha256:')[:8]}"
                if kept not in present:
                    renamed = tuple(block.model_copy(update={"store": kept}) for block in old.hooks)
                    _insert(text, *_items(_relative(old.url, text.root), renamed))
                blocks = tuple(block.model_copy(update={"parents": (old.identity,)}) for block in blocks)
        _insert(text, *_items(_relative(url, text.root), blocks))
        return kept


def add_catalog(catalog: str, url: str, name: str, description: str | None = None) -> None:
    """Nest the catalog at `url` in `catalog` under `name`.

    Raises:
        TubeletError: it cannot be read, the name is in use, or `catalog` cannot be edited.
    """
    read_one(url)
    with _editing(catalog) as text:
        if name in text.document.tree["entries"]:
            raise TubeletError(f"{catalog} already has an entry '{name}'", "Choose another name")
        block = CatalogBlock(catalog=name, description=description)
        token = f"{name}.yaml"
        data = {token: _data(CATALOG_FILE, {"url": _relative(url, text.root)})}
        entry = _entry(CATALOG_READER, token, CATALOG_OBJECT, block.model_dump(mode="json", exclude_none=True))
        _insert(text, data, {name: entry})


def remove(catalog: str, name: str) -> None:
    """Take the store or nested catalog `name` out of `catalog`; the store itself stays.

    Raises:
        TubeletError: it is not listed in this file itself, or the file cannot be edited.
    """
    with _editing(catalog) as text:
        stores, links = read_entries(text.document, catalog, text.root.url)
        entry = next((entry for entry in stores if entry.name == name), None)
        if entry is not None:
            _remove_entry(text, entry)
        elif any(link.name == name for link in links):
            _cut(text, [name])
        else:
            raise TubeletError(
                f"{catalog} itself lists no store '{name}'", "Those of a nested catalog are removed there"
            )


class _Text:
    """A catalog's text while it is edited: line numbers are those of the document as it was read."""

    def __init__(self, root: ObjectRoot, document: Document, text: str) -> None:
        self.root, self.document = root, document
        if re.search("[\x85\u2028\u2029]|\r(?!\n)", text):
            raise TubeletError(f"{root.url}: unsupported line break in the catalog", "End its lines with line feeds")
        self.lines = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
        self.after: dict[int, list[str]] = {}
        """Lines to insert after a line."""
        self.gone: set[int] = set()

    def result(self) -> str:
        for name in ("data", "entries"):
            section = self.document.sections[name]
            left = {first for first, _ in section.entries.values()} - self.gone
            filled = bool(left) or section.last_line in self.after
            if not filled or not section.is_block:
                self.lines[section.key_line] = f"{name}:\n" if filled else f"{name}: {{}}\n"
        parts = []
        for number, line in enumerate(self.lines):
            if number not in self.gone:
                parts.append(line)
            parts += self.after.get(number, [])
        return "".join(parts)


@contextlib.contextmanager
def _editing(catalog: str) -> Iterator[_Text]:
    root, name = place(catalog)
    # Two at once would each write without the other's entry.
    with root.exclusive(name):
        if root.size(name) is None:
            document, content = parse(_EMPTY, catalog), _EMPTY
        else:
            document, content = load(catalog)
        text = _Text(root, document, content)
        yield text
        root.replace(name, text.result().encode())
    root.discard_scratch()


def _items(url: str, blocks: tuple[HookBlock, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    data: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    url, without_credentials = split_anonymous(url)
    options = {"storage_options": ANONYMOUSLY} if without_credentials else {}
    for block in blocks:
        name = f"{block.store}/{block.hook}"
        # Intake recurses without end where a data item has the name of its entry.
        token = f"{name}.zarr"
        data[token] = _data(ZARR, {"url": url, **options, "root": f"{ACTIVATIONS}/{block.hook}"})
        metadata = block.model_dump(mode="json", exclude_none=True)
        metadata = {key: value for key, value in metadata.items() if value not in ({}, [])}
        if entries:
            # The store is described once, at its first hook.
            metadata = {key: metadata[key] for key in ("store", "hook", "shape")}
        entries[name] = _entry(DASK_ZARR, token, DASK_ARRAY, metadata)
    return data, entries


def _data(datatype: str, kwargs: Mapping[str, object]) -> dict[str, Any]:
    # Intake needs them all, empty or not.
    return {"datatype": datatype, "kwargs": kwargs, "metadata": {}, "user_parameters": {}}


def _entry(reader: str, token: str, output: str, block: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "reader": reader,
        "kwargs": {"data": f"{{data({token})}}"},
        "output_instance": output,
        "metadata": {"tubelet": dict(block)},
        "user_parameters": {},
    }


def _insert(text: _Text, data: dict[str, Any], entries: dict[str, Any]) -> None:
    for name, items in (("data", data), ("entries", entries)):
        section = _section(text, name)
        for key in items:
            if key in section.entries and section.entries[key][0] not in text.gone:
                raise TubeletError(f"{text.root.url}: `{name}` already has '{key}'", "Choose another name")
        dumped = yaml.dump(
            items, Dumper=_DUMPER, sort_keys=False, width=10_000, allow_unicode=True, default_flow_style=None
        )
        lines = [" " * section.indent + line for line in dumped.splitlines(keepends=True)]
        text.after.setdefault(section.last_line, []).extend(lines)


def _remove_entry(text: _Text, entry: StoreEntry) -> None:
    names = {block.hook for block in entry.hooks}
    keys = []
    for key, raw in text.document.tree["entries"].items():
        block = raw["metadata"]["tubelet"]
        if block.get("store") == entry.name and block.get("hook") in names:
            keys.append(key)
    _cut(text, keys)


def _cut(text: _Text, keys: list[str]) -> None:
    tree = text.document.tree
    tokens = [tree["entries"][key]["kwargs"]["data"].removeprefix("{data(").removesuffix(")}") for key in keys]
    for name, wanted in (("entries", keys), ("data", tokens)):
        section = _section(text, name)
        for key in wanted:
            first, last = section.entries[key]
            # The comment right above an entry is about it.
            while text.lines[first - 1].lstrip().startswith("#"):
                first -= 1
            text.gone |= set(range(first, last + 1))


def _section(text: _Text, name: str) -> Section:
    section = text.document.sections[name]
    if text.document.tree[name] and not section.is_block:
        raise TubeletError(
            f"{text.root.url}: `{name}` is written in braces, and cannot be edited without rewriting it",
            f"Write one line per entry below `{name}:`",
        )
    return section


def _relative(url: str, root: ObjectRoot) -> str:
    """`url` as written in an entry: relative to the catalog where it is below its folder, so that both can be moved."""
    if "://" not in url or url.startswith("file://"):
        above, name = place(url)
        url = f"{above.url}/{name}"
    if url.startswith(f"{root.url}/"):
        return f"{CATALOG_DIR}/{PurePosixPath(url.removeprefix(root.url + '/'))}"
    return url


def _short(description: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of a plan's description: enough to search by; the store has the rest."""
    return {key: value for key, value in description.items() if isinstance(value, str | int | float | bool)}
