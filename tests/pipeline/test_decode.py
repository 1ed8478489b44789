"""Decoders in this process: the right frames, the right account of them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

import barcode
from optional_decoders import NEEDS_TORCHCODEC, TORCHCODEC
from tubelet_pipeline.decode import decoders, pyav_backend
from tubelet_pipeline.decode.decoded_clip import DecodeFailure
from tubelet_pipeline.decode.decoders import decode
from tubelet_pipeline.decode.process_main import local_path
from tubelet_pipeline.decode.video_index import probe
from tubelet_pipeline.frame_indices import FrameChoice, dense_frames, uniform_frames

CHOICES = {
    "uniform": lambda n: uniform_frames(n, frames=8, clips=1, view=0, first=0, more=0),
    "dense": lambda n: dense_frames(n, frames=8, stride=2, clips=2, view=1, first=0, more=0),
    "every": lambda n: FrameChoice(np.arange(n), 0),
    "last": lambda n: FrameChoice(np.array([n - 1]), 0),
}
DECORD_IS_EXACT = {
    "h264", "h264_no_b", "vp9", "vp9_alt_ref", "vp8", "mkv", "vfr", "vfr_webm", "one_frame", "five_frames",
    "odd_size", "rotated", "late_start", "late_start_mkv", "long_gop", "fragmented",
}  # fmt: skip
IS_EXACT = {"decord": DECORD_IS_EXACT, "torchcodec": DECORD_IS_EXACT | {"h264_open_gop", "hevc", "av1"}}


def allocate(shape):
    return np.zeros(shape, np.uint8)


def read_indices(name: str, frames) -> list[int]:
    turns = -barcode.CLIPS[name].rotation // 90
    return [barcode.read_index(np.rot90(frame, turns)) for frame in frames]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("backend", ["auto", "pyav", "decord", TORCHCODEC])
@pytest.mark.parametrize("name", barcode.CLIPS)
def test_every_backend_gives_the_requested_frames(barcode_clips, name, backend, choice):
    used = []
    clip = decode(str(barcode_clips[name]), backend, CHOICES[choice], allocate, used.append)
    expected = CHOICES[choice](barcode.CLIPS[name].frames)
    assert clip.video_frames == barcode.CLIPS[name].frames
    assert clip.frame_indices.tolist() == expected.indices.tolist()
    assert read_indices(name, clip.frames) == expected.indices.tolist()
    assert clip.padded_frames == expected.padded
    assert used == [backend if name in IS_EXACT.get(backend, ()) else "pyav"]
    assert clip.decoder.startswith(used[0])


@pytest.mark.parametrize("name", barcode.CLIPS)
def test_timestamps_are_the_container_s(barcode_clips, name):
    spec = barcode.CLIPS[name]
    clip = decode(str(barcode_clips[name]), "pyav", CHOICES["every"], allocate, lambda _: None)
    if np.isnan(clip.timestamps_s).all():
        assert clip.decoder.startswith("pyav")
        assert barcode_clips[name].suffix == ".avi"
        return
    # Matroska counts milliseconds.
    assert np.allclose(clip.timestamps_s - clip.timestamps_s[0], spec.timestamps_s(), atol=1.1e-3)
    assert not clip.truncated
    assert clip.corrupt_frames == 0


@pytest.mark.parametrize("name", sorted(DECORD_IS_EXACT))
def test_decord_and_pyav_agree_to_the_bit(barcode_clips, name):
    path = str(barcode_clips[name])
    ours, theirs = (
        decode_with(path, probe(path), CHOICES["every"], allocate)
        for decode_with in (pyav_backend.decode, decoders.decode_with_decord)
    )
    assert np.array_equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.timestamps_s, theirs.timestamps_s)


@pytest.mark.parametrize("name", sorted(set(barcode.CLIPS) - DECORD_IS_EXACT))
def test_decord_refuses_what_it_may_get_wrong(barcode_clips, name):
    path = str(barcode_clips[name])
    with pytest.raises(DecodeFailure, match="inexact"):
        decoders.decode_with_decord(path, probe(path), CHOICES["uniform"], allocate)


@NEEDS_TORCHCODEC
@pytest.mark.parametrize("name", barcode.CLIPS)
def test_torchcodec_agrees_to_the_bit_or_refuses(barcode_clips, name):
    path = str(barcode_clips[name])
    if name not in IS_EXACT["torchcodec"]:
        with pytest.raises(DecodeFailure, match="inexact"):
            decoders.decode_with_torchcodec(path, probe(path), CHOICES["uniform"], allocate)
        return
    ours, theirs = (
        decode_with(path, probe(path), CHOICES["every"], allocate)
        for decode_with in (pyav_backend.decode, decoders.decode_with_torchcodec)
    )
    assert np.array_equal(ours.frames, theirs.frames)
    np.testing.assert_allclose(ours.timestamps_s, theirs.timestamps_s)
    for number in (theirs.video_frames - 1, theirs.video_frames // 2, 0):
        one = decoders.decode_with_torchcodec(
            path, probe(path), lambda _, n=number: FrameChoice(np.array([n]), 0), allocate
        )
        assert np.array_equal(one.frames[0], ours.frames[number])


@pytest.mark.parametrize(
    ("name", "hazard"),
    [
        ("h264_open_gop", "open-gop"),
        ("hevc", "hevc"),
        ("edit_list", "hidden packets"),
        ("mpeg4_b_avi", "avi"),
        ("ten_bit", "pixels yuv420p10le"),
        ("av1", "av1"),
    ],
)
def test_the_probe_says_why(barcode_clips, name, hazard):
    assert probe(str(barcode_clips[name])).hazard == hazard


def test_a_vp8_frame_that_is_never_shown_is_not_counted(barcode_clips, tmp_path):
    path = tmp_path / "hidden.webm"
    with av.open(str(barcode_clips["vp8"])) as shown, av.open(str(path), "w") as hidden:
        stream = hidden.add_stream_from_template(shown.streams.video[0])
        for number, packet in enumerate(p for p in shown.demux(video=0) if p.size):
            content = bytearray(bytes(packet))
            if number == 5:
                content[0] &= ~0x10  # show_frame
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            hidden.mux(copy)
    clip = decode(str(path), "decord", CHOICES["every"], allocate, lambda _: None)
    assert clip.video_frames == 39
    assert clip.decoder.startswith("pyav")
    assert read_indices("vp8", clip.frames) == [i for i in range(40) if i != 5]


def test_far_frames_are_reached_by_a_seek_and_not_by_decoding_all(barcode_clips, monkeypatch):
    decoded = []
    forward = pyav_backend._forward

    def counted(*arguments):
        for frame in forward(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(pyav_backend, "_forward", counted)
    clip = decode(str(barcode_clips["h264"]), "pyav", CHOICES["last"], allocate, lambda _: None)
    assert barcode.read_index(clip.frames[0]) == 39
    assert len(decoded) <= 12, "one group of pictures at most"


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_frames_are_upright(tmp_path, rotation):
    path = barcode.make_clip(tmp_path / "turned.mp4", barcode.ClipSpec(".mp4", frames=3, rotation=rotation))
    clip = decode(str(path), "pyav", CHOICES["every"], allocate, lambda _: None)
    assert [barcode.read_index(np.rot90(frame, -rotation // 90)) for frame in clip.frames] == [0, 1, 2]
    assert (clip.width, clip.height) == ((128, 96) if rotation % 180 == 0 else (96, 128))
    assert clip.frames.flags.c_contiguous


def test_a_mirrored_display_matrix_mirrors():
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    one = 1 << 16
    across = np.array([-one, 0, 0, 0, one, 0, 0, 0, 1 << 30], np.int32)
    diagonal = np.array([0, one, 0, one, 0, 0, 0, 0, 1 << 30], np.int32)
    assert np.array_equal(pyav_backend.upright(picture, across), picture[:, ::-1])
    assert np.array_equal(pyav_backend.upright(picture, diagonal), picture.transpose(1, 0, 2))


def test_a_matroska_file_cut_short_is_marked_truncated(barcode_clips, tmp_path):
    whole = barcode_clips["mkv"].read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) // 2])
    clip = decode(str(cut), "pyav", lambda n: FrameChoice(np.arange(n // 2), 0), allocate, lambda _: None)
    assert clip.truncated
    assert clip.video_frames < 40
    assert read_indices("mkv", clip.frames) == clip.frame_indices.tolist()


def test_an_avi_cut_short_is_marked_truncated(barcode_clips, tmp_path):
    """Its header announces the frames; FFmpeg reckons the duration from what is left."""
    assert not probe(str(barcode_clips["mpeg4_avi"])).truncated
    whole = barcode_clips["mpeg4_avi"].read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    clip = decode(str(cut), "pyav", lambda n: FrameChoice(np.arange(n - 1), 0), allocate, lambda _: None)
    assert clip.truncated
    assert read_indices("mpeg4_avi", clip.frames) == clip.frame_indices.tolist()


def test_a_damaged_title_is_no_damage_to_the_video(tmp_path):
    path = tmp_path / "title.mp4"
    spec = barcode.CLIPS["five_frames"]
    barcode.make_clip(path, spec)
    with av.open(str(path)) as source, av.open(str(tmp_path / "titled.mp4"), "w") as target:
        target.metadata["title"] = "plain letters"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes((tmp_path / "titled.mp4").read_bytes().replace(b"plain letters", b"plain \xcc\xef\xccters"))
    clip = decode(str(damaged), "auto", CHOICES["every"], allocate, lambda _: None)
    assert read_indices("five_frames", clip.frames) == list(range(5))


def test_an_unknown_codec_is_named(barcode_clips, tmp_path):
    whole = barcode_clips["five_frames"].read_bytes()
    assert whole.count(b"avc1") >= 1
    at = whole.rindex(b"avc1")
    (path := tmp_path / "unknown.mp4").write_bytes(whole[:at] + b"zzzz" + whole[at + 4 :])
    with pytest.raises(DecodeFailure, match=r"open_failed: .* the video's codec"):
        decode(str(path), "auto", CHOICES["every"], allocate, lambda _: None)


def test_damage_is_counted(barcode_clips, tmp_path):
    # The first group's key frame stays whole; bytes of a later packet do not.
    whole = bytearray(barcode_clips["h264_no_b"].read_bytes())
    with av.open(str(barcode_clips["h264_no_b"])) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 3)
        begin, size = packet.pos, packet.size
    assert begin is not None
    whole[begin + size // 2 : begin + size] = b"\xa5" * (size - size // 2)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(whole)
    clip = decode(str(damaged), "pyav", CHOICES["last"], allocate, lambda _: None)
    assert clip.corrupt_frames == 0, "not on the way to the last frame"
    clip = decode(str(damaged), "pyav", lambda _: FrameChoice(np.array([5]), 0), allocate, lambda _: None)
    assert clip.corrupt_frames
    assert clip.corrupt_frames > 0


def test_a_changing_frame_size_is_a_failure(tmp_path):
    path = tmp_path / "resized.ts"
    with open(path, "wb") as file:
        for width in (128, 160):
            spec = barcode.ClipSpec(".ts", "mpeg2video", width=width, frames=12, start_tick=0 if width == 128 else 12)
            file.write(barcode.make_clip(tmp_path / f"{width}.ts", spec).read_bytes())
    with pytest.raises(DecodeFailure, match="resolution_change"):
        decode(str(path), "auto", CHOICES["every"], allocate, lambda _: None)


def test_a_url_is_read_whole_into_a_path(barcode_clips):
    with local_path(f"local://{barcode_clips['h264']}") as path:
        assert path.startswith("/proc/self/fd/")
        assert Path(path).read_bytes() == barcode_clips["h264"].read_bytes()
    with pytest.raises(DecodeFailure, match="missing"), local_path("local:///nowhere/at/all.mp4"):
        pass
    with pytest.raises(DecodeFailure, match="fetch_failed"), local_path("nosuchprotocol://x/y.mp4"):
        pass
