"""`hf://` is a URL like any other: stores are read and copied, and what goes wrong is one clear line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import REPOSITORY, REVISION, Hub, hub_server
from stores import make_plan, make_store
from tubelet_store.reader import Store, open_store

MAIN = "import sys; from tubelet.cli.main import main; sys.exit(main())"
URL = f"hf://datasets/{REPOSITORY}@{REVISION}/deep/s.zarr"

CACHED = """
import sys
from pathlib import Path
from tubelet_store.reader import open_store
from tubelet_store.cache import CacheConfig

url, local, folder = sys.argv[1:]
store, truth = open_store(url, cache=CacheConfig(directory=Path(folder))), open_store(local)
assert store.identity == truth.identity
assert store.clips().equals(truth.clips())
for shard in range(truth.plan.shards):
    assert store.shard_map("h", shard).tobytes() == truth.shard_map("h", shard).tobytes()
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """What lies in the Hub's repository."""
    folder = tmp_path_factory.mktemp("repository")
    # Shards of more than one part of the cache.
    return make_store(
        folder / "deep" / "s.zarr", make_plan(clips=10, clips_per_shard=5, grid=(8, 14, 14), hooks={"h": 768})
    )


@pytest.fixture
def hub(local: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that processes find."""
    pytest.importorskip("huggingface_hub")
    with hub_server(Path(local.url).parents[1]) as (hub, url):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the Hub's address is read where its client is imported."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_store_on_the_hub_is_cached_bit_for_bit_and_no_byte_twice(hub: Hub, local: Store, tmp_path: Path) -> None:
    hub.refusals = [503]
    done = python(CACHED, URL, local.url, str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    shards = {path: sent for path, sent in hub.sent_bytes.items() if "/activations/h/c/" in path}
    assert shards == {path: (hub.folder / path).stat().st_size for path in shards}
    assert len(shards) == local.plan.shards


def test_it_is_copied_and_verified(hub: Hub, local: Store, tmp_path: Path) -> None:
    done = python(MAIN, "copy", URL, str(tmp_path / "copy.zarr"))
    assert done.returncode == 0, done.stderr
    assert open_store(str(tmp_path / "copy.zarr")).identity == local.identity
    assert hub.sent_bytes


@pytest.mark.parametrize(
    ("url", "refusals", "words"),
    [
        (URL, [403], f"No access to {URL}/zarr.json"),
        (URL.replace(REPOSITORY, "someone/else"), [], "No store at hf://datasets/someone/else"),
        (URL.replace("deep", "flat"), [], f"No store at {URL.replace('deep', 'flat')}"),
    ],
)
def test_what_the_hub_does_not_give_is_named(hub: Hub, url: str, refusals: list[int], words: str) -> None:
    hub.refusals = refusals
    done = python(MAIN, "info", url)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["info"], ["cache"], ["copy"]])
def test_a_hub_that_is_not_reached_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    done = python(MAIN, *words, URL, *([str(tmp_path / "copy.zarr")] if words == ["copy"] else []))
    assert done.returncode == 2, done.stderr
    assert f"{URL}/zarr.json cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
