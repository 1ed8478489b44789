"""A catalog with the catalogs nested in it: its stores by name, searched, found, resolved.

Catalog.read(url) ─▶ its own entries, then those of nested catalogs, each once, to a depth
resolve("catalog.yaml#k400") ─▶ the store's URL and the identity it must have
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tubelet.errors import TubeletError, nearest
from tubelet_store.catalog.document import MAX_BYTES, Document, parse
from tubelet_store.catalog.entry import Link, StoreEntry, read_entries
from tubelet_store.storage import open_root
from tubelet_store.storage.object_root import ObjectRoot

DEFAULT = "catalog.yaml"

# Limits against loops and deliberate floods of nested catalogs.
_MAX_NESTING = 4
_MAX_CATALOGS = 64


class Catalog:
    """The stores of one catalog and of those nested in it.

    Attributes:
        url: Location of the catalog.
        stores: What it lists, its own first.
        problems: Nested catalogs that could not be read, one line each.
    """

    def __init__(self, url: str, stores: list[StoreEntry], problems: list[str]) -> None:
        self.url, self.stores, self.problems = url, stores, problems

    @classmethod
    def read(cls, url: str) -> Catalog:
        """The catalog at `url` (a path or an fsspec URL) with those nested in it.

        Raises:
            TubeletError: it is missing or refused (see `document` and `entry`). A nested one with a fault is listed in
                `problems` instead, so that it does not hide the other stores.
        """
        stores, links = read_one(url)
        catalog = cls(url, stores, [])
        pending = [(link, link.name, 1) for link in links]
        seen = {_place(url)}
        while pending:
            link, prefix, depth = pending.pop(0)
            if _place(link.url) in seen:
                continue
            if depth > _MAX_NESTING or len(seen) == _MAX_CATALOGS:
                catalog.problems.append(f"{link.url} is nested too deep, or one of too many catalogs: not read")
                continue
            seen.add(_place(link.url))
            try:
                below, further = read_one(link.url)
            except TubeletError as error:
                catalog.problems.append(str(error))
                continue
            stores += [StoreEntry(f"{prefix}/{entry.name}", entry.url, entry.hooks, entry.catalog) for entry in below]
            pending += [(each, f"{prefix}/{each.name}", depth + 1) for each in further]
        return catalog

    def find(self, name: str) -> StoreEntry:
        """The store called `name`; `STORE/HOOK` finds the store of that hook.

        Raises:
            TubeletError: there is none.
        """
        by_name = {entry.name: entry for entry in self.stores}
        store, _, hook = name.rpartition("/")
        if name in by_name:
            return by_name[name]
        if store in by_name and hook in {block.hook for block in by_name[store].hooks}:
            return by_name[store]
        known = nearest(name, by_name) if len(by_name) <= 50 else "`tubelet catalog list --text WORD` searches it"
        raise TubeletError(f"{self.url} has no store '{name}'", known if by_name else "It lists no stores at all")

    def search(
        self,
        text: str | None = None,
        dataset: str | None = None,
        backbone: str | None = None,
        hook: str | None = None,
        license: str | None = None,
    ) -> list[StoreEntry]:
        """Stores in which every word given occurs where it should; upper and lower case are the same."""
        matching = []
        for entry in self.stores:
            about = entry.about
            if (
                _occurs(dataset, [json.dumps(about.dataset, ensure_ascii=False)])
                and _occurs(backbone, [json.dumps(about.backbone, ensure_ascii=False)])
                and (hook is None or any(hook.casefold() == block.hook.casefold() for block in entry.hooks))
                and _occurs(license, [about.license])
                and _occurs(text, [entry.name, entry.url, *(block.model_dump_json() for block in entry.hooks)])
            ):
                matching.append(entry)
        return matching


def _occurs(word: str | None, texts: Iterable[str | None]) -> bool:
    return word is None or any(word.casefold() in text.casefold() for text in texts if text)


def read_one(url: str) -> tuple[list[StoreEntry], list[Link]]:
    """Stores and nested catalogs that one file lists.

    Raises:
        TubeletError: it is missing or refused.
    """
    root, _ = place(url)
    document, _ = load(url)
    return read_entries(document, url, root.url)


def load(url: str) -> tuple[Document, str]:
    """The parsed catalog at `url`, and its text.

    Raises:
        TubeletError: it is missing, too long, or no plain YAML.
    """
    root, name = place(url)
    size = root.size(name)
    if size is None:
        raise TubeletError(f"No catalog at {url}", "Check the path; `tubelet catalog add` begins one")
    if size > MAX_BYTES:
        raise TubeletError(f"{url} is longer than {MAX_BYTES >> 20} MiB", "Split it into nested catalogs")
    try:
        text = root.read(name).decode("utf-8")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise TubeletError(f"{url} is no text file", "Give the path of a catalog.yaml") from error
    return parse(text, url), text


def place(url: str) -> tuple[ObjectRoot, str]:
    """The folder of the catalog at `url`, and its name there."""
    url = url.removeprefix("file://")
    if "://" not in url:
        path = Path(url).expanduser().absolute()
        return open_root(str(path.parent)), path.name
    folder, _, name = url.rpartition("/")
    return open_root(folder), name


def _place(url: str) -> str:
    root, name = place(url)
    return f"{root.url}/{name}"


def is_reference(text: str) -> bool:
    """`text` names a store in a catalog: `catalog.yaml#name`, the catalog by path or URL."""
    return text.partition("#")[0].endswith((".yaml", ".yml")) and "#" in text


def resolve(reference: str) -> StoreEntry:
    """The entry that `catalog.yaml#name` names.

    Raises:
        TubeletError: no such catalog, or no such store in it.
    """
    url, _, name = reference.partition("#")
    return Catalog.read(url).find(name)
