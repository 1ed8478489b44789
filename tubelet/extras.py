"""Which optional dependencies (extras of the distribution `tubelet`) are installed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from tubelet.errors import TubeletError


def missing_packages(extras: Iterable[str]) -> list[str]:
    """Distributions that these extras need and that are not installed, each once."""
    missing: dict[str, None] = {}
    pending = list(extras)
    # The list grows while it is walked: `all` requires tubelet's other extras.
    for extra in pending:
        for name, extras_of_it in _requirements(extra):
            if name == "tubelet":
                pending += sorted(extras_of_it - set(pending))
                continue
            try:
                version(name)
            except PackageNotFoundError:
                missing[name] = None
    return list(missing)


def require_extra(extra: str, what: str) -> None:
    """Make sure that `extra` is installed, which `what` needs.

    Raises:
        TubeletError: it is not; names what is missing and the command that installs it.
    """
    if missing := missing_packages([extra]):
        raise TubeletError(
            f"`{what}` needs {', '.join(missing)}, not installed here", f"Run: pip install 'tubelet[{extra}]'"
        )


@cache
def _requirements(extra: str) -> list[tuple[str, set[str]]]:
    """What `extra` adds to the dependencies: names, and the extras asked for."""
    from packaging.requirements import Requirement

    added = []
    for line in requires("tubelet") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            added.append((requirement.name, set(requirement.extras)))
    return added
