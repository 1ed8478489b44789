"""Typed configuration: pydantic models read from YAML, overridden field by field from the command line.

    YAML file ──▶ nested dict ──▶ merge overrides (--sae.k 32) ──▶ validate ──▶ frozen model

A field that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

import os
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from tubelet.errors import TubeletError, nearest


class Config(BaseModel):
    """Base of every configuration: immutable, closed to unknown fields, documented by attribute docstrings."""

    COMMON: ClassVar[tuple[str, ...]] = ()
    """Dotted names of the dozen fields that `tubelet VERB --help` shows first; none: all of them."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, populate_by_name=True
    )

    @classmethod
    def current_names(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The mapping that a file holds, with current field names; for files that earlier versions wrote."""
        return tree


C = TypeVar("C", bound=Config)

_COMMAND_LINE, _ARGUMENTS = "the command line", "the arguments"


def misfit(field: str, message: str) -> PydanticCustomError:
    """What a validator of a whole model raises when one field is at fault: `field`, dotted, below that model."""
    return PydanticCustomError("misfit", "{message}", {"field": field, "message": message})


def load_config(model: type[C], path: Path | None, overrides: Mapping[str, str]) -> C:
    """Read `path` (YAML; none: start empty), apply dotted `overrides` (texts, read as YAML), validate as `model`.

    Raises:
        TubeletError: the file is missing or is not a YAML mapping, a field is unknown, missing or of the wrong type.
    """
    tree = model.current_names(read_yaml_mapping(path)) if path is not None else {}
    values = {dotted: _read(text) for dotted, text in overrides.items()}
    letters = {dotted: _read(text, yaml.BaseLoader) for dotted, text in overrides.items()}
    for dotted, value in values.items():
        set_dotted(tree, dotted, value)
    # `--hooks blocks.6` is a list of one.
    for dotted in _wanted(model, tree, ("tuple_type", "list_type")) & overrides.keys():
        if "," in overrides[dotted]:
            items = ", ".join(part.strip() for part in overrides[dotted].split(","))
            raise TubeletError(
                f"--{dotted} takes a list, '{overrides[dotted]}' is a text", f"Write --{dotted} '[{items}]'"
            )
        values[dotted], letters[dotted] = [values[dotted]], [overrides[dotted]]
        set_dotted(tree, dotted, values[dotted])
    # `--name 007` and `--hooks 7` are numbers in YAML, `--name no` a truth value; a text field means the letters.
    for fault in _wanted(model, tree, ("string_type", "path_type")):
        for dotted in overrides:
            if f"{fault}.".startswith(f"{dotted}."):
                below = fault.removeprefix(dotted).split(".")[1:]
                values[dotted] = _as_typed(values[dotted], letters[dotted], below) if below else overrides[dotted]
                set_dotted(tree, dotted, values[dotted])
    return validate(model, tree, str(path) if path is not None else _COMMAND_LINE, typed=overrides.keys())


def configure(model: type[C], source: Any, fields: Mapping[str, Any]) -> C:
    """The configuration that a caller in Python gives: `source`, overridden by the keywords `fields`.

    Args:
        model: What is configured.
        source: An instance of `model`, a mapping of fields, the path of a YAML file, or None.
        fields: Values by field name, dotted or nested; mappings are merged into those of `source`. A run or a store
            may be given as an object with that path.

    Raises:
        TubeletError: a field is unknown, missing or of the wrong type; one line, as on the command line.
    """
    origin = _ARGUMENTS
    if isinstance(source, model):
        if not fields:
            return source
        tree = source.model_dump(by_alias=True, exclude_unset=True)
    elif source is None:
        tree = {}
    elif isinstance(source, Mapping):
        tree = _merged({}, source)
    elif isinstance(source, (str, os.PathLike)):
        origin = os.fspath(source)
        tree = model.current_names(read_yaml_mapping(Path(origin)))
    else:
        raise TubeletError(
            f"A configuration cannot be read from type '{type(source).__name__}'",
            f"Give keywords, the path of a YAML file, or a {model.__name__}",
        )
    for name, value in fields.items():
        value = _reference(value)
        before = _inside(tree, name.split("."))
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _merged(before, value)
        set_dotted(tree, name, value)
    return validate(model, tree, origin, typed=fields.keys(), typed_in=_ARGUMENTS)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping in which `above` overrides `below`, level by level."""
    merged = dict(below)
    for name, value in above.items():
        before = merged.get(name)
        if isinstance(value, Mapping):
            value = _merged(before if isinstance(before, Mapping) else {}, value)
        merged[name] = value
    return merged


def _reference(value: Any) -> Any:
    """The path or URL of an object that has one: a run, an open store."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.url if isinstance(getattr(value, "url", None), str) else value


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's top-level mapping, parsed by `yaml.safe_load`."""
    if not path.is_file():
        raise TubeletError(
            f"No configuration file at {path}", "Check the path; `tubelet VERB --example` prints one to start from"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise TubeletError(f"{path} is not valid YAML: {where}", "Fix the line named in the error") from error
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


def validate(
    model: type[C],
    tree: dict[str, Any],
    origin: str,
    typed: Collection[str] = (),
    typed_in: str = _COMMAND_LINE,
) -> C:
    """Validate `tree`, read from `origin` but for the fields `typed` in `typed_in`, as `model`.

    Raises:
        TubeletError: it is invalid; one line that names the first field at fault, and the remedy.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelled required field is both unknown and missing: its spelling is what to say.
        fault = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
        # pydantic puts the tag of a discriminated union into the path; users never write it.
        path, owner = _walk(model, fault["loc"], by_name=fault["type"] in ("extra_forbidden", "missing"))
        given = fault["input"]
        if fault["type"] == "misfit":
            below = fault["ctx"]["field"].split(".")
            path, given = [*path, *below], _inside(given, below)
        field = ".".join(path)
        # An invalid default was not given.
        value = "" if given is None else f" (given: {given!r})"
        # `sae={"kk": 1}` types all fields below `sae`.
        is_typed = any(f"{field}.".startswith(f"{name}.") for name in typed)
        origin = typed_in if is_typed else origin
        in_python = typed_in == _ARGUMENTS
        if fault["type"] == "extra_forbidden":
            known = [name for cls in owner for name in _field_names(cls)]
            raise TubeletError(f"Unknown field '{field}' in {origin}", nearest(path[-1], known)) from error
        if fault["type"] == "missing":
            raise TubeletError(
                f"Field '{field}' is missing",
                f"Give {field}=..." if in_python else f"Set it in the YAML file or with --{field}",
            ) from error
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = "expected a section, `field: value`"
            if not in_python:
                message += f"; on the command line --{field}.NAME VALUE"
        raise TubeletError(
            # A fault between fields has no path of its own.
            f"Field '{field}' in {origin} is invalid: {message}{value}"
            if field
            else f"The fields in {origin} do not fit together: {message}",
            f"help({model.__name__}) lists every field" if in_python else "`--help-all` lists every field",
        ) from error


def dump_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _read(text: str, loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """`text` as YAML; with BaseLoader, every scalar in it is its letters."""
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError:
        return text


def _as_typed(value: Any, letters: Any, path: list[str]) -> Any:
    """`value` with the scalars at `path` replaced by their text in `letters`."""
    if not path:
        return letters
    name, *below = path
    if isinstance(value, list):
        return [_as_typed(v, letters[i], below) if str(i) == name else v for i, v in enumerate(value)]
    return {k: _as_typed(v, letters[k], below) if k == name else v for k, v in value.items()}


def _wanted(model: type[Config], tree: dict[str, Any], faults_meant: tuple[str, ...]) -> set[str]:
    """Fields of `tree` at fault in one of these ways."""
    try:
        model.model_validate(tree)
    except ValidationError as error:
        faults = [fault for fault in error.errors(include_url=False) if fault["type"] in faults_meant]
        return {".".join(_walk(model, fault["loc"], by_name=False)[0]) for fault in faults}
    return set()


def _field_names(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _inside(tree: Any, path: list[str]) -> Any:
    """The value at `path`; None where it was not given."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else getattr(tree, name, None)
    return tree


def _walk(model: type[BaseModel], loc: tuple[int | str, ...], by_name: bool) -> tuple[list[str], list[type[BaseModel]]]:
    """Field path a user would write for pydantic's `loc`, and the models that could own its last part.

    Args:
        model: Where the path begins.
        loc: With the tags of unions.
        by_name: The last part is a field's name, known or not; otherwise it may be a tag: of a model whose
            fields do not go together.
    """
    path: list[str] = []
    owners: list[type[BaseModel]] = [model]
    models: list[type[BaseModel]] = [model]
    last = len(loc) - 1
    for number, part in enumerate(loc):
        if isinstance(part, int):
            path.append(str(part))
            continue
        holders = [m for m in models if part in _field_names(m) or part in m.model_fields]
        if not holders and (number < last or not by_name):
            tagged = [m for m in models if part in _tags(m)]
            if tagged:
                models = tagged
                continue
        path.append(part)
        owners = models
        below = [
            child
            for m in holders
            for name, info in m.model_fields.items()
            if part in (name, info.alias)
            for child in models_in(info.annotation)
        ]
        models = below or models
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
