"""The fields of a configuration as a flat list: the source of `--help` and of the documentation's tables.

Config model ──▶ fields_of ──▶ Field("sampling.frames", default, values, meaning, kinds), ...
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ByteSize
from pydantic_core import to_jsonable_python

from tubelet.config import Config, models_in

REQUIRED = "required"


@dataclass(frozen=True)
class Field:
    """One field, or the heading of a section of them."""

    path: str
    """Dotted, as the command line takes it: `sampling.frames`."""
    default: str
    """As YAML writes it, or `required`."""
    meaning: str
    values: tuple[str, ...] = ()
    """The only values it takes, where they can be listed."""
    kinds: tuple[str, ...] = ()
    """Kinds of its section that have it; empty where all have it."""
    is_section: bool = False
    is_required: bool = False
    is_switch: bool = False
    """It is true or false, so that its name alone says true."""


def fields_of(model: type[Config]) -> list[Field]:
    """Every field of `model` in order, sections (with a heading) unfolded, kinds of a section merged."""
    return _fields(model, None, "")


def _fields(model: type[Config], instance: Any, prefix: str) -> list[Field]:
    fields = []
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        meaning = " ".join((info.description or "").split())
        required = info.is_required() and not isinstance(instance, model)
        default = None if required else _default(model, instance, name)
        text = REQUIRED if required else "" if isinstance(default, Config) else _as_yaml(default)
        sections = [m for m in models_in(info.annotation) if issubclass(m, Config)]
        if not sections:
            is_switch = bool in (info.annotation, *get_args(info.annotation))
            values = _literals(info.annotation)
            fields.append(Field(path, text, meaning, values, is_required=required, is_switch=is_switch))
            continue
        fields.append(Field(path, text, meaning, is_section=True, is_required=required))
        fields += _merged(
            [(section, _fields(section, default, f"{path}.")) for section in sections], default, f"{path}.kind"
        )
    return fields


def _merged(variants: list[tuple[type[Config], list[Field]]], default: Any, tag_path: str) -> list[Field]:
    """Fields of a section that is one of several models, told apart by their `kind`: the common ones once, first."""
    if len(variants) == 1:
        return variants[0][1]
    kinds = {model: _literals(model.model_fields["kind"].annotation)[0] for model, _ in variants}
    holders: dict[Field, list[str]] = {}
    for model, fields in variants:
        for field in fields:
            if field.path != tag_path:
                holders.setdefault(field, []).append(kinds[model])
    first = variants[0][1]
    tag = next(field for field in first if field.path == tag_path)
    text = kinds.get(type(default), REQUIRED)
    meaning = tag.meaning or "Which variant; each has its own fields."
    values, required = tuple(kinds.values()), text == REQUIRED
    merged = [replace(tag, default=text, values=values, meaning=meaning, is_required=required)]
    common = [field for field, having in holders.items() if len(having) == len(variants)]
    special = [replace(f, kinds=tuple(h)) for f, h in holders.items() if len(h) < len(variants)]
    return merged + common + special


def _default(model: type[Config], instance: Any, name: str) -> Any:
    if isinstance(instance, model):
        return getattr(instance, name)
    return model.model_fields[name].get_default(call_default_factory=True)


def _as_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, ByteSize):
        return value.human_readable()
    return (
        yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10_000)
        .removesuffix("\n")
        .removesuffix("\n...")
    )


def _literals(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    return tuple(value for part in get_args(annotation) for value in _literals(part))
