"""An invalid configuration is refused with the field's name and the remedy, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from tubelet.config import Config, dump_yaml, load_config, misfit
from tubelet.errors import TubeletError


class TopK(Config):
    kind: Literal["topk"] = "topk"
    k: int = 32
    """Features per token."""
    most: int = 64

    @model_validator(mode="after")
    def _fits(self) -> TopK:
        if self.k > self.most:
            raise misfit("k", f"{self.k} is more than {self.most}")
        if self.k == self.most:
            raise ValueError("k is most")
        return self


class Relu(Config):
    kind: Literal["relu"] = "relu"
    l1: float = 1.0
    """Weight of the sparsity term."""


class Data(Config):
    store: str = "s.zarr"
    """Location of the store."""
    stride: int = Field(default=1, ge=1)
    """Frames between frames."""


class Job(Config):
    """A job with a section, a union and a required field."""

    name: str
    data: Data = Data()
    sparsifier: Annotated[TopK | Relu, Field(discriminator="kind")] = TopK()
    hooks: tuple[Data, ...] = ()
    first: int = 0
    last: int = 10

    @model_validator(mode="after")
    def _in_order(self) -> Job:
        if self.first > self.last:
            raise ValueError("first lies after last")
        return self


def refused(tree: dict[str, Any]) -> str:
    with pytest.raises(TubeletError) as caught:
        load_config(Job, None, tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"name": "a", "dta": "1"}, ["Unknown field 'dta'", "Did you mean 'data'?"]),
        ({"name": "a", "data.stide": "1"}, ["Unknown field 'data.stide'", "Did you mean 'stride'?"]),
        ({"name": "a", "sparsifier.kind": "relu", "sparsifier.ll1": "1"}, ["'sparsifier.ll1'", "Did you mean 'l1'?"]),
        ({"name": "a", "sparsifier.kind": "relu", "sparsifier.k": "1"}, ["Unknown field 'sparsifier.k'"]),
        ({"name": "a", "qqq": "1"}, ["Unknown field 'qqq'", "Valid: data, first, hooks"]),
        ({}, ["Field 'name' is missing", "--name"]),
        ({"name": "a", "data.stride": "many"}, ["'data.stride'", "integer", "'many'"]),
        ({"name": "a", "data.stride": "0"}, ["'data.stride'", "greater than or equal to 1"]),
        ({"name": "a", "sparsifier.kind": "topk", "sparsifier.k": "65"}, ["Field 'sparsifier.k'", "(given: 65)"]),
        (
            {"name": "a", "sparsifier.kind": "topk", "sparsifier.most": "9"},
            ["Field 'sparsifier.k'", "32 is more than 9."],
        ),
        ({"name": "a", "sparsifier.kind": "topk", "sparsifier.k": "64"}, ["Field 'sparsifier' in", "k is most"]),
        ({"name": "a", "sparsifier.kind": "topk", "sparsifier.topk": "1"}, ["Unknown field 'sparsifier.topk'"]),
        ({"name": "a", "sparsifier.kind": "top"}, ["'sparsifier'", "'topk', 'relu'"]),
        ({"name": "a", "sparsifier.kind": "topk", "sparsifier.k": "x"}, ["Field 'sparsifier.k'"]),
        ({"name": "a", "hooks": "[{stride: 0}]"}, ["'hooks.0.stride'"]),
        ({"name": "a", "first": "11"}, ["do not fit together", "first lies after last"]),
        ({"name": "a", "first": ".nan"}, ["'first'"]),
        ({"name": "a", "name.inner": "1"}, ["'name' in 'name.inner' is a value, not a section"]),
    ],
)
def test_a_fault_names_its_field_and_the_remedy(overrides, words):
    message = refused(overrides)
    for word in words:
        assert word in message


def test_overrides_go_over_the_file_field_by_field(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ndata:\n  store: here\n  stride: 2\nsparsifier:\n  kind: relu\n")
    job = load_config(Job, path, {"data.stride": "3", "sparsifier.l1": "2"})
    assert job.data == Data(store="here", stride=3)
    assert job.sparsifier == Relu(l1=2.0)


class Chosen(Config):
    hooks: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    mixed: tuple[str | int, ...] = ()
    named: dict[str, str] = Field(default_factory=dict)


@pytest.mark.parametrize(("text", "hooks"), [("blocks.6", ("blocks.6",)), ("[a, b]", ("a", "b")), ("7", ("7",))])
def test_a_list_of_one_needs_no_brackets(text, hooks):
    assert load_config(Chosen, None, {"hooks": text}).hooks == hooks


def test_in_a_list_of_texts_too_the_letters_count_and_elsewhere_the_numbers():
    for letters in ("007", "no", "1e3", "2026-11-21"):
        assert load_config(Chosen, None, {"hooks": letters}).hooks == (letters,)
        assert load_config(Chosen, None, {"hooks": f"[a, {letters}]"}).hooks == ("a", letters)
        assert load_config(Chosen, None, {"named": f"{{a: {letters}, b: x}}"}).named == {"a": letters, "b": "x"}
    chosen = load_config(Chosen, None, {"layers": "7", "mixed": "[7, '7', a]", "hooks": "7"})
    assert (chosen.layers, chosen.mixed, chosen.hooks) == ((7,), (7, "7", "a"), ("7",))
    for wrong in ("[[7]]", "[a, {b: 7}]"):
        with pytest.raises(TubeletError, match="Field 'hooks"):
            load_config(Chosen, None, {"hooks": wrong})
    with pytest.raises(TubeletError, match="Field 'named"):
        load_config(Chosen, None, {"named": "{7: a}"})


@pytest.mark.parametrize("text", ["007", "no", "1e3", "2026-11-21", "[a"])
def test_a_text_field_takes_the_letters_that_were_typed(text):
    assert load_config(Job, None, {"name": text, "data.store": text}).model_dump()["name"] == text


def test_what_is_printed_reads_back(tmp_path):
    job = Job(name="Übung: #1", sparsifier=Relu(l1=1e-4), hooks=(Data(stride=2),))
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    assert load_config(Job, tmp_path / "job.yaml", {}) == job


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(Data, tmp_path / "empty.yaml", {}) == Data()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "holds a list"),
        ("just words", "holds a str"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, words):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(TubeletError, match=words) as caught:
        load_config(Job, path, {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_constructs_no_objects(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(f"name: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]")
    with pytest.raises(TubeletError, match="not valid YAML"):
        load_config(Job, path, {})
    assert not (tmp_path / "made").exists()


def test_a_missing_file_is_named():
    with pytest.raises(TubeletError, match=r"No configuration file at nowhere\.yaml"):
        load_config(Job, Path("nowhere.yaml"), {})


def test_a_configuration_is_immutable():
    with pytest.raises(ValidationError):
        Data().stride = 2  # type: ignore[misc]
