"""Who may read: requests are signed as S3 defines it, or carry no signature where none is wanted."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import fsspec.config
import pytest
import yaml

from faulty_proxy import faulty_proxy
from object_server import create_bucket, s3_environment, s3_server
from stores import make_plan, make_store
from tubelet_store import Store, TubeletError, open_store
from tubelet_store.catalog import Catalog
from tubelet_store.cli import main
from tubelet_store.mirror import MirrorConfig
from tubelet_store.objects import LocalRoot, open_root
from tubelet_store.transport import Patience, open_transport

PLAN = make_plan(clips=8, clips_per_shard=4, hooks={"h": 8})
CLIENTS = ("http", "obstore", "fsspec")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN)


@pytest.fixture
def public(local, monkeypatch) -> Iterator[str]:
    """A store that everybody may read, behind a door that refuses signatures; this process has no credentials."""
    with s3_server() as server, faulty_proxy(server) as (proxy, endpoint):
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        create_bucket(server, "public")
        root = open_root(f"s3://public/{uuid.uuid4().hex}.zarr")
        for key in LocalRoot(Path(local.url)).list_keys():
            root.replace(key, local.root.read(key))
        client = boto3.client("s3", endpoint_url=server)
        client.put_bucket_acl(Bucket="public", ACL="public-read")
        for key in LocalRoot(Path(local.url)).list_keys():
            client.put_object_acl(Bucket="public", Key=f"{root.url.partition('public/')[2]}/{key}", ACL="public-read")
        proxy.forbid_headers = ("Authorization",)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        yield root.url


class TestAnonymousReading:
    """A public store is read without credentials: by its URL, by a catalogue's word, by fsspec's settings."""

    @pytest.mark.parametrize("transport", CLIENTS)
    def test_by_the_url(self, public, local, tmp_path, transport):
        url = public.replace("s3://", "s3://anon@")
        store = open_store(url, mirror=MirrorConfig(directory=tmp_path, transport=transport))
        assert store.mirror.transport.name == transport
        assert store.shard_map("h", 1).tobytes() == local.shard_map("h", 1).tobytes()
        assert store.moments("h").count == local.moments("h").count

    @pytest.mark.parametrize("transport", CLIENTS)
    def test_by_fsspecs_settings(self, public, local, tmp_path, monkeypatch, transport):
        conf: dict[str, dict[str, str]] = {}
        # FSSPEC_S3_ANON=true, as a process reads it when it starts.
        fsspec.config.set_conf_env(conf, {"FSSPEC_S3_ANON": "true"})
        monkeypatch.setitem(fsspec.config.conf, "s3", conf["s3"])
        store = open_store(public, mirror=MirrorConfig(directory=tmp_path, transport=transport))
        assert store.shard_map("h", 0).tobytes() == local.shard_map("h", 0).tobytes()

    def test_by_a_catalogues_word(self, public, local, tmp_path, monkeypatch):
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

    @pytest.mark.parametrize("transport", CLIENTS)
    def test_without_that_word_the_missing_credentials_are_named(self, public, transport):
        with pytest.raises(TubeletError, match=r"No access to s3://public.*[Cc]redentials"):
            open_transport(public, transport, Patience(attempts=2)).read_range("zarr.json", 0, 5)

    def test_a_catalogue_may_say_no_more_than_that(self, public, tmp_path):
        path = tmp_path / "catalog.yaml"
        assert main(["catalog", "add", "shared", public.replace("s3://", "s3://anon@"), "--catalog", str(path)]) == 0
        good = path.read_text()
        for options in ("{anon: true, key: AKIA}", "{anon: 1.5}", "{key: AKIA}", "[anon]"):
            path.write_text(good.replace("{anon: true}", options))
            with pytest.raises(TubeletError, match="storage_options may hold secrets"):
                Catalog.read(str(path))
        path.write_text(good.replace("s3://public", "gs://public"))
        with pytest.raises(TubeletError, match="only S3 knows `anon`"):
            Catalog.read(str(path))


@dataclass(frozen=True)
class Asked:
    path: str
    headers: Mapping[str, str]
    by: tuple[str, int]
    connection: socket.socket


@contextmanager
def listening() -> Iterator[tuple[str, list[Asked]]]:
    """A server that answers every range with zeros; its URL, and what it was asked."""
    asked: list[Asked] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(Asked(self.path, self.headers, self.client_address, self.connection))
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            self.wfile.write(bytes(last - first + 1))

        def log_message(self, *_args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def signature(request: Asked, secret: str) -> str:
    """What the signature of `request` must be: AWS Signature Version 4, "Authenticating Requests", written anew."""
    parts = dict(part.strip().split("=", 1) for part in request.headers["Authorization"].partition(" ")[2].split(","))
    names = parts["SignedHeaders"].split(";")
    headers = "".join(f"{name}:{' '.join(request.headers[name].split())}\n" for name in names)
    path = urlsplit(request.path).path
    lines = ["GET", path, "", headers, parts["SignedHeaders"], request.headers["x-amz-content-sha256"]]
    _, day, region, service, kind = parts["Credential"].split("/")
    scope = f"{day}/{region}/{service}/{kind}"
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", request.headers["x-amz-date"], scope, digest])
    key = f"AWS4{secret}".encode()
    for word in (day, region, service, kind):
        key = hmac.new(key, word.encode(), hashlib.sha256).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def test_the_http_clients_signature_is_s3s_and_so_is_botos(monkeypatch):
    with listening() as (endpoint, asked):
        environment = {**s3_environment(endpoint), "AWS_SESSION_TOKEN": "a-token"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        key = "activations/blocks.1/c/0/a b+ü~"
        transport = open_transport("s3://bucket/deep/s.zarr", "http")
        assert transport.read_range(key, 3, 10).tobytes() == bytes(7)
        assert transport.read_range(key, 0, 1 << 20).tobytes() == bytes(1 << 20)
        boto = boto3.session.Session().client("s3")
        boto.get_object(Bucket="bucket", Key=f"deep/s.zarr/{key}", Range="bytes=3-9")["Body"].read()
        assert [request.headers["Range"] for request in asked] == ["bytes=3-9", "bytes=0-1048575", "bytes=3-9"]
        # One connection for both, and the same object as boto's.
        assert asked[0].by == asked[1].by
        assert asked[0].path == asked[2].path
        for request in asked:
            assert request.headers["X-Amz-Security-Token"] == "a-token"
            said = request.headers["Authorization"].rpartition("Signature=")[2]
            assert said == signature(request, environment["AWS_SECRET_ACCESS_KEY"])


def test_a_connection_that_the_server_ended_is_replaced(monkeypatch):
    with listening() as (endpoint, asked):
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        transport = open_transport("s3://bucket/s.zarr", "http", Patience(attempts=1))
        transport.read_range("key", 0, 5)
        asked[0].connection.shutdown(socket.SHUT_RDWR)
        assert transport.read_range("key", 0, 5).tobytes() == bytes(5)
