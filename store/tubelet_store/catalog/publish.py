"""The catalog entry that `tubelet push` writes: which one a destination means, and whether the store fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tubelet.errors import TubeletError
from tubelet_store.catalog.catalog import DEFAULT, Catalog, is_reference, place
from tubelet_store.catalog.edit_catalog import add_store, describe
from tubelet_store.catalog.entry import StoreEntry
from tubelet_store.storage import open_root

if TYPE_CHECKING:
    from tubelet_store.store_state import StoreState


@dataclass(frozen=True)
class PublishedEntry:
    """Entry `name` of `catalog`, for the store at `url`. Get one from `at`."""

    url: str
    catalog: str
    name: str
    present: StoreEntry | None
    """The catalog's present entry of that name, if any."""

    @classmethod
    def at(cls, destination: str) -> PublishedEntry:
        """The entry for a store that goes to `destination`.

        Args:
            destination: `catalog.yaml#name`: the URL in this entry, else NAME.zarr in the catalog's folder. Or a
                path or URL: the entry is named after its last part, in `catalog.yaml` of the same folder.

        Raises:
            TubeletError: the catalog cannot be read, or the name belongs to a store elsewhere.
        """
        if is_reference(destination):
            catalog, _, name = destination.partition("#")
            root, _ = place(catalog)
            present = _entry(catalog, name)
            if present is None:
                return cls(f"{root.url}/{name}.zarr", catalog, name, None)
            # An entry of a nested catalog is written in that catalog, under its own name there.
            return cls(present.url, present.catalog, present.about.store, present)
        url = open_root(destination).url
        folder, _, last = url.rstrip("/").rpartition("/")
        catalog, name = f"{folder}/{DEFAULT}", last.removesuffix(".zarr")
        present = _entry(catalog, name)
        if present is not None and open_root(present.url).url != url:
            raise TubeletError(
                f"{catalog} already has a store '{name}', at {present.url}", "Choose another name for the destination"
            )
        return cls(url, catalog, name, present)

    def check(self, identity: str | None) -> None:
        """Refuse to publish another store than the one that the entry pins.

        Args:
            identity: Of the store that is published; None: not known yet, because it is part of another store.

        Raises:
            TubeletError: the entry pins another identity.
        """
        pinned = None if self.present is None else self.present.identity
        if pinned is not None and pinned != identity:
            raise TubeletError(
                f"'{self.name}' in {self.catalog} is store {pinned}, and that is not what would be pushed",
                "Push to another URL, then `tubelet catalog add --replace`",
            )

    def write(
        self, state: StoreState, license: str | None = None, owner: str | None = None, description: str | None = None
    ) -> bool:
        """Write the entry for the published store; None keeps the existing entry's value. False if nothing changes."""
        given = {"license": license, "owner": owner, "description": description}
        earlier = {} if self.present is None else {name: getattr(self.present.about, name) for name in given}
        updated = {name: earlier.get(name) if value is None else value for name, value in given.items()}
        if self.present is not None and self.present.identity == state.identity and updated == earlier:
            return False
        blocks = describe(state, self.name, updated["license"], updated["owner"], updated["description"])
        add_store(self.catalog, self.url, blocks, replace=self.present is not None)
        return True


def _entry(catalog: str, name: str) -> StoreEntry | None:
    root, file_name = place(catalog)
    if root.size(file_name) is None:
        return None
    return next((entry for entry in Catalog.read(catalog).stores if entry.name == name), None)
