from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from tubelet.errors import TubeletError
from tubelet_pipeline.datasets import Folder, Kinetics, Ssv2, build_clip_table, missing_videos, resolve_uri
from tubelet_pipeline.sampling import DenseSampling, UniformSampling
from tubelet_store.clip_table import clip_table_digest

ONE = UniformSampling(frames=4)


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def rows(table, *names):
    columns = [table[name].to_pylist() for name in names]
    return list(zip(*columns, strict=True)) if len(names) > 1 else columns[0]


def write_ssv2(root: Path, prefix: str = "something-something-v2-") -> Path:
    touch(root, "20bn-something-something-v2/7.webm", "20bn-something-something-v2/3.mp4")
    entries = [
        {"id": "7", "label": "moving a cup up", "template": "Moving [something] up", "placeholders": ["a cup"]},
        {"id": "3", "label": "dropping a pen", "template": "Dropping [something]", "placeholders": ["a pen"]},
        {"id": "9", "label": "dropping a hat", "template": "Dropping [something]", "placeholders": ["a hat"]},
    ]
    annotations = root / f"{prefix}validation.json"
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(entries))
    (root / f"{prefix}labels.json").write_text(json.dumps({"Dropping something": "30", "Moving something up": "104"}))
    (root / f"{prefix}test.json").write_text(json.dumps([{"id": "3"}]))
    return root


@pytest.mark.parametrize("prefix", ["something-something-v2-", "labels/"])
def test_ssv2_in_both_layouts(tmp_path, prefix):
    table = build_clip_table(Ssv2(root=str(write_ssv2(tmp_path, prefix))), ONE)
    folder = "20bn-something-something-v2"
    assert rows(table, "clip", "video_id", "uri", "label", "label_name", "caption", "split", "view") == [
        (0, "7", f"{folder}/7.webm", 104, "Moving something up", "moving a cup up", "validation", 0),
        (1, "3", f"{folder}/3.mp4", 30, "Dropping something", "dropping a pen", "validation", 0),
        (2, "9", f"{folder}/9.webm", 30, "Dropping something", "dropping a hat", "validation", 0),
    ]
    assert missing_videos(table).count == 1
    assert missing_videos(table).examples == (f"{folder}/9.webm",)


def test_ssv2_videos_may_be_in_the_root_and_annotations_elsewhere(tmp_path):
    write_ssv2(tmp_path / "notes")
    touch(tmp_path / "videos", "7.webm", "3.webm", "9.mp4")
    table = build_clip_table(Ssv2(root=str(tmp_path / "videos"), annotations=str(tmp_path / "notes")), ONE)
    assert rows(table, "uri") == ["7.webm", "3.webm", "9.mp4"]


def test_the_ssv2_test_split_has_no_labels(tmp_path):
    table = build_clip_table(Ssv2(root=str(write_ssv2(tmp_path)), split="test"), ONE)
    assert rows(table, "video_id", "label", "label_name") == [("3", None, None)]


