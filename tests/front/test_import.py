"""`import tubelet` is quick and loads nothing heavy; the API is found without loading it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "dask", "distributed", "zarr", "numpy", "pandas", "pydantic", "transformers", "matplotlib")
LIMIT_S = 0.3


def _fresh(code: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_tubelet_is_quick_and_loads_nothing_heavy() -> None:
    found = _fresh(
        "import time; begin = time.process_time()\n"
        "import tubelet, sys, json\n"
        "seconds = time.process_time() - begin\n"
        "print(json.dumps({'seconds': seconds, 'names': dir(tubelet), 'modules': sorted(sys.modules)}))"
    )
    assert found["seconds"] < LIMIT_S
    assert not set(HEAVY) & set(found["modules"])
    assert {"open_store", "load_sae", "extract", "train", "evaluate", "edit", "gallery", "study"} <= set(found["names"])
    assert {"TubeletError", "__version__"} <= set(found["names"])


def test_a_store_opens_without_torch_and_dask(tmp_path) -> None:
    from stores import make_store

    store = make_store(tmp_path / "s.zarr")
    code = f"import tubelet, sys, json; tubelet.open_store({store.url!r}); print(json.dumps(sorted(sys.modules)))"
    assert not {"torch", "dask", "distributed"} & set(_fresh(code))


def test_every_name_of_the_api_exists_and_says_what_it_does() -> None:
    import tubelet

    for name in dir(tubelet):
        assert getattr(tubelet, name) is not None
        if name != "__version__":
            assert getattr(tubelet, name).__doc__
    assert set(tubelet.__all__) == set(dir(tubelet))


def test_an_unknown_name_is_an_attribute_error() -> None:
    import tubelet

    with pytest.raises(AttributeError, match="opn_store"):
        tubelet.opn_store  # noqa: B018
