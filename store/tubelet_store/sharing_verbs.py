"""Verbs that make stores from stores (copy, push, pull, merge), remove orphans (gc), describe a store (card)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tubelet.cli.verb import Verb
from tubelet.config import Config

if TYPE_CHECKING:
    from tubelet_store.compose import Composition


class Where(Config):
    """Which clips; a clip must meet every condition that is given."""

    split: tuple[str, ...] = ()
    """Clips of these splits."""
    label: tuple[str | int, ...] = ()
    """Clips of these classes, by name or number."""
    video: tuple[str, ...] = ()
    """Clips of these videos, by id."""
    first: int | None = Field(default=None, ge=1)
    """At most this many clips, in the store's order."""


class CopyConfig(Config):
    """What is copied, and where to. Part of a store is a new store with its own identity."""

    source: str
    """Path or URL of the store, or catalog.yaml#name."""
    destination: str
    """Path or fsspec URL. Run the same command again to continue an interrupted copy."""
    hooks: tuple[str, ...] = ()
    """Copy only these hooks, e.g. `[blocks.3, blocks.11]`; none: all."""
    where: Where = Where()
    """Copy only these clips."""
    check: Literal["digest", "size"] = "digest"
    """How each copied object is verified: read back and hashed, or by size only."""
    threads: int = Field(default=8, ge=1)
    """Objects copied in parallel."""

    @property
    def is_whole_store(self) -> bool:
        """Neither hooks nor clips are selected."""
        return not self.hooks and self.where == Where()


class PushConfig(CopyConfig):
    """What is published, where to, and what the catalog says about it."""

    destination: str
    """Path or URL, listed in catalog.yaml of the same folder; or CATALOG#NAME for the URL of that entry."""
    license: str | None = None
    """License in the catalog entry; none: that of an existing entry."""
    owner: str | None = None
    """Contact person or team in the catalog entry; none: that of an existing entry."""
    description: str | None = None
    """One line in the catalog entry; none: that of an existing entry."""


class PullConfig(CopyConfig):
    """What is downloaded, and where to."""

    source: str
    """Name in ./catalog.yaml, catalog.yaml#name (the catalog by path or URL), or URL of the store."""
    destination: str | None = None  # type: ignore[assignment]
    """Path; none: NAME.zarr in the current folder."""


class MergeConfig(Config):
    """Which stores are joined."""

    stores: tuple[str, ...] = Field(min_length=2)
    """Stores of different videos, made with the same settings, in the order of the result. They stay unchanged."""
    out: str | None = None
    """Path or URL of the new store; none: the next version in the folder of the first store, NAME.v2.zarr."""
    clips_per_shard: int | None = Field(default=None, ge=1)
    """Of the new store; none: that of the first store."""
    threads: int = Field(default=4, ge=1)
    """Shards written in parallel."""


class GcConfig(Config):
    """What `tubelet gc` removes."""

    store: str
    """Path or URL of the store."""
    remove: bool = False
    """Remove the orphans; without it, only list them."""
    older_than_h: float = Field(default=24, ge=0)
    """Keep younger objects: a running job may be about to commit them."""


class CardConfig(Config):
    """What `tubelet card` writes."""

    store: str
    """The store: a path, a URL, or catalog.yaml#name."""
    output: Path = Path(".")
    """Folder for README.md (the data card) and croissant.json."""
    license: str | None = None
    """License of the activations; a catalog's entry may give it."""
    name: str | None = None
    """Title; none: the store's name."""


def _copy(config: CopyConfig) -> int:
    _transfer(config, config.source, config.destination)
    return 0


def _pull(config: PullConfig) -> int:
    from tubelet_store.catalog.catalog import DEFAULT

    source = config.source
    if "://" not in source and "#" not in source and not Path(source).exists():
        source = f"{DEFAULT}#{source}"
    name = source.rstrip("/").rpartition("#" if "#" in source else "/")[2].replace("/", "-").removesuffix(".zarr")
    _transfer(config, source, config.destination or f"{name}.zarr")
    return 0


def _push(config: PushConfig) -> int:
    from tubelet_store.catalog.publish import PublishedEntry
    from tubelet_store.reader import open_store

    entry = PublishedEntry.at(config.destination)
    entry.check(open_store(config.source).identity if config.is_whole_store else None)
    _transfer(config, config.source, entry.url)
    if entry.write(open_store(entry.url).state, config.license, config.owner, config.description):
        print(f"{entry.catalog}: {entry.name}")
    return 0


