"""`hf://` is a URL like any other; without a network it is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MAIN = "import sys; from tubelet_store.cli import main; sys.exit(main())"


@pytest.mark.parametrize("words", [["info"], ["mirror"], ["copy"]])
def test_a_hub_that_is_not_reached_is_named(tmp_path, words):
    pytest.importorskip("huggingface_hub")
    url = "hf://datasets/someone/activations@main/s.zarr"
    command = [sys.executable, "-c", MAIN, *words, url, *([str(tmp_path / "copy.zarr")] if words == ["copy"] else [])]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert f"{url}/zarr.json cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
