"""Videos on object storage: one request each, in bounded memory, cut short or too large without harm."""

from __future__ import annotations

import os
from collections.abc import Iterator

import boto3
import numpy as np
import pytest

import barcode
from faulty_proxy import FaultyProxy, faulty_proxy
from object_server import create_bucket, lead_to, s3_server
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.sampling import UniformSampling

EIGHT = UniformSampling(frames=8)
LIMIT_MB = 192


@pytest.fixture(scope="module")
def storage(barcode_clips) -> Iterator[tuple[FaultyProxy, str]]:
    """A server with a small video, the same with much room at its end, and one that is larger than allowed."""
    with s3_server() as endpoint, faulty_proxy(endpoint) as (proxy, address):
        create_bucket(endpoint, "videos")
        client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        video = barcode_clips["h264"].read_bytes()
        for key, room_mb in (("small.mp4", 0), ("roomy.mp4", 160), ("huge.mp4", 200)):
            room = (room_mb << 20).to_bytes(4) + b"free" + bytes((room_mb << 20) - 8) if room_mb else b""
            client.put_object(Bucket="videos", Key=key, Body=video + room)
        yield proxy, address


@pytest.fixture
def decode(storage, monkeypatch):
    _, address = storage
    lead_to(address, monkeypatch)

    def decode(key: str) -> DecodedClip | DecodeFailure:
        with DecodePool(DecodeConfig(processes=1, memory_mb=LIMIT_MB)) as pool:
            return next(pool.map_ordered([DecodeRequest(f"s3://videos/{key}", EIGHT)], 1))

    return decode


@pytest.mark.parametrize("key", ["small.mp4", "roomy.mp4"])
def test_a_video_on_s3_is_one_request_and_holds_no_memory(storage, decode, barcode_clips, key):
    proxy, _ = storage
    asked: list[str] = []
    proxy.only = lambda path: asked.append(path) or False
    clip = decode(key)
    # The object alone is nearly as large as all private memory the process may have.
    assert isinstance(clip, DecodedClip), clip
    assert asked == [f"/videos/{key}"]
    with DecodePool(DecodeConfig(processes=1)) as pool:
        (near,) = pool.map_ordered([DecodeRequest(str(barcode_clips["h264"]), EIGHT)], 1)
    assert np.array_equal(clip.frames, near.frames)


def test_an_object_larger_than_the_limit_costs_its_clip(storage, decode):
    storage[0].only = lambda path: False
    failure = decode("huge.mp4")
    assert isinstance(failure, DecodeFailure)
    assert failure.code == "too_large"
    assert "s3://videos/huge.mp4" in failure.message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in failure.message
    missing = decode("gone.mp4")
    assert isinstance(missing, DecodeFailure)
    assert missing.code == "missing"


def test_a_body_that_breaks_off_is_fetched_to_its_end(storage, decode):
    proxy, _ = storage
    faults = iter([True, False])
    proxy.only, proxy.share, proxy.kinds = (lambda path: next(faults, False)), 1.0, ("truncate",)
    try:
        clip = decode("small.mp4")
    finally:
        proxy.share = 0.0
    assert isinstance(clip, DecodedClip), clip
    assert proxy.faults["truncate"] == 1
    assert [barcode.read_index(frame) for frame in clip.frames] == clip.frame_indices.tolist()