def _transfer(config: CopyConfig, source: str, destination: str) -> None:
    """Copy a whole store object by object, or compose a new store of the selected hooks and clips."""
    from tubelet.formats import human_bytes
    from tubelet.progress import Progress
    from tubelet_store.compose import Composition, choose_clips
    from tubelet_store.reader import open_store
    from tubelet_store.transfer import StoreCopy

    store = open_store(source)
    if not config.is_whole_store:
        where = config.where
        part = choose_clips(store, where.split, where.label, where.video, where.first)
        _compose(Composition(destination, [part], config.hooks or None), config.threads)
        return
    copy = StoreCopy(store, destination, read_back=config.check == "digest")
    copied_bytes = present_bytes = 0
    with Progress("copying", total=copy.manifest.size_bytes, unit="bytes") as progress:
        for stored, is_copied in copy.run(config.threads):
            progress.advance(stored.size_bytes)
            copied_bytes += stored.size_bytes * is_copied
            present_bytes += stored.size_bytes * (not is_copied)
    kept = f", {human_bytes(present_bytes)} already there" if present_bytes else ""
    print(f"{destination}: {human_bytes(copied_bytes)} copied and verified{kept}. Identity {store.identity}")


def _merge(config: MergeConfig) -> int:
    from tubelet_store.compose import Composition, next_version, whole
    from tubelet_store.reader import open_store

    parts = [whole(open_store(url)) for url in config.stores]
    out = config.out or next_version(parts[0].store.url)
    _compose(Composition(out, parts, clips_per_shard=config.clips_per_shard), config.threads)
    return 0


def _compose(composition: Composition, threads: int) -> None:
    from tubelet.progress import Progress

    reused = written = 0
    with Progress("writing", total=composition.plan.shards, unit="shards") as progress:
        for is_reused in composition.run(threads):
            progress.advance()
            reused += is_reused
            written += not is_reused
    store = composition.store()
    print(f"{store.url}: {store.plan.clips} clips; {reused} shards reused, {written} written")
    print(f"Identity {store.identity}")


def _gc(config: GcConfig) -> int:
    from tubelet.formats import human_bytes
    from tubelet_store.orphans import find_orphans, remove
    from tubelet_store.reader import open_store

    store = open_store(config.store, allow_unfinished=True)
    orphans = find_orphans(store, config.older_than_h * 3600)
    freed = 0
    for orphan in orphans:
        if orphan.kept_because is not None:
            print(f"  kept        {orphan.key} ({human_bytes(orphan.size_bytes)}): {orphan.kept_because}")
            continue
        freed += orphan.size_bytes
        print(f"  {'removed' if config.remove else 'orphan '} {orphan.key} ({human_bytes(orphan.size_bytes)})")
        if config.remove:
            remove(store, orphan)
    if config.remove:
        store.root.discard_scratch()
        print(f"{human_bytes(freed)} freed")
    else:
        print(f"{human_bytes(freed)} in orphans. `--remove` removes them.")
    return 0


def _card(config: CardConfig) -> int:
    from tubelet_store.card import write_card
    from tubelet_store.catalog.catalog import is_reference, resolve
    from tubelet_store.reader import open_store

    license, name = config.license, config.name
    if is_reference(config.store):
        entry = resolve(config.store)
        license, name = license or entry.about.license, name or entry.name
    for path in write_card(open_store(config.store), config.output, license, name):
        print(path)
    return 0


_ENDS = ("source", "destination")
COPY = Verb("copy", "Copy a store or part of it, verified at both ends.", lambda: CopyConfig, _copy, _ENDS)
PUSH = Verb("push", "Publish a store: copy it, and list it in the catalog there.", lambda: PushConfig, _push, _ENDS)
PULL = Verb("pull", "Fetch a store from a catalog or URL.", lambda: PullConfig, _pull, _ENDS)
MERGE = Verb("merge", "Join stores, or make the next version of one.", lambda: MergeConfig, _merge, ("stores...",))
GC = Verb("gc", "List and remove objects that killed jobs left in a store.", lambda: GcConfig, _gc, ("store",))
CARD = Verb("card", "Write a store's data card and Croissant file.", lambda: CardConfig, _card, ("store", "output"))
