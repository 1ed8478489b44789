"""`tubelet catalog list | show | add | remove | check`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Literal

from tubelet.cli.verb import Verb
from tubelet.config import Config
from tubelet.errors import TubeletError

if TYPE_CHECKING:
    from tubelet_store.catalog.catalog import Catalog
    from tubelet_store.catalog.entry import StoreEntry


class CatalogConfig(Config):
    """What `tubelet catalog` does, and where."""

    action: Literal["list", "show", "add", "remove", "check"] = "list"
    """list (and search), show one store, add or remove one, check that each store exists and has its identity."""
    name: str | None = None
    """Of the store; for `add` the name it gets."""
    store: str | None = None
    """add: path or URL of the store, or of a catalog (.yaml) to nest."""
    catalog: str = "catalog.yaml"
    """Path or URL of the catalog; `add` begins it where there is none."""
    text: str | None = None
    """list: only stores with this text anywhere in their description."""
    dataset: str | None = None
    """list: only stores of a data set like this."""
    backbone: str | None = None
    """list: only stores of a backbone like this."""
    hook: str | None = None
    """list: only stores with this hook."""
    license: str | None = None
    """list: only stores under a license like this; add: the license to note."""
    owner: str | None = None
    """add: contact person or team."""
    description: str | None = None
    """add: one line about it."""
    replace: bool = False
    """add: reuse a name. The store that had it is listed as NAME- and the first digits of its identity."""
    pin: bool = True
    """add: record the store's identity, so that opening another store in its place is an error. `--pin false` for
    stores that each user builds locally."""
    format: Literal["text", "json"] = "text"
    """json: machine-readable."""


def _run(config: CatalogConfig) -> int:
    actions = {"list": _list, "show": _show, "add": _add, "remove": _remove, "check": _check}
    return actions[config.action](config)


def _read(config: CatalogConfig) -> Catalog:
    from tubelet_store.catalog.catalog import Catalog

    catalog = Catalog.read(config.catalog)
    for problem in catalog.problems:
        print(f"tubelet: not read: {problem}", file=sys.stderr)
    return catalog


def _list(config: CatalogConfig) -> int:
    stores = _read(config).search(config.text, config.dataset, config.backbone, config.hook, config.license)
    if config.format == "json":
        print(json.dumps([_record(entry) for entry in stores], indent=2, ensure_ascii=False))
        return 0
    if not stores:
        print("No such store in the catalog.")
    width = max((len(entry.name) for entry in stores), default=0)
    lines = []
    for entry in stores:
        about = entry.about
        hooks = ", ".join(block.hook for block in entry.hooks)
        parts = [about.dataset.get("name") or about.dataset.get("kind"), about.backbone.get("id"), about.license]
        words = " · ".join(str(word) for word in parts if word)
        clips = _clips(entry)
        held = f"{'none found':>14}" if clips is None else f"{clips:>8} clips"
        lines.append(f"{entry.name:<{width}}  {held}  {words}  [{hooks}]")
    print("\n".join(lines))
    return 0


def _clips(entry: StoreEntry) -> int | None:
    """Number of clips; of a store that is not pinned, read from the store. None: it does not exist yet."""
    if entry.about.shape[0] is not None:
        return entry.about.shape[0]
    from tubelet_store.storage import open_root
    from tubelet_store.store_state import read_state

    try:
        state = read_state(open_root(entry.url))
    except TubeletError:
        # An unreachable store does not hide the others; `catalog check` names its fault.
        return None
    return None if state is None else state.plan.clips


def _show(config: CatalogConfig) -> int:
    entry = _read(config).find(_named(config))
    if config.format == "json":
        print(json.dumps(_record(entry), indent=2, ensure_ascii=False))
        return 0
    about = entry.about
    time, height, width = about.grid or ("?", "?", "?")
    lines = {
        "name": entry.name,
        "store": entry.url,
        "identity": entry.identity or "not pinned: each user builds this store locally",
        "clips": "none found" if (clips := _clips(entry)) is None else str(clips),
        "grid": f"{time} time x {height} height x {width} width, {about.dtype}",
        "hooks": ", ".join(f"{block.hook} [{block.shape[3]}]" for block in entry.hooks),
        "data set": ", ".join(f"{k} {v}" for k, v in about.dataset.items()),
        "backbone": ", ".join(f"{k} {v}" for k, v in about.backbone.items()),
        "sampling": ", ".join(f"{k} {v}" for k, v in about.sampling.items()),
        "license": about.license or "not stated",
        "owner": about.owner or "not stated",
        "description": about.description or "",
        "made from": ", ".join(about.parents),
        "catalog": entry.catalog,
    }
    for name, text in lines.items():
        if text:
            print(f"{name:<14}{text}")
    print(f'\nOpen it:      tubelet.open_store("{config.catalog}#{entry.name}")')
    hook, out = entry.hooks[0].hook, entry.name.replace("/", "-")
    print(f"Train on it:  tubelet train '{config.catalog}#{entry.name}' --hook {hook} --out runs/{out}")
    return 0


def _add(config: CatalogConfig) -> int:
    from tubelet_store.catalog.edit_catalog import add_catalog, add_store, describe
    from tubelet_store.storage import open_root
    from tubelet_store.store_state import read_state

    name = _named(config)
    if config.store is None:
        raise TubeletError("Which store?", "Write `tubelet catalog add NAME STORE`")
    if config.store.endswith((".yaml", ".yml")):
        add_catalog(config.catalog, config.store, name, config.description)
        print(f"{config.catalog}: nested {config.store} as {name}")
        return 0
    root = open_root(config.store)
    state = read_state(root)
    if state is None:
        raise TubeletError(f"No store at {config.store}", "Check the path; `tubelet extract` prints where it wrote")
    blocks = describe(
        state, name, license=config.license, owner=config.owner, description=config.description, pin=config.pin
    )
    kept = add_store(config.catalog, root.url, blocks, config.replace)
    print(f"{config.catalog}: added {name}, {len(blocks)} hooks, identity {state.identity}")
    if kept is not None:
        print(f"What {name} meant before is now {kept}")
    return 0


def _remove(config: CatalogConfig) -> int:
    from tubelet_store.catalog.edit_catalog import remove

    remove(config.catalog, _named(config))
    print(f"{config.catalog}: removed {config.name}; the store itself stays where it is")
    return 0


def _check(config: CatalogConfig) -> int:
    from tubelet.concurrency import in_parallel

    catalog = _read(config)
    chosen = [catalog.find(config.name)] if config.name else catalog.stores
    checked = [(entry.name, problem) for entry, problem in in_parallel(_problem, chosen, 16)]
    wrong = [(name, problem) for name, problem in checked if problem is not None]
    if config.format == "json":
        print(json.dumps([{"name": name, "problem": problem} for name, problem in checked], indent=2))
    else:
        for name, problem in wrong:
            print(f"{name}: {problem}")
        print(f"{len(chosen) - len(wrong)} of {len(chosen)} stores exist and have the recorded identity")
    return 1 if wrong or catalog.problems else 0


def _problem(entry: StoreEntry) -> str | None:
    """What is wrong with the store, by its group document alone: a digest there, the plan, the hooks."""
    from tubelet_store.storage import open_root
    from tubelet_store.store_state import read_state

    try:
        state = read_state(open_root(entry.url))
    except TubeletError as error:
        return str(error)
    if state is None:
        return f"no store at {entry.url}"
    if not state.complete:
        return f"{entry.url} is unfinished"
    if entry.identity is not None and state.identity != entry.identity:
        return f"{entry.url} has identity {state.identity}, the catalog pins {entry.identity}"
    held = {hook.name: (state.plan.clips, *state.plan.clip_shape(hook)) for hook in state.plan.hooks}
    for block in entry.hooks:
        shape = held.get(block.hook, ())
        if shape[1:] != block.shape[1:] or block.shape[0] not in (None, *shape[:1]) or state.plan.dtype != block.dtype:
            return f"{entry.url} does not hold {block.hook} with shape {list(block.shape)} in {block.dtype}"
    return None


def _named(config: CatalogConfig) -> str:
    if config.name is None:
        raise TubeletError(f"`tubelet catalog {config.action}` needs a name", "`tubelet catalog list` shows them")
    return config.name


def _record(entry: StoreEntry) -> dict[str, object]:
    about = entry.about.model_dump(mode="json", exclude={"store", "hook", "shape"}, exclude_none=True)
    hooks = [{"name": block.hook, "shape": list(block.shape)} for block in entry.hooks]
    return {"name": entry.name, "url": entry.url, "catalog": entry.catalog, **about, "hooks": hooks}


CATALOG = Verb(
    "catalog",
    "List, search and keep a catalog of stores.",
    lambda: CatalogConfig,
    _run,
    ("action", "name", "store"),
    settings_file=False,
)
