"""The command `tubelet VERB`.

Each room registers its verbs under the entry-point group `tubelet.verbs`. An entry point names the extra it needs, so a
machine with only the trainer installed shows only the verbs it can run.

    tubelet VERB [POSITIONAL ...] [CONFIG.yaml] [--field value] [--section.field=value] [--print-config]
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from packaging.requirements import Requirement

from tubelet.cli.fields import REQUIRED, fields_of
from tubelet.config import Config, dump_yaml, load_config
from tubelet.errors import TubeletError, nearest

C = TypeVar("C", bound=Config)


# What a path or a disk may be at fault for; other errors of the system are ours.
_USERS_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status 0: done; 1: done, with findings; 2: a mistake to mend; 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except TubeletError as error:
        print(f"tubelet: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # `tubelet info STORE | head` closed the pipe: what is left to print, the exit's flush included, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in _USERS_ERRORS or (error.filename is None and error.errno != errno.ENOSPC):
            raise
        where = f"{error.filename}: " if error.filename else ""
        problem, remedy = error.strerror, "Check the path, its permissions and whether its disk may be written"
        if error.errno == errno.EEXIST:
            remedy = "Choose another path"
        if error.errno == errno.ENOSPC:
            problem, remedy = "No space left on the device", "Work done is kept: free some space, run again"
        print(f"tubelet: error: {where}{problem}. {remedy}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tubelet: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130


def run(arguments: list[str]) -> int:
    """Run one verb and return its exit status; a mistake is raised, not printed."""
    available = {entry.name: entry for entry in entry_points(group="tubelet.verbs")}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(available))
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"tubelet {version('tubelet')}")
        return 0
    name = arguments[0]
    if name not in available:
        raise TubeletError(f"Unknown verb '{name}'", nearest(name, available))
    entry = available[name]
    if missing := _missing_packages(entry):
        extra = entry.extras[0]
        raise TubeletError(
            f"`tubelet {name}` needs {', '.join(missing)}, not installed here", f"Run: pip install 'tubelet[{extra}]'"
        )
    verb: Verb[Any] = entry.load()
    return _run(verb, arguments[1:])


def _run(verb: Verb[C], arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(_usage(verb))
        return 0
    print_config = "--print-config" in arguments
    path, overrides = parse_arguments(verb, [a for a in arguments if a != "--print-config"])
    config = load_config(verb.config(), path, overrides)
    if print_config:
        print(dump_yaml(config), end="")
        return 0
    return verb.run(config)


def parse_arguments(verb: Verb[Any], arguments: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Split `arguments` into the YAML file (if any) and the overriding texts by dotted field name.

    Raises:
        TubeletError: too many positionals, or an option without a value.
    """
    path: Path | None = None
    overrides: dict[str, str] = {}
    free = list(verb.positionals)
    queue = list(arguments)
    rest: list[str] = []
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            field, equals, text = word[2:].partition("=")
            field = field.replace("-", "_")
            if not equals and queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            elif not equals:
                if any(each.path == field and not each.is_switch for each in fields_of(verb.config())):
                    raise TubeletError(f"--{field} needs a value", f"Write --{field} VALUE")
                # A bare option is a switch: `--json` means `--json true`.
                text = "true"
            overrides[field] = text
        elif verb.settings_file and word.endswith((".yaml", ".yml", ".json")) and path is None and "#" not in word:
            path = Path(word)
        elif free and free[0].endswith("..."):
            rest.append(word)
        elif free:
            overrides[free.pop(0)] = word
        else:
            raise TubeletError(f"`tubelet {verb.name}` does not take '{word}'", f"See `tubelet {verb.name} --help`")
    if rest:
        overrides[free[0].removesuffix("...")] = json.dumps(rest, ensure_ascii=False)
    return path, overrides


def _missing_packages(entry: EntryPoint) -> list[str]:
    """Distributions that the entry point's extra asks for and that are not installed."""
    missing: dict[str, None] = {}
    requirements = [Requirement(line) for line in requires("tubelet") or []]
    extras = list(entry.extras)
    # The list grows while it is walked: `all` asks for tubelet's other extras.
    for extra in extras:
        for requirement in requirements:
            marker = requirement.marker
            if marker is None or not marker.evaluate({"extra": extra}) or marker.evaluate({"extra": ""}):
                continue
            if requirement.name == "tubelet":
                extras += sorted(requirement.extras - set(extras))
                continue
            try:
                version(requirement.name)
            except PackageNotFoundError:
                missing[requirement.name] = None
    return list(missing)


def _overview(available: dict[str, EntryPoint]) -> str:
    lines = ["tubelet: cache what a frozen video backbone thinks, train sparse autoencoders on it.", "", "Verbs:"]
    hidden = []
    for name, entry in sorted(available.items()):
        if _missing_packages(entry):
            hidden.append(f"{name} (pip install 'tubelet[{entry.extras[0]}]')")
            continue
        verb: Verb[Any] = entry.load()
        lines.append(f"  {name:<10} {verb.summary}")
    if hidden:
        lines += ["", "Not installed here: " + ", ".join(hidden)]
    lines += ["", "`tubelet VERB --help` lists a verb's fields; `tubelet VERB --print-config` shows what would run."]
    return "\n".join(lines)


def _usage(verb: Verb[Any]) -> str:
    words = " ".join(name.upper() for name in verb.positionals)
    lines = [
        f"usage: tubelet {verb.name} {words} [CONFIG.yaml] [--field value ...] [--print-config]".replace("  ", " "),
        "",
        verb.summary,
        "",
        "Fields:",
    ]
    lines += list(describe_fields(verb.config()))
    return "\n".join(lines)


def describe_fields(model: type[Config]) -> list[str]:
    """One line per field of `model`, sections unfolded: name, default, the kinds that have it, meaning."""
    lines = []
    for field in fields_of(model):
        default = f"default {field.default}" if field.default and field.default != REQUIRED else field.default
        notes = [default, " | ".join(field.values), f"{' or '.join(field.kinds)} only" if field.kinds else ""]
        shown = f"  ({'; '.join(note for note in notes if note)})" if any(notes) else ""
        lines.append(f"  --{field.path}{'.…' if field.is_section else ''}{shown}  {field.meaning}".rstrip())
    return lines
