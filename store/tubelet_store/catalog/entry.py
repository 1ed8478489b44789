"""What an entry of a catalog may say, and how several of them describe one store.

An entry is Intake's: a reader over a `data` item, one per store and hook, so that Intake can open the array. The
block is `metadata.tubelet`. The author of a catalog is not trusted: only one reader is allowed for a store and one for
a nested catalog, and no text may hold code that Intake would run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.catalog.document import Document, collecting_no_garbage
from tubelet_store.object_keys import ACTIVATIONS
from tubelet_store.storage.s3 import anonymous, is_s3

SCHEMA = 1

ZARR = "intake.readers.datatypes:Zarr"
DASK_ZARR = "intake.readers.readers:DaskZarr"
DASK_ARRAY = "dask.array:Array"
CATALOG_FILE = "intake.readers.datatypes:CatalogFile"
CATALOG_READER = "intake.readers.readers:YAMLCatalogReader"
CATALOG_OBJECT = "intake.readers.entry:Catalog"

CATALOG_DIR = "{CATALOG_DIR}"
ANONYMOUSLY = {"anon": True}
"""storage_options of a public store: read without credentials."""
SCHEMES = ("abfs", "abfss", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3", "s3a")

# Intake runs `{func(...)}`, `{import(...)}`, `{pickle64(...)}` and reads `{env(...)}` wherever it finds them.
_CODE = re.compile(r"\w\s*\(")

_KEY = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)

NAME_PATTERN = r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=200)]
# What plain YAML gives. pydantic's JsonValue walks every value in Python, as long as the rest of the schema takes.
Plain = str | int | float | bool | list[Any] | dict[str, Any] | None
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class HookBlock(Config):
    """`metadata.tubelet` of an entry: one hook of one store. What is left out is as in the store's first entry."""

    store: Name
    """Name of the store: an alias, to be changed at will."""
    hook: Name
    id: Digest | None = None
    """Identity of the store; null if each user builds it locally."""
    shape: tuple[int | None, int, int, int]
    """clip, time, space, channel; the number of clips is null if each user builds the store locally."""
    dtype: Literal["float16", "bfloat16", "float32"]
    grid: tuple[int, int, int] | None = None
    """time, height, width"""
    backbone: dict[str, Plain] = Field(default_factory=dict)
    dataset: dict[str, Plain] = Field(default_factory=dict)
    sampling: dict[str, Plain] = Field(default_factory=dict)
    license: str | None = None
    owner: str | None = None
    description: str | None = None
    created: str | None = None
    parents: tuple[Digest, ...] = ()
    """Stores that this one was made from: earlier versions of it, or what it is a part of."""


class CatalogBlock(Config):
    """`metadata.tubelet` of an entry that is another catalog."""

    catalog: Name
    """Name before the names of its stores."""
    description: str | None = None


@dataclass(frozen=True)
class StoreEntry:
    """A store, as a catalog describes it: the entries of its hooks together."""

    name: str
    """Name, after those of the catalogs it is nested in: `team-b/k400`."""
    url: str
    """Its location, resolved."""
    hooks: tuple[HookBlock, ...]
    catalog: str
    """URL of the catalog that lists it."""

    @property
    def about(self) -> HookBlock:
        """What the entries of its hooks share."""
        return self.hooks[0]

    @property
    def identity(self) -> str | None:
        """Identity that the store must have."""
        return self.about.id


@dataclass(frozen=True)
class Link:
    """A nested catalog."""

    name: str
    url: str


class _Data(Config):
    datatype: Literal["intake.readers.datatypes:Zarr", "intake.readers.datatypes:CatalogFile"]
    kwargs: dict[str, Plain]
    metadata: dict[str, Plain] = Field(default_factory=dict)
    user_parameters: dict[str, Plain] = Field(default_factory=dict, max_length=0)


class _Entry(Config):
    reader: Literal["intake.readers.readers:DaskZarr", "intake.readers.readers:YAMLCatalogReader"]
    kwargs: dict[str, Plain]
    metadata: dict[str, Plain]
    output_instance: Literal["dask.array:Array", "intake.readers.entry:Catalog"]
    user_parameters: dict[str, Plain] = Field(default_factory=dict, max_length=0)


