"""Fields given in Python are those of the YAML, with the same errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import tubelet
from tubelet.config import configure
from tubelet.errors import TubeletError
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.sae.config import BatchTopKConfig

FIELDS = {"store": "s.zarr", "out": "runs/a", "sae": {"kind": "batchtopk", "k": 16}, "epochs": 2}


def test_keywords_a_mapping_a_file_and_an_object_mean_the_same(tmp_path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(FIELDS))
    wanted = TrainConfig.model_validate(FIELDS)
    assert configure(TrainConfig, None, FIELDS) == wanted
    assert configure(TrainConfig, FIELDS, {}) == wanted
    assert configure(TrainConfig, str(path), {}) == configure(TrainConfig, path, {}) == wanted
    assert configure(TrainConfig, wanted, {}) is wanted
    assert configure(TrainConfig, None, FIELDS | {"sae": BatchTopKConfig(k=16), "out": Path("runs/a")}) == wanted
    dotted = {"store": "s.zarr", "out": "runs/a", "sae.kind": "batchtopk", "sae.k": 16, "epochs": 2}
    assert configure(TrainConfig, None, dotted) == wanted


@pytest.mark.parametrize("of", ["mapping", "file", "object"])
def test_keywords_override_and_leave_their_neighbors(tmp_path, of: str) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(FIELDS))
    source = {"mapping": FIELDS, "file": path, "object": TrainConfig.model_validate(FIELDS)}[of]
    before = yaml.safe_dump(FIELDS)
    for fields in ({"sae": {"k": 32}}, {"sae.k": 32}):
        config = configure(TrainConfig, source, fields)
        assert (config.sae.kind, config.sae.k, config.epochs) == ("batchtopk", 32, 2)
    assert yaml.safe_dump(FIELDS) == before


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sea": {}}, r"Unknown field 'sea' in the arguments\. Did you mean 'sae'\?"),
        ({"sae": {"kind": "batchtopk", "kk": 16}}, r"Unknown field 'sae\.kk' in the arguments\. Did you mean 'k'\?"),
        ({"epochs": "many"}, r"Field 'epochs' in the arguments is invalid: .*given: 'many'.*help\(TrainConfig\)"),
        ({"steps": 1}, r"give one of steps and epochs"),
    ],
)
def test_invalid_fields_give_a_one_line_error(fields, said) -> None:
    with pytest.raises(TubeletError, match=said) as caught:
        tubelet.train(**FIELDS | fields)
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named_in_python_syntax() -> None:
    with pytest.raises(TubeletError, match=r"'out' is missing\. Give out=\.\.\."):
        tubelet.train(store="s.zarr")


def test_a_fault_of_the_file_is_not_laid_on_the_arguments(tmp_path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"sea": 1}))
    with pytest.raises(TubeletError, match=rf"Unknown field 'sea' in {path}"):
        tubelet.train(path, steps=1)
    with pytest.raises(TubeletError, match="No configuration file"):
        tubelet.train(tmp_path / "none.yaml")
    with pytest.raises(TubeletError, match="A configuration cannot be read from type 'int'"):
        tubelet.train(3)


def test_objects_are_accepted_for_their_paths(tmp_path) -> None:
    from stores import make_store
    from tubelet_trainer.run.train_result import TrainResult

    store = make_store(tmp_path / "s.zarr")
    run = TrainResult(tmp_path / "run", ())
    config = configure(TrainConfig, None, {"store": store, "out": run})
    assert (config.store, config.out) == (store.url, tmp_path / "run")
