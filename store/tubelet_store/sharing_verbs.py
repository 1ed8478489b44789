"""Verbs that make stores out of stores: copy, push, pull, subset, merge, append, gc, card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tubelet.cli.verb import Verb
from tubelet.config import Config
from tubelet.errors import TubeletError

if TYPE_CHECKING:
    from tubelet_store.compose import Composition
    from tubelet_store.reader import Store


class Wanted(Config):
    """Which part of a store; nothing given: all of it."""

    hooks: tuple[str, ...] = ()
    """Only these hooks, e.g. `[blocks.3, blocks.11]`."""
    splits: tuple[str, ...] = ()
    """Only clips of these splits."""
    labels: tuple[str | int, ...] = ()
    """Only clips of these classes, by name or number."""
    videos: tuple[str, ...] = ()
    """Only clips of these videos, by id."""
    first: int | None = Field(default=None, ge=1)
    """Only the first so many clips of those."""

    @property
    def everything(self) -> bool:
        """No condition is given."""
        return not (self.hooks or self.splits or self.labels or self.videos or self.first)


class CopyConfig(Wanted):
    """What `tubelet copy` copies. A part of a store is a store of its own, with an identity of its own."""

    source: str
    """The store: a path, a URL, or catalog.yaml#name."""
    destination: str
    """Where to: a path or any fsspec URL. Running again continues an interrupted copy."""
    threads: int = Field(default=8, ge=1)
    """Objects copied at once."""
    check: Literal["digest", "size"] = "digest"
    """How each object is checked at the destination: read back, or its length alone."""


class PushConfig(Wanted):
    """What `tubelet push` uploads."""

    store: str
    """The store here: a path."""
    destination: str
    """Where to: a URL, or catalog.yaml#name for the place that entry gives (the store must be the one it means)."""
    threads: int = Field(default=8, ge=1)
    """Objects copied at once."""
    check: Literal["digest", "size"] = "digest"
    """How each object is checked at the destination: read back, or its length alone."""


class PullConfig(Wanted):
    """What `tubelet pull` downloads."""

    store: str
    """The store there: catalog.yaml#name, a name in ./catalog.yaml, or a URL."""
    destination: str | None = None
    """Path here; none: the store's name in this folder."""
    threads: int = Field(default=8, ge=1)
    """Objects copied at once."""
    check: Literal["digest", "size"] = "digest"
    """How each object is checked here: read back, or its length alone."""


class SubsetConfig(Wanted):
    """What `tubelet subset` takes out of a store."""

    store: str
    """The store: a path, a URL, or catalog.yaml#name. It stays as it is."""
    destination: str
    """Where the new store goes. Whole shards are hard links on the same disk."""
    threads: int = Field(default=4, ge=1)
    """Shards written at once."""


class MergeConfig(Config):
    """What `tubelet merge` joins."""

    output: str
    """Where the new store goes. Whole shards are hard links on the same disk."""
    stores: tuple[str, ...] = Field(min_length=2)
    """Stores, in this order; made alike, of different videos. They stay as they are."""
    clips_per_shard: int | None = Field(default=None, ge=1)
    """Of the new store; none: the first one's."""
    threads: int = Field(default=4, ge=1)
    """Shards written at once."""


class AppendConfig(Config):
    """What `tubelet append` adds to a store, as a new version of it."""

    store: str
    """The store. It stays as it is, and its digest still reads."""
    more: tuple[str, ...] = Field(min_length=1)
    """Stores of further videos, made alike."""
    output: str | None = None
    """Where the new version goes; none: beside the old one, NAME.v2.zarr, NAME.v3.zarr, ..."""
    threads: int = Field(default=4, ge=1)
    """Shards written at once."""


class GcConfig(Config):
    """What `tubelet gc` removes."""

    store: str
    """Path or URL of the store."""
    remove: bool = False
    """Remove what belongs to nothing; without, only show it."""
    older_than_h: float = Field(default=24, ge=0)
    """Leave younger objects: a living job may be about to record them."""


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
    return _transport(config.source, config.destination, config, config.threads, config.check)


def _push(config: PushConfig) -> int:
    from tubelet_store.catalog.catalog import is_reference, resolve
    from tubelet_store.reader import open_store

    destination = config.destination
    if is_reference(destination):
        entry = resolve(destination)
        identity = open_store(config.store).identity
        if not config.everything or entry.identity not in (None, identity):
            raise TubeletError(
                f"{destination} means store {entry.identity}, and that is not what would be pushed",
                "Push to a URL, then `tubelet catalog add --replace` it",
            )
        destination = entry.url
    return _transport(config.store, destination, config, config.threads, config.check)


