"""A store on object storage is a store: written, finished, opened and verified there, by a server that speaks S3."""

from __future__ import annotations

import pickle
import urllib.request
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import s3fs
import scripted
import zarr

from object_server import create_bucket, lead_to, s3_environment, s3_server
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.orphans import orphan_keys
from tubelet_store.reader import open_store
from tubelet_store.storage import open_root
from tubelet_store.storage.local import LocalRoot
from tubelet_store.storage.object_root import ObjectRoot
from tubelet_store.storage.remote import RemoteRoot
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verify import verify

SECRET = s3_environment("")["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def credentials(endpoint, monkeypatch) -> Iterator[str]:
    """Environment of a process that may use the server; gives its endpoint."""
    lead_to(endpoint, monkeypatch)
    s3fs.S3FileSystem.clear_instance_cache()
    yield endpoint
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(credentials) -> str:
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    create_bucket(credentials, name)
    return name


@pytest.fixture(params=["memory", "s3"])
def url(request) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/s.zarr"
    return f"s3://{request.getfixturevalue('bucket')}/deep/s.zarr"


def test_a_remote_store_is_the_same_objects_as_a_local_one(url, tmp_path):
    scripted.write_all(url)
    scripted.write_all(str(tmp_path / "local"))
    remote, local = open_root(url), LocalRoot(tmp_path / "local")
    assert remote.list_keys() == local.list_keys()
    for key in local.list_keys():
        if key != "zarr.json":
            assert remote.read(key) == local.read(key), key
            assert remote.size(key) == local.size(key)


def test_it_opens_and_verifies_and_resumes(url, tmp_path, monkeypatch):
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path))
    writer = scripted.begin(url)
    scripted.write_shard(writer, 1)
    with pytest.raises(TubeletError, match="1 of 3 shards"):
        open_store(url)
    assert scripted.begin(url).pending() == [0, 2]
    scripted.write_all(url)
    store = open_store(url)
    assert store.complete
    assert [finding for _, found in verify(store) for finding in found] == []
    assert orphan_keys(store) == []
    assert store.moments("blocks.1").count == 8 * scripted.PLAN.grid.tokens
    assert store.clips().num_rows == 10
    assert np.isfinite(store.shard_map("blocks.1", 2).astype(np.float32)).all()
    store.root.replace("activations/blocks.1/c/0/0/0/0", b"short")
    (finding,) = [finding for _, found in verify(store) for finding in found]
    assert finding.problem.startswith("5 bytes instead of")


def test_the_first_writer_of_a_shard_wins(url):
    writer = scripted.begin(url)
    scripted.write_shard(writer, 0)
    before = writer.committed(0)
    scripted.write_shard(writer, 0)
    assert writer.committed(0) == before


def test_zarr_python_reads_it_over_s3(bucket, credentials):
    url = f"s3://{bucket}/s.zarr"
    scripted.write_all(url)
    array = zarr.open_group(url, mode="r")["activations/blocks.1"]
    assert np.isnan(array[scripted.FAILED].astype(np.float32)).all()
    assert np.isfinite(array[0].astype(np.float32)).all()


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_every_root_keeps_the_same_promises(kind, tmp_path, request):
    if kind == "s3":
        url = f"s3://{request.getfixturevalue('bucket')}/x"
    else:
        url = str(tmp_path / "x") if kind == "local" else f"memory://{uuid.uuid4().hex}"
    root: ObjectRoot = open_root(url)
    assert root.list_keys() == root.list_keys("a") == []
    assert root.size("a/b") is None
    with pytest.raises(FileNotFoundError):
        root.read("a/b")
    assert root.create("a/b", b"one")
    assert not root.create("a/b", b"two")
    assert root.read("a/b") == b"one"
    root.replace("a/b", b"three")
    root.replace("ab/c", b"")
    assert root.read("a/b") == b"three"
    assert root.size("a/b") == 5
    assert root.list_keys() == ["a/b", "ab/c"]
    assert root.list_keys("a") == ["a/b"]
    with root.scratch() as folder:
        (folder / "object").write_bytes(b"four")
        root.publish("a/d", folder / "object")
        assert root.list_keys("a") == ["a/b", "a/d"]
    assert not folder.exists()
    assert root.read("a/d") == b"four"


def test_what_travels_to_a_worker_holds_no_credentials(bucket):
    root = open_root(f"s3://{bucket}/x")
    root.replace("a", b"1")
    traveled = pickle.dumps(root)
    assert SECRET.encode() not in traveled
    assert b"AKIAEXAMPLE" not in traveled
    arrived = pickle.loads(traveled)
    assert isinstance(arrived, RemoteRoot)
    assert arrived.read("a") == b"1"


class TestClearErrors:
    """One line with a remedy, no traceback, no secret."""

    def refused(self, capsys, url: str, *words: str) -> None:
        for attempt in (
            lambda: StoreWriter.begin(url, scripted.PLAN, scripted.planned_table(10), {}),
            lambda: open_store(url),
        ):
            with pytest.raises(TubeletError) as caught:
                attempt()
            message = str(caught.value)
            assert "\n" not in message
            assert SECRET not in message
            assert any(word in message for word in words), message
        assert main(["verify", url]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize("url", ["s3://", "s3:///", "memory://"])
    def test_no_bucket(self, capsys, url):
        self.refused(capsys, url, "names no bucket")

    def test_no_such_bucket(self, capsys, credentials):
        self.refused(capsys, "s3://no-such-bucket/s.zarr", "Create the bucket", "No store at")

    def test_no_credentials(self, capsys, credentials, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        self.refused(capsys, "s3://some-bucket/s.zarr", "credentials")

    def test_wrong_credentials(self, capsys, bucket, endpoint):
        self.enforce_auth(endpoint, "0")
        try:
            self.refused(capsys, f"s3://{bucket}/s.zarr", "No access to")
        finally:
            self.enforce_auth(endpoint, "inf")

    def enforce_auth(self, endpoint: str, after: str) -> None:
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=after.encode(), headers=headers)
        with urllib.request.urlopen(request) as answer:
            assert isinstance(answer.read(), bytes)

    def test_no_server(self, capsys, credentials, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(TubeletError, match="cannot be reached"):
            open_store("s3://some-bucket/s.zarr")

    def test_an_unknown_scheme(self, capsys):
        self.refused(capsys, "nonsense://bucket/s.zarr", "No filesystem for")


def test_a_damaged_download_is_no_store(bucket):
    root = open_root(f"s3://{bucket}/s.zarr")
    root.replace("zarr.json", b"{")
    with pytest.raises(TubeletError, match="without Tubelet's attributes"):
        open_store(root.url)
