"""The barcode clips are what their names say, seen only through sequential decoding and the packets themselves."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from barcode import CLIPS, HIDDEN, decode_indices, draw_frame, filename, make_clip, read_index


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("barcode")
    return {name: make_clip(folder / filename(name), spec) for name, spec in CLIPS.items()}


def packets(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("name", CLIPS)
def test_sequential_decoding_gives_every_index_once_in_order(clips: dict[str, Path], name: str) -> None:
    assert decode_indices(clips[name]) == list(range(CLIPS[name].frames))


@pytest.mark.parametrize("name", CLIPS)
def test_timestamps_are_those_of_the_spec(clips: dict[str, Path], name: str) -> None:
    with av.open(str(clips[name])) as container:
        times = [frame.time for frame in container.decode(video=0)]
    # WebM keeps milliseconds.
    np.testing.assert_allclose(np.array(times) - times[0], CLIPS[name].timestamps_s(), atol=1e-3)


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_tiny(clips: dict[str, Path], name: str) -> None:
    assert clips[name].stat().st_size < 24_000


@pytest.mark.parametrize(("name", "is_open"), [("h264", False), ("h264_open_gop", True), ("hevc", True)])
def test_only_open_groups_have_frames_shown_before_the_key_frame_they_follow(
    clips: dict[str, Path], name: str, is_open: bool
) -> None:
    newest_key = None
    leading = 0
    for packet in packets(clips[name]):
        if packet.is_keyframe:
            newest_key = packet.pts
        leading += packet.pts < newest_key
    assert (leading > 0) == is_open


@pytest.mark.parametrize("name", ["edit_list", "edit_list_first_gop", "edit_list_tail"])
def test_edit_lists_hide_packets_that_are_in_the_file(clips: dict[str, Path], name: str) -> None:
    assert any(packet.is_discard for packet in packets(clips[name]))
    with av.open(str(clips[name]), options={"ignore_editlist": "1"}) as container:
        seen = [read_index(np.asarray(f.to_ndarray(format="rgb24"), np.uint8)) for f in container.decode(video=0)]
    assert len(seen) == len(CLIPS[name].ticks())
    assert [index for index in seen if index < HIDDEN] == list(range(CLIPS[name].frames))


def test_alternate_reference_frames_are_in_the_stream(clips: dict[str, Path]) -> None:
    # A VP9 superframe, which carries an invisible frame, ends in a marker byte 0b110xxxxx (VP9 bitstream, annex B).
    assert any(bytes(packet)[-1] & 0b11100000 == 0b11000000 for packet in packets(clips["vp9_alt_ref"]))
    assert not any(bytes(packet)[-1] & 0b11100000 == 0b11000000 for packet in packets(clips["vp9"]))


@pytest.mark.parametrize("name", ["mpeg4_b_avi", "h264_open_gop", "mpeg2"])
def test_b_frames_are_stored_out_of_order(clips: dict[str, Path], name: str) -> None:
    with av.open(str(clips[name])) as container:
        kinds = {frame.pict_type for frame in container.decode(video=0)}
    assert av.video.frame.PictureType.B in kinds


def test_properties_that_the_container_states(clips: dict[str, Path]) -> None:
    with av.open(str(clips["rotated"])) as container:
        assert next(container.decode(video=0)).rotation == 90
    with av.open(str(clips["late_start"])) as container:
        assert next(container.decode(video=0)).time == 3.0
    with av.open(str(clips["ten_bit"])) as container:
        assert next(container.decode(video=0)).format.name == "yuv420p10le"
    with av.open(str(clips["odd_size"])) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == (131, 97)
    assert sum(packet.is_keyframe for packet in packets(clips["long_gop"])) == 2
    assert b"moof" in clips["fragmented"].read_bytes()
    steps = np.diff(CLIPS["vfr"].timestamps_s())
    assert steps.max() > 4 * steps.min()


def test_an_unreadable_barcode_is_an_error_not_a_number() -> None:
    blended = draw_frame(5) // 2 + draw_frame(6) // 2
    assert read_index(draw_frame(2749)) == 2749
    with pytest.raises(ValueError, match="neither black nor white"):
        read_index(blended)
