"""What a verb of the command line is, and which verbs are registered. Imports nothing heavy.

Each package registers its verbs under the entry-point group `tubelet.verbs`. An entry point names its extra, so that
a machine with only the trainer installed shows only the verbs it can run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tubelet.errors import TubeletError, nearest
from tubelet.extras import missing_packages, require_extra

if TYPE_CHECKING:
    from tubelet.config import Config

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Verb(Generic[C]):
    """One verb of the command line."""

    name: str
    summary: str
    """One line for the list of verbs."""
    config: Callable[[], type[C]]
    """Gives the model of its settings (a call, so that listing the verbs imports no heavy library). Every field can be
    set from YAML and overridden with `--field value`."""
    run: Callable[[C], int]
    """Does the work; returns the exit status. Imports heavy libraries inside."""
    positionals: tuple[str, ...] = ()
    """Fields that may be given without their name, in order; the last takes all that is left if it ends with `...`."""
    settings_file: bool = True
    """A YAML (or JSON) file among the arguments holds settings; False: it is an argument like any other."""


def registered() -> dict[str, EntryPoint]:
    """Entry point of every verb by name, sorted; some may lack their extra."""
    return {entry.name: entry for entry in sorted(entry_points(group="tubelet.verbs"), key=lambda entry: entry.name)}


def is_installed(entry: EntryPoint) -> bool:
    """Whether everything that the verb needs is installed."""
    return not missing_packages(entry.extras)


def load_verb(name: str) -> Verb[Any]:
    """The verb called `name`.

    Raises:
        TubeletError: there is none, or it needs an extra that is not installed.
    """
    available = registered()
    if name not in available:
        raise TubeletError(f"Unknown verb '{name}'", nearest(name, available))
    entry = available[name]
    for extra in entry.extras:
        require_extra(extra, f"tubelet {name}")
    verb: Verb[Any] = entry.load()
    return verb


def example_of(name: str) -> str:
    """A commented configuration of the verb called `name`, which runs on the data of `tubelet demo`.

    Raises:
        TubeletError: the verb has none.
    """
    package = registered()[name].module.partition(".")[0]
    path = files(package) / "examples" / f"{name}.yaml"
    if not path.is_file():
        raise TubeletError(f"`tubelet {name}` has no example", f"`tubelet {name} --help-all` lists its fields")
    return path.read_text(encoding="utf-8")
