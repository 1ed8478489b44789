"""Typed configuration: pydantic models read from YAML, overridden field by field from the command line.

    YAML file ──▶ nested dict ──▶ merge overrides (--sae.k 32) ──▶ validate ──▶ frozen model

A field that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tubelet_store.errors import TubeletError, nearest


class Config(BaseModel):
    """Base of every configuration: immutable, closed to unknown fields, documented by attribute docstrings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, populate_by_name=True
    )


C = TypeVar("C", bound=Config)

_COMMAND_LINE = "the command line"


def load_config(model: type[C], path: Path | None, overrides: Mapping[str, str]) -> C:
    """Read `path` (YAML; none: start empty), apply dotted `overrides` (texts, read as YAML), validate as `model`.

    Raises:
        TubeletError: the file is missing or is not a YAML mapping, a field is unknown, missing or of the wrong type.
    """
    tree = read_yaml_mapping(path) if path is not None else {}
    for dotted, text in overrides.items():
        set_dotted(tree, dotted, _scalar(text))
    # `--hooks blocks.6` is a list of one.
    for dotted in _wanted(model, tree, ("tuple_type", "list_type")) & overrides.keys():
        set_dotted(tree, dotted, [_scalar(overrides[dotted])])
    # `--name 007` and `--name no` are a number and a truth value in YAML; a text field means the letters.
    for dotted in _wanted(model, tree, ("string_type", "path_type")) & overrides.keys():
        set_dotted(tree, dotted, overrides[dotted])
    return validate(model, tree, str(path) if path is not None else _COMMAND_LINE, typed=overrides.keys())


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's top-level mapping, parsed by `yaml.safe_load`."""
    if not path.is_file():
        raise TubeletError(f"No configuration file at {path}", "Check the path; `--print-config` shows a full example")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise TubeletError(f"{path} is not valid YAML: {where}", "Mend the line it names") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise TubeletError(f"{path} holds a {type(tree).__name__}, not a mapping", "Write `field: value` lines")
    return tree


def set_dotted(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `tree[a][b]` for `dotted` = "a.b", making the levels that are missing."""
    *parents, leaf = dotted.split(".")
    for name in parents:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            raise TubeletError(f"'{name}' in '{dotted}' is a value, not a section", f"Set --{name} itself")
        tree = below
    tree[leaf] = value


def validate(model: type[C], tree: dict[str, Any], origin: str, typed: Collection[str] = ()) -> C:
    """Validate `tree`, read from `origin` but for the fields `typed` on the command line, as `model`.

    Raises:
        TubeletError: it does not fit; one line that names the first field at fault, and the remedy.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt required field is both unknown and missing: its spelling is what to say.
        fault = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
        # pydantic puts the tag of a discriminated union into the path; users never write it.
        path, owner = _walk(model, fault["loc"])
        field = ".".join(path)
        origin = _COMMAND_LINE if field in typed else origin
        if fault["type"] == "extra_forbidden":
            known = [name for cls in owner for name in _field_names(cls)]
            raise TubeletError(f"Unknown field '{field}' in {origin}", nearest(path[-1], known)) from error
        if fault["type"] == "missing":
            raise TubeletError(f"Field '{field}' is missing", f"Set it in the YAML file or with --{field}") from error
        message = fault["msg"].removeprefix("Value error, ")
        raise TubeletError(
            # A fault between fields has no path of its own.
            f"Field '{field}' in {origin} does not fit: {message} (given: {fault['input']!r})"
            if field
            else f"The fields in {origin} do not fit together: {message}",
            "See --print-config for every field",
        ) from error


def dump_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _wanted(model: type[Config], tree: dict[str, Any], faults_meant: tuple[str, ...]) -> set[str]:
    """Fields of `tree` at fault in one of these ways."""
    try:
        model.model_validate(tree)
    except ValidationError as error:
        faults = [fault for fault in error.errors(include_url=False) if fault["type"] in faults_meant]
        return {".".join(_walk(model, fault["loc"])[0]) for fault in faults}
    return set()


def _field_names(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _walk(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """Field path a user would write for pydantic's `loc`, and the models that could own its last part."""
    path: list[str] = []
    owners: list[type[BaseModel]] = [model]
    here: list[type[BaseModel]] = [model]
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
            continue
        holders = [m for m in here if part in _field_names(m) or part in m.model_fields]
        if not holders and part != loc[-1]:
            tagged = [m for m in here if part in _tags(m)]
            if tagged:
                here = tagged
                continue
        path.append(part)
        owners = here
        below = [
            child
            for m in holders
            for name, info in m.model_fields.items()
            if part in (name, info.alias)
            for child in models_in(info.annotation)
        ]
        here = below or here
    return path, owners


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that an annotation names, inside unions and containers too, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, tuple, dict) or get_origin(annotation) is not None:
        return [m for arg in get_args(annotation) for m in models_in(arg)]
    return []
