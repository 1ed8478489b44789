"""Writing to object storage: created once, retried, checked on arrival, kept on disk while the server is down."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scripted

from faulty_proxy import WRITE_KINDS, FaultyProxy, faulty_proxy
from object_server import create_bucket, lead_to, s3_server
from tubelet.errors import StoreUnreachable, TubeletError
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.finished_shard import FinishedShard
from tubelet_store.reader import open_store
from tubelet_store.spool import Spool, UploadConfig
from tubelet_store.storage import open_root, upload
from tubelet_store.storage.client import RetryPolicy
from tubelet_store.storage.upload import Uploader
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verify import verify


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before an S3 server; the environment leads to it."""
    with s3_server() as server, faulty_proxy(server, seed=1, stall_s=0.05) as (proxy, endpoint):
        create_bucket(server, "bucket")
        lead_to(endpoint, monkeypatch)
        yield proxy


@pytest.fixture
def url() -> str:
    """A store of this test's own: moto's servers of one process share their content."""
    return f"s3://bucket/{uuid.uuid4().hex}.zarr"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives up at once."""
    monkeypatch.setattr(upload, "_PATIENCE", RetryPolicy(attempts=1, timeout_s=2))
    monkeypatch.setattr(Uploader.__init__, "__defaults__", (RetryPolicy(attempts=1, timeout_s=2),))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


Finish = Callable[..., FinishedShard]


@pytest.fixture
def finished() -> Iterator[Finish]:
    """Computes a shard; a `scale` other than 1 gives other bytes, as another machine's rounding would."""
    with contextlib.ExitStack() as stack:

        def finish(writer: StoreWriter, shard: int, scale: float = 1.0) -> FinishedShard:
            shard_writer = stack.enter_context(writer.shard(shard))
            rng = np.random.default_rng(shard)
            for _ in writer.plan.shard_range(shard):
                arrays = {h.name: scale * rng.standard_normal(writer.plan.clip_shape(h)) for h in writer.plan.hooks}
                special = {h.name: scale * rng.standard_normal(writer.plan.special_shape(h)) for h in writer.plan.hooks}
                shard_writer.append(ClipOutcome(status="ok"), arrays, special)
            return shard_writer.finish()

        yield finish


def test_faults_on_the_way_leave_the_same_store(proxy: FaultyProxy, url: str, tmp_path: Path) -> None:
    scripted.write_all(str(tmp_path / "local"))
    proxy.share, proxy.kinds, proxy.write_kinds = 0.2, ("500", "503", "truncate", "reset"), WRITE_KINDS
    scripted.write_all(url)
    proxy.share = 0.0
    assert sum(proxy.faults.values()) > 10, proxy.faults
    assert open_store(url).identity == open_store(str(tmp_path / "local")).identity
    assert [finding for _, findings in verify(open_store(url)) for finding in findings] == []