def test_views_of_a_video_are_neighbors(tmp_path):
    table = build_clip_table(Ssv2(root=str(write_ssv2(tmp_path)), limit=2), DenseSampling(frames=4, clips=3))
    assert rows(table, "clip", "video_id", "view") == [
        (0, "7", 0), (1, "7", 1), (2, "7", 2), (3, "3", 0), (4, "3", 1), (5, "3", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("separator", [" ", ", ", ",", "\t"])
def test_kinetics_path_lists_split_from_the_right(tmp_path, separator):
    touch(tmp_path, "val/arm wrestling/a b_000001_000011.mp4", "val/riding a bike/c_000002_000012.mp4")
    (tmp_path / "val.csv").write_text(
        f"{tmp_path}/val/riding a bike/c_000002_000012.mp4{separator}1\n"
        f"val/arm wrestling/a b_000001_000011.mp4{separator}0\n"
    )
    table = build_clip_table(Kinetics(root=str(tmp_path)), ONE)
    assert rows(table, "video_id", "uri", "label", "label_name", "split") == [
        ("c_000002_000012", "val/riding a bike/c_000002_000012.mp4", 1, "riding a bike", "val"),
        ("a b_000001_000011", "val/arm wrestling/a b_000001_000011.mp4", 0, "arm wrestling", "val"),
    ]
    assert missing_videos(table).count == 0


def test_kinetics_paths_outside_the_root_stay_whole(tmp_path):
    touch(tmp_path / "data", "x.mp4")
    (tmp_path / "list.csv").write_text("/elsewhere/abc.mp4 3\n")
    table = build_clip_table(Kinetics(root=str(tmp_path / "data"), annotations=str(tmp_path / "list.csv")), ONE)
    assert rows(table, "uri", "label") == [("/elsewhere/abc.mp4", 3)]
    assert resolve_uri(str(tmp_path), "/elsewhere/abc.mp4") == "/elsewhere/abc.mp4"


def test_kinetics_mmaction_lists_are_below_the_folder_of_their_split(tmp_path):
    touch(tmp_path, "videos_train/abseiling/a.mp4", "videos_train/air_drumming/b.mp4", "videos_val/abseiling/v.mp4")
    (tmp_path / "kinetics400_train_list_videos.txt").write_text(
        "abseiling/a.mp4 0\nair_drumming/b.mp4 1\nabseiling/z.mp4 0"
    )
    (tmp_path / "kinetics400_val_list_videos.txt").write_text("abseiling/v.mp4 0")
    table = build_clip_table(Kinetics(root=str(tmp_path), split="train"), ONE)
    assert rows(table, "uri", "label", "label_name") == [
        ("videos_train/abseiling/a.mp4", 0, "abseiling"),
        ("videos_train/air_drumming/b.mp4", 1, "air drumming"),
        ("videos_train/abseiling/z.mp4", 0, "abseiling"),
    ]
    assert missing_videos(table).examples == ("videos_train/abseiling/z.mp4",)


def test_kinetics_folders_that_hold_several_classes_name_none(tmp_path):
    touch(tmp_path, "val/a.mp4", "val/b.mp4")
    (tmp_path / "val.csv").write_text("val/a.mp4 0\nval/b.mp4 1\n")
    assert rows(build_clip_table(Kinetics(root=str(tmp_path)), ONE), "label_name") == [None, None]


def test_kinetics_official_csv(tmp_path):
    touch(tmp_path, "val/playing_chess/-M8qt_000030_000040.mp4", "abc_000001_000011.webm")
    (tmp_path / "kinetics-400_val.csv").write_text(
        "label,youtube_id,time_start,time_end,split\n"
        'playing chess,-M8qt,30,40,validate\n"bowling, on ice",abc,1,11,validate\nzumba,gone,5,15,validate\n'
        "abseiling,tr,0,10,train\n"
    )
    table = build_clip_table(Kinetics(root=str(tmp_path), split="val"), ONE)
    assert rows(table, "video_id", "uri", "label", "label_name") == [
        ("-M8qt_000030_000040", "val/playing_chess/-M8qt_000030_000040.mp4", 2, "playing chess"),
        ("abc_000001_000011", "abc_000001_000011.webm", 1, "bowling, on ice"),
        ("gone_000005_000015", "gone_000005_000015.mp4", 3, "zumba"),
    ]
    assert missing_videos(table).count == 1


def test_kinetics_class_folders(tmp_path):
    touch(tmp_path, "train/b_class/1.mp4", "train/a class/2.mp4", "val/b_class/3.mp4")
    table = build_clip_table(Kinetics(root=str(tmp_path), split="train"), ONE)
    assert rows(table, "uri", "label", "label_name") == [
        ("train/a class/2.mp4", 0, "a class"),
        ("train/b_class/1.mp4", 1, "b class"),
    ]


def test_folders_are_sorted_and_hidden_files_skipped(tmp_path):
    touch(tmp_path, "z/2.MP4", "a/1.webm", "a/._1.webm", "notes.txt", ".cache/x.mp4")
    table = build_clip_table(Folder(root=str(tmp_path)), ONE)
    assert rows(table, "video_id", "uri", "label") == [("a/1.webm", "a/1.webm", None), ("z/2.MP4", "z/2.MP4", None)]
    labeled_clips = build_clip_table(Folder(root=str(tmp_path), labels="from_directory"), ONE)
    assert rows(labeled_clips, "label", "label_name") == [(0, "a"), (1, "z")]


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path / "store", "a/1.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "data")
    assert rows(build_clip_table(Folder(root=str(tmp_path / "data")), ONE), "uri") == ["linked/a/1.mp4"]


def test_the_digest_follows_content_and_not_place(tmp_path):
    write_ssv2(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    digest = clip_table_digest(build_clip_table(Ssv2(root=str(tmp_path / "one")), ONE))
    assert digest == clip_table_digest(build_clip_table(Ssv2(root=str(tmp_path / "two")), ONE))
    assert digest == clip_table_digest(build_clip_table(Ssv2(root=f"file://{tmp_path}/one/"), ONE))
    others = [
        build_clip_table(Ssv2(root=str(tmp_path / "one"), limit=2), ONE),
        build_clip_table(Ssv2(root=str(tmp_path / "one")), UniformSampling(frames=4, clips=2)),
        build_clip_table(Ssv2(root=str(tmp_path / "one")), ONE).take([1, 0, 2]),
    ]
    assert len({digest, *map(clip_table_digest, others)}) == 4


def test_the_digest_is_the_one_it_always_was(tmp_path):
    table = build_clip_table(Ssv2(root=str(write_ssv2(tmp_path))), ONE)
    assert clip_table_digest(table) == "sha256:fba0dd225a727a114b514857d6e52f2eb117a6118157305f01742f39b2e26645"


def test_a_remote_root_is_listed_once(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("a/1.mp4", "b/2.mp4"):
        memory.pipe_file(f"/clips-test/{name}", b"")
    table = build_clip_table(Folder(root="memory://clips-test", labels="from_directory"), ONE)
    assert rows(table, "uri", "label_name") == [("a/1.mp4", "a"), ("b/2.mp4", "b")]
    assert resolve_uri("memory://clips-test/", "a/1.mp4") == "memory://clips-test/a/1.mp4"
    touch(tmp_path, "a/1.mp4", "b/2.mp4")
    assert clip_table_digest(table) == clip_table_digest(
        build_clip_table(Folder(root=str(tmp_path), labels="from_directory"), ONE)
    )


def test_a_quarter_of_a_million_rows_take_seconds(tmp_path):
    touch(tmp_path, "x/0.mp4")
    (tmp_path / "train.csv").write_text("".join(f"train/class {i % 400}/{i}.mp4 {i % 400}\n" for i in range(240_000)))
    begin = time.process_time()  # others on the machine do not count
    table = build_clip_table(Kinetics(root=str(tmp_path), split="train"), ONE)
    clip_table_digest(table)
    assert len(table) == 240_000
    assert time.process_time() - begin < 20


def _wrong_root(tmp_path):
    return Folder(root=str(tmp_path / "nowhere"))


def _empty_folder(tmp_path):
    return Folder(root=str(tmp_path))


def _unknown_split(tmp_path):
    return Ssv2(root=str(write_ssv2(tmp_path)), split="validaton")


def _no_annotations(tmp_path):
    touch(tmp_path, "1.webm")
    return Ssv2(root=str(tmp_path))


def _unknown_template(tmp_path):
    write_ssv2(tmp_path)
    (tmp_path / "something-something-v2-labels.json").write_text('{"Moving something up": "0"}')
    return Ssv2(root=str(tmp_path))


def _malformed_list(tmp_path):
    touch(tmp_path, "val/a.mp4")
    (tmp_path / "val.csv").write_text("val/a.mp4 0\nval/b.mp4 zero\n")
    return Kinetics(root=str(tmp_path))


def _malformed_csv(tmp_path):
    touch(tmp_path, "val/a.mp4")
    (tmp_path / "val.csv").write_text("label,youtube_id,time_start,time_end,split\nx,id,1,,val\n")
    return Kinetics(root=str(tmp_path))


def _ambiguous(tmp_path):
    touch(tmp_path, "val/a.mp4", "val.csv", "kinetics400_val_list_videos.txt")
    return Kinetics(root=str(tmp_path))


def _wrong_kinetics_split(tmp_path):
    return Kinetics(root=str(tmp_path), split="tain")


def _absent_kinetics_split(tmp_path):
    touch(tmp_path, "train/a/1.mp4")
    return Kinetics(root=str(tmp_path), split="val")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_wrong_root, "nowhere is not a folder"),
        (_empty_folder, r"No video files under .*recognized extensions: .*\.webm"),
        (_unknown_split, "no split 'validaton'. Did you mean 'validation'"),
        (_no_annotations, r"looked for something-something-v2-validation.json, validation.json, labels/"),
        (_unknown_template, r"entry 1 \(id 3\) has the template 'Dropping something'"),
        (_malformed_list, r"val.csv, line 2: 'val/b.mp4 zero' is not 'path label'"),
        (_malformed_csv, r"val.csv, line 2: 'x,id,1,,val' has no whole time_start"),
        (_ambiguous, "Several annotation files.*dataset.annotations"),
        (_wrong_kinetics_split, "Did you mean 'train'"),
        (_absent_kinetics_split, "no folder for split 'val'"),
    ],
)
def test_a_faulty_data_set_gives_a_one_line_error(tmp_path, make, says):
    with pytest.raises(TubeletError, match=says) as caught:
        build_clip_table(make(tmp_path), ONE)
    assert "\n" not in str(caught.value)
