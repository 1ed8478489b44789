"""What a release declares: one version, pins that satisfy the requirements, a smoke test for every extra."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from smoke import ENVIRONMENTS

import tubelet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def test_the_version_is_defined_once():
    assert version("tubelet") == PROJECT["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]
    code = "".join(path.read_text() for path in Path(tubelet.__file__).parent.rglob("*.py"))
    assert f'"{PROJECT["version"]}"' not in code


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): pin for name, pin in pins.items()}
    every = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
    wanted = [requirement for requirement in every if requirement.name != "tubelet"]
    assert wanted
    unpinned = {each.name for each in wanted if canonicalize_name(each.name) not in pinned}
    assert not unpinned
    refused = {str(each) for each in wanted if pinned[canonicalize_name(each.name)] not in each.specifier}
    assert not refused


def test_every_extra_is_installed_and_used_by_the_smoke_test():
    assert {extra for env in ENVIRONMENTS for extra in env.extras} == EXTRAS.keys() - {"dev"}
    # An environment is installed after those below it.
    names = [env.name for env in ENVIRONMENTS]
    assert all(names.index(below) < names.index(env.name) for env in ENVIRONMENTS for below in env.on)