def _pull(config: PullConfig) -> int:
    from tubelet_store.catalog.catalog import DEFAULT

    store = config.store
    if "://" not in store and "#" not in store and not Path(store).exists():
        store = f"{DEFAULT}#{store}"
    name = store.rstrip("/").rpartition("#" if "#" in store else "/")[2].replace("/", "-").removesuffix(".zarr")
    return _transport(store, config.destination or f"{name}.zarr", config, config.threads, config.check)


def _transport(source: str, destination: str, wanted: Wanted, threads: int, check: str) -> int:
    from rich.progress import Progress

    from tubelet.formats import human_bytes
    from tubelet_store.reader import open_store
    from tubelet_store.transfer import StoreCopy

    store = open_store(source)
    if not wanted.everything:
        return _subset_to(store, destination, wanted, threads)
    copy = StoreCopy(store, destination, read_back=check == "digest")
    traveled = there = 0
    with Progress(transient=True) as progress:
        bar = progress.add_task("copying", total=copy.manifest.size_bytes)
        for stored, moved in copy.run(threads):
            progress.advance(bar, stored.size_bytes)
            traveled += stored.size_bytes * moved
            there += stored.size_bytes * (not moved)
    kept = f", {human_bytes(there)} were there already" if there else ""
    print(f"{destination}: {human_bytes(traveled)} copied and verified{kept}. Identity {store.identity}")
    return 0


def _subset(config: SubsetConfig) -> int:
    from tubelet_store.reader import open_store

    return _subset_to(open_store(config.store), config.destination, config, config.threads)


def _subset_to(store: Store, destination: str, wanted: Wanted, threads: int) -> int:
    from tubelet_store.compose import Composition, choose_clips

    part = choose_clips(store, wanted.splits, wanted.labels, wanted.videos, wanted.first)
    return _compose(Composition(destination, [part], wanted.hooks or None), threads)


def _merge(config: MergeConfig) -> int:
    from tubelet_store.compose import Composition, whole
    from tubelet_store.reader import open_store

    parts = [whole(open_store(url)) for url in config.stores]
    return _compose(Composition(config.output, parts, clips_per_shard=config.clips_per_shard), config.threads)


def _append(config: AppendConfig) -> int:
    from tubelet_store.compose import Composition, next_version, whole
    from tubelet_store.reader import open_store

    parts = [whole(open_store(url)) for url in (config.store, *config.more)]
    return _compose(Composition(config.output or next_version(parts[0].store.url), parts), config.threads)


def _compose(composition: Composition, threads: int) -> int:
    from rich.progress import Progress

    reused = written = 0
    with Progress(transient=True) as progress:
        bar = progress.add_task("shards", total=composition.plan.shards)
        for whole in composition.run(threads):
            progress.advance(bar)
            reused += whole
            written += not whole
    store = composition.store()
    print(f"{store.url}: {store.plan.clips} clips; {reused} shards taken over, {written} written anew")
    print(f"Identity {store.identity}")
    return 0


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
        print(f"  {'removed    ' if config.remove else 'would go   '} {orphan.key} ({human_bytes(orphan.size_bytes)})")
        if config.remove:
            remove(store, orphan)
    if config.remove:
        store.root.discard_scratch()
        print(f"{human_bytes(freed)} freed")
    else:
        print(f"{human_bytes(freed)} belong to nothing. `--remove` removes them.")
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


COPY = Verb(
    "copy",
    "Copy a store, or a part of it, verified at both ends.",
    lambda: CopyConfig,
    _copy,
    ("source", "destination"),
)
PUSH = Verb("push", "Publish a store: copy it to a URL.", lambda: PushConfig, _push, ("store", "destination"))
PULL = Verb("pull", "Fetch a store from a catalog or URL.", lambda: PullConfig, _pull, ("store", "destination"))
SUBSET = Verb("subset", "Make a store of some hooks or clips.", lambda: SubsetConfig, _subset, ("store", "destination"))
MERGE = Verb("merge", "Join stores that were made alike.", lambda: MergeConfig, _merge, ("output", "stores..."))
APPEND = Verb("append", "Add videos: a new version of a store.", lambda: AppendConfig, _append, ("store", "more..."))
GC = Verb("gc", "Show and remove what dead jobs left in a store.", lambda: GcConfig, _gc, ("store",))
CARD = Verb("card", "Write a store's data card and Croissant file.", lambda: CardConfig, _card, ("store", "output"))