def test_a_large_object_goes_up_in_parts_and_its_digest_with_it(
    proxy: FaultyProxy, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_PART_BYTES", 5 << 20)
    data = np.random.default_rng(0).integers(0, 256, (12 << 20) + 7, np.uint8).tobytes()
    (tmp_path / "object").write_bytes(data)

    digest = hashlib.sha256(data).hexdigest()
    root, uploader = open_root(url), Uploader(url)
    assert root.deposit("a", tmp_path / "object", digest)
    assert root.read("a") == data
    assert uploader.digest("a") == digest
    # Again: adopted. Other bytes: left alone.
    assert root.deposit("a", tmp_path / "object", digest)
    (tmp_path / "object").write_bytes(data[:-1] + b"x")
    other = hashlib.sha256(data[:-1] + b"x").hexdigest()
    assert not root.deposit("a", tmp_path / "object", other)
    assert root.read("a") == data


def test_two_writers_of_a_shard_end_in_one_sound_shard(proxy: FaultyProxy, url: str, finished: Finish) -> None:
    writer = scripted.begin(url)
    # One died after its first object; the other computed slightly other bytes.
    dead = finished(writer, 0, scale=1.001)
    first = dead.commit.objects[0]
    open_root(url).deposit(first.key, dead.files[first.key], first.sha256)
    commit = writer.publish(finished(writer, 0))
    assert commit.objects[0] == first
    assert commit.objects[1:] == finished(writer, 0).commit.objects[1:]
    # Its moments are those of the bytes that lie there.
    hook = writer.plan.hooks[0].name
    stored = np.frombuffer(open_root(url).read(first.key)[: -16 * writer.plan.clips_per_shard - 4], np.uint16)
    values = stored.view(writer.plan.numpy_dtype).astype(np.float64)
    moments = open_store(url, allow_unfinished=True).moments(hook)
    np.testing.assert_allclose(moments.mean, values.reshape(-1, len(moments.mean)).mean(axis=0), atol=1e-6)
    # The first record is never replaced.
    assert writer.publish(finished(writer, 0)) == commit


def test_an_object_in_which_other_clips_failed_is_refused_by_name(
    proxy: FaultyProxy, url: str, finished: Finish
) -> None:
    writer = scripted.begin(url)
    with writer.shard(0) as shard_writer:
        for _ in writer.plan.shard_range(0):
            shard_writer.append(ClipOutcome.failure("open_failed", "on purpose"))
        dead = shard_writer.finish()
        first = dead.commit.objects[0]
        open_root(url).deposit(first.key, dead.files[first.key], first.sha256)
    with pytest.raises(TubeletError, match=f"{first.key} was left by another run"):
        writer.publish(finished(writer, 0))


def test_a_server_without_conditional_writes_is_found_out(
    proxy: FaultyProxy, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert open_root(url).probe_create()
    assert "conditional" not in caplog.text
    proxy.drop_headers = ("If-None-Match",)
    with caplog.at_level(logging.WARNING, "tubelet"):
        assert not open_root(url).probe_create()
    assert "ignores conditional writes" in caplog.text
    assert open_root(url).list_keys() == []


def test_a_job_that_goes_on_is_warned_as_one_that_begins(
    proxy: FaultyProxy, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.drop_headers = ("If-None-Match",)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tubelet"):
            scripted.begin(url)
        assert "ignores conditional writes" in caplog.text


class TestSpool:
    def test_what_cannot_be_uploaded_waits_and_goes_up_later(
        self, proxy: FaultyProxy, url: str, quick: None, tmp_path: Path, finished: Finish
    ) -> None:
        writer = scripted.begin(url)
        spool = Spool(UploadConfig(spool_dir=tmp_path, spool_mb=1), url, writer.plan)
        shard = finished(writer, 1)
        proxy.share, proxy.write_kinds, proxy.kinds = 1.0, ("503",), ("503",)
        with pytest.raises(StoreUnreachable):
            writer.publish(shard)
        assert spool.keep(shard)
        assert spool.shards() == [1]
        assert writer.drain(spool) == []

        # Another store's spool, or another plan's, is not ours.
        assert Spool(UploadConfig(spool_dir=tmp_path), "s3://bucket/t.zarr", writer.plan).shards() == []
        other = writer.plan.model_copy(update={"clip_table": "sha256:other"})
        assert Spool(UploadConfig(spool_dir=tmp_path), url, other).shards() == []

        proxy.share = 0.0
        assert writer.drain(spool) == [1]
        assert spool.shards() == []
        assert writer.committed(1) == shard.commit
        assert writer.drain(spool) == []

    def test_it_is_bounded(self, proxy: FaultyProxy, url: str, tmp_path: Path, finished: Finish) -> None:
        writer = scripted.begin(url)
        spool = Spool(UploadConfig(spool_dir=tmp_path, spool_mb=0), url, writer.plan)
        shard = finished(writer, 1)
        assert not spool.keep(shard)
        assert all(path.exists() for path in shard.files.values())

    def test_a_half_moved_shard_is_no_shard(
        self, proxy: FaultyProxy, url: str, tmp_path: Path, finished: Finish
    ) -> None:
        writer = scripted.begin(url)
        spool = Spool(UploadConfig(spool_dir=tmp_path), url, writer.plan)
        spool.keep(finished(writer, 1))
        (entry,) = tmp_path.glob("*/1")
        entry.rename(entry.parent / "partial-1")
        assert spool.shards() == []
        spool.discard_partial()
        assert not (entry.parent / "partial-1").exists()


def test_credentials_in_a_url_are_refused() -> None:
    with pytest.raises(TubeletError, match="holds credentials before '@'") as caught:
        open_root("s3://key:secret@bucket/s.zarr")
    assert "secret" not in str(caught.value)
