"""Between a store and its reader lies a network: no wrong byte comes through, and every failure is healed or named."""

from __future__ import annotations

import itertools
import time

import boto3
import numpy as np
import pytest

from faulty_proxy import KINDS, faulty_proxy
from object_server import create_bucket, lead_to, s3_server
from stores import make_plan, make_store, upload
from tubelet.errors import StoreUnreachable, TubeletError
from tubelet_store.cache import CacheConfig
from tubelet_store.reader import Store, open_store
from tubelet_store.storage.client import NoAccess, RetryPolicy
from tubelet_store.storage.remote import open_client

PLAN = make_plan(clips=40, clips_per_shard=4, grid=(2, 2, 3), hooks={"h": 8})


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN)


@pytest.fixture(scope="module")
def proxy(local):
    """A proxy in front of a server that holds the store; the environment leads through it."""
    with (
        s3_server() as server,
        faulty_proxy(server, stall_s=1.5) as (proxy, url),
        pytest.MonkeyPatch.context() as patch,
    ):
        lead_to(url, patch)
        patch.setattr("tubelet_store.storage.client._FIRST_WAIT_S", 0.001)
        create_bucket(server, "bucket")
        upload(local, "s3://bucket/s.zarr")
        yield proxy


@pytest.fixture(autouse=True)
def _quiet(proxy):
    proxy.share, proxy.kinds, proxy.only = 0.0, KINDS, lambda path: True
    proxy.faults.clear()
    yield
    proxy.share = 0.0


def cached(folder, client: str = "auto", attempts: int = 8) -> Store:
    config = CacheConfig(directory=folder, client=client, attempts=attempts, timeout_s=0.7)
    return open_store("s3://bucket/s.zarr", cache=config)


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
def test_whatever_fails_the_bytes_that_are_mapped_are_right(proxy, local, tmp_path, client):
    proxy.share = 0.5
    proxy.only = lambda path: "/activations/" in path
    healed = named = 0
    for number in range(20):
        if proxy.faults.total() >= 40 and set(proxy.faults) == set(KINDS):
            break
        store = cached(tmp_path / str(number), client)
        for shard in range(PLAN.shards):
            try:
                mapped = store.shard_map("h", shard)
            except TubeletError as caught:
                named += 1
                message = str(caught)
                assert "activations/h/c/" in message
                assert "a-secret" not in message
            else:
                healed += 1
                assert mapped.tobytes() == local.shard_map("h", shard).tobytes()
    assert proxy.faults.total() >= 40
    assert set(proxy.faults) == set(KINDS)
    assert healed > 10 * named


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_is_healed(proxy, local, tmp_path, kind, client):
    store = cached(tmp_path, client)
    wanted = store.shard_object("h", 0)
    left = [1]

    def once(path: str) -> bool:
        return "/activations/" in path and bool(left) and left.pop() == 1

    proxy.kinds, proxy.share, proxy.only = (kind,), 1.0, once
    with store.cache.open(wanted) as file:
        assert file.read(wanted.clip_bytes * 4) == local.shard_map("h", 0).tobytes()
    assert proxy.faults == {kind: 1}


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
@pytest.mark.parametrize(
    ("kind", "kind_of_error", "words"),
    [
        ("flip", TubeletError, "arrives damaged|[Cc]hecksum"),
        ("expired", NoAccess, "the credentials have expired.*session token.*what has arrived is kept"),
        ("503", StoreUnreachable, "cannot be reached .2 attempts.*SlowDown"),
        ("stall", StoreUnreachable, "cannot be reached"),
        ("truncate", StoreUnreachable, "cannot be reached"),
    ],
)
def test_a_fault_that_stays_is_named_with_its_object(proxy, tmp_path, kind, kind_of_error, words, client):
    store = cached(tmp_path, client, attempts=4 if kind == "expired" else 2)
    wanted = store.shard_object("h", 1)
    proxy.kinds, proxy.share, proxy.only = (kind,), 1.0, lambda path: "/activations/" in path
    start = time.monotonic()
    with pytest.raises(kind_of_error, match=f"s3://bucket/s.zarr/activations/h/c/1/0/0/0.*{words}"):
        store.cache.open(wanted)
    assert time.monotonic() - start < 20
    assert not list((tmp_path / "objects").iterdir())


def test_the_small_objects_are_checked_too(proxy, local, tmp_path):
    proxy.kinds, proxy.share = ("flip", "truncate", "503", "reset"), 0.3
    opened = 0
    for _ in range(12):
        try:
            store = cached(tmp_path)
            table, mean = store.clips(), store.moments("h").mean
        except TubeletError:
            continue
        opened += 1
        assert table.equals(local.clips())
        assert np.array_equal(mean, local.moments("h").mean)
    assert opened >= 8
    assert proxy.faults["flip"] > 5


@pytest.fixture
def put(proxy, monkeypatch):
    """Replaces s3://bucket/replaced, past the proxy; obstore reads it in parts of 1000 bytes."""
    monkeypatch.setattr("tubelet_store.storage.obstore_client._READ_BYTES", 1000)
    client = boto3.client("s3", endpoint_url=f"http://{proxy.upstream}")
    return lambda data: client.put_object(Bucket="bucket", Key="replaced", Body=data)


@pytest.mark.parametrize("client", ["fsspec", "obstore"])
@pytest.mark.parametrize(("before", "after"), [(900, 1300), (1300, 900), (2500, 2600), (2600, 2500), (2500, 2500)])
def test_an_object_that_is_replaced_while_it_is_read_is_one_of_the_two_whole(proxy, put, before, after, client):
    client = open_client("s3://bucket", client)
    old, new = b"o" * before, b"n" * after
    outcomes = []
    for moment in range(8):
        put(old)
        requests = itertools.count()
        proxy.only = lambda path, at=moment, requests=requests: next(requests) == at and bool(put(new)) and False
        outcomes.append(client.read("replaced"))
    assert set(outcomes) == {old, new}


def test_an_object_that_is_replaced_again_and_again_is_named(proxy, put):
    client = open_client("s3://bucket", "obstore", RetryPolicy(attempts=3))
    put(b"0" * 2500)
    requests = itertools.count(1)
    proxy.only = lambda path: bool(put(str(next(requests)).encode() * 2500)) and False
    with pytest.raises(StoreUnreachable, match=r"s3://bucket/replaced cannot be reached \(3 attempts\): it was repl"):
        client.read("replaced")


def test_credentials_renewed_while_reading_are_used(proxy, monkeypatch):
    for name in ("fsspec", "obstore"):
        client = open_client("s3://bucket/s.zarr", name, RetryPolicy(attempts=4, timeout_s=1))
        assert client.size("zarr.json")
        proxy.kinds, proxy.share = ("expired",), 1.0
        left = [1, 1]
        proxy.only = lambda path, left=left: bool(left) and left.pop() == 1
        monkeypatch.setenv("AWS_SESSION_TOKEN", f"fresh-{name}")
        assert len(client.read_range("zarr.json", 0, 5)) == 5


def test_a_missing_object_is_no_fault(proxy):
    for name in ("fsspec", "obstore"):
        client = open_client("s3://bucket/s.zarr", name)
        assert client.size("nothing") is None
        with pytest.raises(FileNotFoundError, match=r"s3://bucket/s\.zarr/nothing"):
            client.read("nothing")
        with pytest.raises(FileNotFoundError):
            client.read_range("nothing", 0, 5)
        assert client.list_keys("nothing") == []