# Keys written by earlier versions, by their current name.
_EARLIER_KEYS = {"licence": "license"}

# Whole sections at once: ten thousand calls cost more than what they check.
_DATA, _ENTRIES = TypeAdapter(dict[str, _Data]), TypeAdapter(dict[str, _Entry])
_HOOK, _LINK = TypeAdapter(HookBlock), TypeAdapter(CatalogBlock)


@collecting_no_garbage()
def read_entries(document: Document, origin: str, folder: str) -> tuple[list[StoreEntry], list[Link]]:
    """The stores and nested catalogs that a parsed catalog describes.

    Args:
        document: The parsed text.
        origin: URL of the catalog.
        folder: The value of `{CATALOG_DIR}`.

    Raises:
        TubeletError: the text breaks the schema, or could make a reader run or reach what it should not.
    """
    tree = document.tree
    _check_code(document, origin)
    _check_top(tree, origin)
    hooks: dict[str, list[HookBlock]] = {}
    urls: dict[str, str] = {}
    firsts: dict[str, dict[str, Plain]] = {}
    links = []
    items = _validated(_DATA, tree["data"], f"{origin}: data")
    for key, entry in _validated(_ENTRIES, tree["entries"], f"{origin}: entries").items():
        where = f"{origin}: entry '{key}'"
        data = _data_of(items, tree, entry, where)
        url = resolve_url(data.kwargs.get("url"), folder, where)
        if data.kwargs.get("storage_options"):
            if not is_s3(url):
                raise TubeletError(f"{where}: `anon` is an option of S3 only", "Leave storage_options out")
            url = anonymous(url)
        if data.datatype == CATALOG_FILE:
            link = _validated(_LINK, entry.metadata.get("tubelet"), f"{where}, metadata.tubelet")
            links.append(Link(link.catalog, url))
            continue
        metadata = entry.metadata.get("tubelet")
        if isinstance(metadata, dict):
            metadata = {_EARLIER_KEYS.get(name, name): value for name, value in metadata.items()}
            if isinstance(metadata.get("store"), str):
                metadata = {**firsts.setdefault(metadata["store"], metadata), **metadata}
        block = _validated(_HOOK, metadata, f"{where}, metadata.tubelet")
        if data.kwargs.get("root") != f"{ACTIVATIONS}/{block.hook}":
            raise TubeletError(f"{where}: its data is not of hook {block.hook}", f"root: {ACTIVATIONS}/{block.hook}")
        if urls.setdefault(block.store, url) != url or (block.store in hooks and hooks[block.store][0].id != block.id):
            raise TubeletError(
                f"{where}: another entry gives store '{block.store}' a different URL or id", "Rename one of them"
            )
        hooks.setdefault(block.store, []).append(block)
    return [StoreEntry(name, urls[name], tuple(blocks), origin) for name, blocks in hooks.items()], links


def _check_top(tree: dict[str, Any], origin: str) -> None:
    if tree.get("version") != 2:
        raise TubeletError(f"{origin} is no catalog: version is {tree.get('version')!r}", "Begin it with `version: 2`")
    for name in ("data", "entries", "aliases", "metadata", "user_parameters"):
        if not isinstance(tree.get(name), dict):
            raise TubeletError(f"{origin}: `{name}` is missing or no mapping", f"Write `{name}: {{}}`")
    if tree["user_parameters"]:
        raise TubeletError(f"{origin} has user_parameters, which Intake evaluates", "Write `user_parameters: {}`")
    metadata = tree["metadata"].get("tubelet", {})
    if not isinstance(metadata, dict) or metadata.get("schema", SCHEMA) != SCHEMA:
        raise TubeletError(f"{origin}: metadata.tubelet.schema is not {SCHEMA}", "Upgrade Tubelet")
    for section in ("data", "entries"):
        for key in tree[section]:
            if not _is_safe_key(key):
                raise TubeletError(
                    f"{origin}: '{key}' cannot be a name in `{section}`",
                    "Names are letters, digits, '.', '-', '_' and '/', none of their parts empty, '.' or '..'",
                )


