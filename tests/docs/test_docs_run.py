"""The commands and the Python on the pages, run in one folder in an order in which they work: `make docs-run`.

The demo's data comes first, at a smaller size; the pages' configurations are written to the files that they name.
Blocks with a comment such as `<!-- parsed: cluster -->` above them are not run; `test_docs_commands.py` parses those.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest

pytestmark = [pytest.mark.docs_run, pytest.mark.timeout(600)]

# Pages whose commands need the files of others come after them.
FIRST = ["demo", "videos", "extract", "estimate", "info", "verify", "copy", "push", "pull", "train", "export", "import"]
SMALLER = {"tubelet demo": "tubelet demo --videos 48 --epochs 2"}
"""Commands that run at a smaller size here."""


def _in_order() -> list[Path]:
    names = {page.stem: page for page in pages.PAGES if page.parent.name == "verbs"}
    first = [names[name] for name in FIRST]
    # `test_contributing.py` runs the examples of CONTRIBUTING.md.
    return [*first, *(page for page in pages.PAGES if page not in first and page.name != "CONTRIBUTING.md")]


def _blocks() -> list[pages.Snippet]:
    return [block for page in _in_order() for block in pages.snippets("bash|python", page) if not block.parsed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands run, with every configuration of the pages."""
    folder = tmp_path_factory.mktemp("docs-run")
    shutil.copy(pages.ROOT / "catalog.yaml", folder)
    for snippet in pages.snippets("yaml"):
        named = re.match(r"# ([\w-]+\.yaml)", snippet.text)
        if named is not None and not snippet.parsed:
            assert not (folder / named[1]).exists(), f"{snippet.where}: another page has a {named[1]} too"
            (folder / named[1]).write_text(snippet.text)
    return folder


@pytest.mark.parametrize("block", _blocks(), ids=lambda block: block.where)
def test_it_runs(block: pages.Snippet, folder: Path) -> None:
    text = "\n".join(SMALLER.get(line.partition(" #")[0].strip(), line) for line in block.text.splitlines())
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TUBELET_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        # The demo's tensors are so small that threads would only wait for each other.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run([*command, text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
