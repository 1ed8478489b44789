"""Who may read: requests are signed as S3 defines it, or carry no signature where none is wanted."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec.config
import pytest
import yaml

from faulty_proxy import faulty_proxy
from object_server import create_bucket, lead_to, s3_server
from stores import make_plan, make_store, upload
from tubelet.cli.main import main
from tubelet.errors import TubeletError
from tubelet_store.cache import CacheConfig
from tubelet_store.catalog.catalog import Catalog
from tubelet_store.reader import Store, open_store
from tubelet_store.storage import open_root
from tubelet_store.storage.client import RetryPolicy
from tubelet_store.storage.local import LocalRoot
from tubelet_store.storage.remote import open_client

PLAN = make_plan(clips=8, clips_per_shard=4, hooks={"h": 8})
CLIENTS = ("obstore", "fsspec")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN)


@pytest.fixture
def public(local, monkeypatch) -> Iterator[str]:
    """A store with public read access, on a server that refuses signatures; this process has no credentials."""
    with s3_server() as server, faulty_proxy(server) as (proxy, endpoint):
        lead_to(endpoint, monkeypatch)
        create_bucket(server, "public")
        root = open_root(upload(local, f"s3://public/{uuid.uuid4().hex}.zarr"))
        client = boto3.client("s3", endpoint_url=server)
        client.put_bucket_acl(Bucket="public", ACL="public-read")
        for key in LocalRoot(Path(local.url)).list_keys():
            client.put_object_acl(Bucket="public", Key=f"{root.url.partition('public/')[2]}/{key}", ACL="public-read")
        proxy.forbid_headers = ("Authorization",)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        yield root.url


class TestAnonymousReading:
    """A public store is read without credentials: by its URL, by a catalog's word, by fsspec's settings."""

    @pytest.mark.parametrize("client", CLIENTS)
    def test_by_the_url(self, public, local, tmp_path, client):
        url = public.replace("s3://", "s3://anon@")
        store = open_store(url, cache=CacheConfig(directory=tmp_path, client=client))
        assert store.cache.client.name == client
        assert store.shard_map("h", 1).tobytes() == local.shard_map("h", 1).tobytes()
        assert store.moments("h").count == local.moments("h").count

    @pytest.mark.parametrize("client", CLIENTS)
    def test_by_fsspecs_settings(self, public, local, tmp_path, monkeypatch, client):
        conf: dict[str, dict[str, str]] = {}
        # FSSPEC_S3_ANON=true, as a process reads it when it starts.
        fsspec.config.set_conf_env(conf, {"FSSPEC_S3_ANON": "true"})
        monkeypatch.setitem(fsspec.config.conf, "s3", conf["s3"])
        store = open_store(public, cache=CacheConfig(directory=tmp_path, client=client))
        assert store.shard_map("h", 0).tobytes() == local.shard_map("h", 0).tobytes()

    def test_by_a_catalogs_word(self, public, local, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["catalog", "add", "shared", public.replace("s3://", "s3://anon@")]) == 0
        tree = yaml.safe_load(Path("catalog.yaml").read_text())
        assert tree["data"]["shared/h.zarr"]["kwargs"] == {
            "url": public,
            "storage_options": {"anon": True},
            "root": "activations/h",
        }
        assert open_store("catalog.yaml#shared").identity == local.identity
        assert main(["catalog", "check"]) == 0
        assert main(["pull", "shared", "copy.zarr"]) == 0
        assert open_store("copy.zarr").identity == local.identity
        intake = pytest.importorskip("intake")
        assert intake.open_catalog("catalog.yaml")["shared/h"].read().shape == (8, 4, 15, 8)

    @pytest.mark.parametrize("client", CLIENTS)
    def test_without_that_word_the_missing_credentials_are_named(self, public, client):
        with pytest.raises(TubeletError, match=r"No access to s3://public.*[Cc]redentials"):
            open_client(public, client, RetryPolicy(attempts=2)).read_range("zarr.json", 0, 5)

    def test_a_catalog_may_say_no_more_than_that(self, public, tmp_path):
        path = tmp_path / "catalog.yaml"
        assert main(["catalog", "add", "shared", public.replace("s3://", "s3://anon@"), "--catalog", str(path)]) == 0
        good = path.read_text()
        for options in ("{anon: true, key: AKIA}", "{anon: 1.5}", "{key: AKIA}", "[anon]"):
            path.write_text(good.replace("{anon: true}", options))
            with pytest.raises(TubeletError, match="storage_options may hold secrets"):
                Catalog.read(str(path))
        path.write_text(good.replace("s3://public", "gs://public"))
        with pytest.raises(TubeletError, match="`anon` is an option of S3 only"):
            Catalog.read(str(path))