def _is_safe_key(key: str) -> bool:
    return len(key) <= 500 and _KEY.fullmatch(key) is not None


def _data_of(items: dict[str, _Data], tree: dict[str, Any], entry: _Entry, where: str) -> _Data:
    reference = re.fullmatch(r"\{data\(([^(){}]+)\)\}", str(entry.kwargs.get("data", "")))
    if set(entry.kwargs) != {"data"} or reference is None:
        raise TubeletError(f"{where}: kwargs must be `data: '{{data(TOKEN)}}'` and nothing else", "Fix or remove it")
    data = items.get(reference[1])
    if data is None or reference[1] in tree["entries"]:
        raise TubeletError(f"{where}: it has no data item '{reference[1]}'", "Fix or remove it")
    if data.kwargs.get("storage_options") not in (None, {}, ANONYMOUSLY):
        raise TubeletError(
            f"{where}: storage_options may hold secrets",
            "Only {anon: true} is allowed; endpoint and keys come from the environment",
        )
    if unknown := set(data.kwargs) - {"url", "root", "storage_options"}:
        raise TubeletError(f"{where}: data.kwargs has {min(unknown)}", "Only url and root belong there")
    if (data.datatype, entry.reader, entry.output_instance) not in (
        (ZARR, DASK_ZARR, DASK_ARRAY),
        (CATALOG_FILE, CATALOG_READER, CATALOG_OBJECT),
    ):
        raise TubeletError(f"{where}: {entry.reader} does not read {data.datatype}", "Fix or remove it")
    return data


def resolve_url(url: Plain, folder: str, where: str) -> str:
    """`url` of an entry of the catalog in `folder`, absolute.

    Raises:
        TubeletError: it leaves the catalog's folder by `..`, has an unknown or chained scheme or credentials, or is
            a local path although the catalog is remote.
    """
    if not isinstance(url, str) or not url:
        raise TubeletError(f"{where}: its data has no url", "Fix or remove it")

    def refuse(why: str, remedy: str) -> TubeletError:
        return TubeletError(f"{where}: the url {url!r} {why}", remedy)

    rest = url.removeprefix(CATALOG_DIR + "/")
    if re.search(r"[{}\\\x00-\x20#]|::", rest):
        raise refuse("holds a template, a chained URL or a forbidden character", f"The only prefix is {CATALOG_DIR}/")
    if ".." in rest.split("/"):
        raise refuse("leads upwards", "Give the whole URL, or a path below the catalog")
    scheme, separator, path = rest.partition("://")
    if not separator and rest.startswith("/"):
        scheme, separator, path = "file", "://", rest
    if not separator:
        return f"{folder}/{rest}"
    if rest != url or scheme not in SCHEMES:
        raise refuse(f"has the scheme '{scheme}'", f"Known are {', '.join(SCHEMES)}")
    if "@" in path.partition("/")[0]:
        raise refuse("holds credentials", "They belong into the environment, never into a catalog")
    if scheme == "file":
        if "://" in folder:
            raise refuse("is a path of the reader's machine, in a catalog that came from elsewhere", "Do not use it")
        return path
    return rest


def _check_code(document: Document, origin: str) -> None:
    """Refuse what Intake would evaluate, anywhere; `{data(...)}` is taken apart by its own pattern."""
    for line, text in document.braced:
        if _CODE.search(text, text.index("{")) and not _DATA_REFERENCE.fullmatch(text):
            raise TubeletError(
                f"{origin}, line {line}, holds code: {text[:80]!r}", "Do not use this catalog, or remove that"
            )


_DATA_REFERENCE = re.compile(r"\{data\([A-Za-z0-9_./-]+\)\}")


def _validated(model: TypeAdapter[Any], raw: Any, where: str) -> Any:
    try:
        return model.validate_python(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = ".".join(map(str, fault["loc"]))
        given = repr(fault["input"])[:80]
        raise TubeletError(f"{where}: {field} {fault['msg']} (given: {given})", "Fix or remove it") from error
