"""Laws of `tubelet gallery`: a page shows what the SAE does on its clips, whatever the memory; files are whole."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from barcode import ClipSpec, draw_frame, make_clip, read_index
from galleries import CROP, FRAMES, GRID, HOSTILE, Made, make_run
from object_server import create_bucket, s3_environment, s3_server
from tubelet.errors import TubeletError
from tubelet_lens.codes.sparse_codes import SparseCodes
from tubelet_lens.config import EvaluateConfig
from tubelet_lens.evaluate import evaluate
from tubelet_lens.gallery.effects import probe_effects
from tubelet_lens.gallery.heat_maps import packed
from tubelet_lens.gallery.make_gallery import GallerySummary, make_gallery
from tubelet_lens.gallery.sheets import SheetConfig, draw_sheet
from tubelet_lens.gallery.survey import HISTOGRAM_EDGES, Survey, SurveyResult, exemplars
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.stats.linear_models import fit_probe
from tubelet_lens.verbs import GALLERY
from tubelet_trainer.sae.sae_files import load_sae


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_run(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def site(made: Made) -> tuple[Path, GallerySummary]:
    evaluated = EvaluateConfig(
        run=made.root / "run", store=made.store.url, split="all", device="cpu", skip=("action", "ablation", "retrieval")
    )
    evaluate(evaluated).write(made.root / "run" / "evaluation")
    return made.root / "site", make_gallery(made.config(made.root / "site", top_clips=4, lower_clips=3))


def page_data(site: Path, latent: int) -> dict:
    page = (site / "latents" / f"{latent:06d}.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def unpacked(text: str, length: int) -> np.ndarray:
    """What the page's script does."""
    data, levels, at = base64.b64decode(text), np.zeros(length, np.uint8), 0
    for gap, level in zip(data[::2], data[1::2], strict=True):
        at += gap
        levels[at] = level
        at += 1
    return levels


def cards(site: Path, latent: int) -> list[tuple[int, float]]:
    """ExemplarClip and value of each card of a page, in order."""
    page = (site / "latents" / f"{latent:06d}.html").read_text()
    values = [float(text.replace("\N{MINUS SIGN}", "-")) for text in re.findall(r'class="value"><b>(.*?)</b>', page)]
    return list(zip([int(text) for text in re.findall(r"· clip (\d+)<", page)], values, strict=True))


def codes_of(made: Made) -> np.ndarray:
    """Codes [clips, T, S, F] of what the store holds, by the SAE itself."""
    stored = torch.from_numpy(made.x.astype(np.float16).astype(np.float32))
    with torch.no_grad():
        return load_sae(made.root / "run").encode(stored.flatten(0, 2)).view(*stored.shape[:3], -1).numpy()


# --- one pass -------------------------------------------------------------------------------------------------------


def survey(codes: np.ndarray, video: np.ndarray, per_window: int, top: int = 3, seed: int = 0) -> SurveyResult:
    labels = video % 3
    taken = Survey(codes.shape[-1], video, labels, 3, top_clips=top, seed=seed, device=torch.device("cpu"))
    for start in range(0, len(codes), per_window):
        part = torch.from_numpy(codes[start : start + per_window])
        clips = np.arange(start, start + len(part))
        active = tuple(SparseCodes.of(codes_TSF) for codes_TSF in part)
        taken.add(Window(clips, part, active, part, torch.ones(part.shape[:2], dtype=torch.bool)))
    return taken.result()


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, np.ndarray]:
    """Sparse codes [120, 2, 3, 7] with negative ones and ties, and each clip's video (two or three clips each)."""
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((120, 2, 3, 7)).astype(np.float32).round(1)
    codes[rng.random(codes.shape) < 0.8] = 0
    codes[..., 5] = 0
    codes[..., 6] = np.abs(codes[..., 6])
    return codes, np.sort(rng.integers(0, 40, 120)).astype(np.int64)


def test_the_strongest_clips_are_those_of_a_full_sort_one_per_video(planted: tuple[np.ndarray, np.ndarray]) -> None:
    codes, video = planted
    found = survey(codes, video, per_window=7)
    peaks = np.abs(codes).max((1, 2))
    for latent in range(7):
        best = {int(v): float(peaks[video == v, latent].max()) for v in np.unique(video)}
        expected = sorted((value for value in best.values() if value > 0), reverse=True)[:3]
        clips = found.top_clip_FK[latent]
        assert np.abs(found.top_peak_FK[latent][clips >= 0]).tolist() == pytest.approx(expected)
        chosen = [video[clip] for clip in clips if clip >= 0]
        assert len(set(chosen)) == len(chosen) == len(expected)
        for clip, peak in zip(clips, found.top_peak_FK[latent], strict=True):
            if clip >= 0:
                assert peak in codes[clip, ..., latent]
    assert found.top_clip_FK[5].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("per_window", [1, 33, 120])
def test_what_is_found_does_not_hang_on_how_many_clips_are_held(planted, per_window: int) -> None:
    whole, parts = survey(*planted, per_window=7), survey(*planted, per_window=per_window)
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(parts, name), value, err_msg=name)


def test_counts_are_those_of_all_codes(planted: tuple[np.ndarray, np.ndarray]) -> None:
    codes, video = planted
    found = survey(codes, video, per_window=9)
    fired = codes != 0
    np.testing.assert_array_equal(found.tokens_F, fired.sum((0, 1, 2)))
    np.testing.assert_array_equal(found.clips_F, fired.any((1, 2)).sum(0))
    for label in range(3):
        mine = video % 3 == label
        np.testing.assert_array_equal(found.clips_by_label_FL[:, label], fired[mine].any((1, 2)).sum(0))
        assert found.clips_of_label_L[label] == mine.sum()
    assert found.signed_F.tolist() == [True] * 5 + [False] * 2
    np.testing.assert_allclose(found.sum_F, np.abs(codes).sum((0, 1, 2), dtype=np.float64), rtol=1e-6)
    for latent in range(7):
        sizes = np.abs(codes[..., latent][fired[..., latent]]).astype(np.float64)
        np.testing.assert_array_equal(found.histogram_FB[latent], np.histogram(sizes * (1 + 1e-7), HISTOGRAM_EDGES)[0])


def test_the_weaker_clips_come_from_their_parts_of_the_videos(planted: tuple[np.ndarray, np.ndarray]) -> None:
    codes, video = planted
    found = survey(codes, video, per_window=50)
    peaks = np.abs(codes).max((1, 2))
    for latent in (0, 6):
        each = np.array(sorted(peaks[video == v, latent].max() for v in np.unique(video)))
        each = each[each > 0]
        # At most 40 videos are sampled: with fewer, the parts are exact.
        assert len(each) <= 40
        shown = exemplars(found, latent, lower_clips=4)
        weaker = [one for one in shown if one.part is not None]
        assert len(weaker) == 4
        for one in weaker:
            low, high = one.part
            first, last = (np.searchsorted(each, abs(one.peak), side) / len(each) for side in ("left", "right"))
            assert first <= high
            assert last >= low
        assert len({one.clip for one in shown}) == len(shown)


def test_the_sample_is_uniform_over_the_videos_on_which_a_latent_fires() -> None:
    video = np.arange(200)
    codes = np.zeros((200, 1, 1, 1), np.float32)
    codes[50:, 0, 0, 0] = np.arange(150) + 1
    taken = np.concatenate([survey(codes, video, per_window=200, seed=s).sample_clip_FR[0] for s in range(60)])
    assert taken.min() >= 50
    # 60 samples of 40 of 150: each third of them is expected 800 times, with a deviation of 20.
    thirds = np.bincount((taken - 50) // 50)
    assert np.abs(thirds - 800).max() < 100


# --- heat-maps and pictures -----------------------------------------------------------------------------------------


def test_packing_keeps_every_level_over_gaps_of_any_length() -> None:
    rng = np.random.default_rng(0)
    for length in (1, 255, 256, 257, 511, 512, 513, 2000):
        levels = np.zeros(length, np.uint8)
        levels[-1] = 7
        np.testing.assert_array_equal(unpacked(packed(levels), length), levels)
        levels = np.where(rng.random(length) < 0.01, rng.integers(1, 256, length), 0).astype(np.uint8)
        np.testing.assert_array_equal(unpacked(packed(levels), length), levels)


def test_pages_show_the_codes_of_their_clips(made: Made, site: tuple[Path, GallerySummary]) -> None:
    codes = codes_of(made)
    for latent in np.flatnonzero(codes.any((0, 1, 2))).tolist():
        data, shown = page_data(site[0], latent), cards(site[0], latent)
        assert len(data["cards"]) == len(shown)
        largest = codes[..., latent].max()
        assert shown[0][1] == pytest.approx(largest, rel=0.01)
        for card, (clip, value) in zip(data["cards"], shown, strict=True):
            mine = codes[clip, :, :, latent]
            assert value == pytest.approx(mine.max(), rel=0.01)
            levels = unpacked(card["heat"], mine.size).reshape(mine.shape)
            np.testing.assert_array_equal(levels > 0, mine > 0)
            np.testing.assert_allclose(levels / 255 * largest, mine, atol=1.01 * largest / 255)
            # The still picture is a frame of the step where the map is highest.
            assert levels[card["peak"] * GRID[0] // FRAMES].max() == levels.max()
            assert card["seconds"] == pytest.approx(1 / 25)


def test_heat_maps_are_at_the_stored_patches(tmp_path: Path) -> None:
    made = make_run(tmp_path / "made", keep_patches=5)
    make_gallery(made.config(tmp_path / "site", videos=str(tmp_path)))
    codes = codes_of(made)
    latent = int(codes.max((0, 1, 2)).argmax())
    data = page_data(tmp_path / "site", latent)
    assert data["grid"] == list(GRID)
    for card, (clip, _) in zip(data["cards"], cards(tmp_path / "site", latent), strict=True):
        rows, columns = made.store.patch_positions(clip).T
        assert card["patches"] == (rows * GRID[2] + columns).tolist()
        levels = unpacked(card["heat"], GRID[0] * 5).reshape(GRID[0], 5)
        np.testing.assert_array_equal(levels > 0, codes[clip, :, :, latent] > 0)
    page = (tmp_path / "site" / "latents" / f"{latent:06d}.html").read_text()
    assert "veiled" in page


def test_a_sheet_holds_the_frames_in_order_cut_to_what_the_backbone_saw() -> None:
    frames = np.stack([draw_frame(i) for i in range(7)])
    data = draw_sheet(frames, None, SheetConfig(frame_px=128, quality=90, aspect=4 / 3))
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert sheet.shape == (3 * 96, 3 * 128, 3)
    for i in range(7):
        row, column = divmod(i, 3)
        assert read_index(sheet[row * 96 : (row + 1) * 96, column * 128 : (column + 1) * 128]) == i
    cropped = Image.open(io.BytesIO(draw_sheet(frames, CROP, SheetConfig(48, 95, 4 / 3)))).convert("RGB")
    direct = Image.fromarray(frames[2][24:96, 16:112]).resize((48, 36), Image.Resampling.BICUBIC)
    there = np.asarray(cropped.crop((96, 0, 144, 36)), dtype=float)
    assert np.abs(there - np.asarray(direct, dtype=float)).mean() < 6


def test_sheets_show_the_frames_of_their_own_view(made: Made, site: tuple[Path, GallerySummary]) -> None:
    """The ground's color changes every 8 frames: the second view of each video has the second color."""
    for path in sorted((site[0] / "clips").iterdir()):
        sheet = np.asarray(Image.open(path).convert("RGB"), dtype=float)
        ground = draw_frame(FRAMES * (int(path.stem) % 2))[-1, -1].astype(float)
        assert np.abs(sheet[sheet.shape[0] // 3 - 3, 2] - ground).max() < 25


def test_without_videos_pages_say_so_and_keep_their_heat_maps(made: Made, tmp_path: Path) -> None:
    summary = make_gallery(made.config(tmp_path / "site", videos=str(tmp_path / "nowhere")))
    assert summary.no_picture == summary.clips > 0
    assert not list((tmp_path / "site").glob("clips/*"))
    page = next(iter((tmp_path / "site" / "latents").iterdir())).read_text()
    assert "No picture: missing" in page
    assert str(tmp_path) not in page
    assert '<canvas class="map"' in page


def test_a_video_that_was_replaced_is_not_shown(made: Made, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for path in (made.root / "videos").iterdir():
        shutil.copy(made.root / "videos" / "0000.webm", tmp_path / "videos" / path.name)
    make_clip(tmp_path / "videos" / "0003.webm", ClipSpec(".webm", "libvpx", frames=30))
    make_gallery(made.config(tmp_path / "site", videos=str(tmp_path), top_clips=14))
    drawn = {int(path.stem) for path in (tmp_path / "site" / "clips").iterdir()}
    assert 7 not in drawn
    assert "changed: the video has other frames" in "".join(p.read_text() for p in tmp_path.glob("site/latents/*.html"))


# --- the site -------------------------------------------------------------------------------------------------------


def test_every_latent_that_fires_has_a_page_and_every_link_leads_somewhere(
    made: Made, site: tuple[Path, GallerySummary]
) -> None:
    folder, summary = site
    alive = np.flatnonzero(codes_of(made).any((0, 1, 2)))
    assert sorted(int(path.stem) for path in (folder / "latents").iterdir()) == alive.tolist()
    assert summary.pages == len(alive)
    for page in [folder / "index.html", *(folder / "latents").iterdir()]:
        for address in re.findall(r'(?:src|href)="([^"#]+)"', page.read_text()):
            assert (page.parent / address).is_file(), address
    assert json.loads((folder / "gallery.json").read_text())["state"] == "complete"
    assert not (folder / ".tmp").exists() or not list((folder / ".tmp").iterdir())


def test_nothing_leads_outside_and_nothing_is_fetched(site: tuple[Path, GallerySummary]) -> None:
    for path in site[0].rglob("*"):
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text()
            assert not re.search(r"""https?:|["'(]//|@import|\bfetch\(|XMLHttpRequest|import\(""", text), path


def test_no_file_of_a_site_names_a_folder_of_the_machine(
    made: Made, site: tuple[Path, GallerySummary], tmp_path: Path
) -> None:
    (tmp_path / "secret").mkdir()
    effects = {"latent": [0], "target": ["x"], "effect": [1.0], "definition": ["Made."]}
    pq.write_table(pa.table(effects), tmp_path / "secret" / "effects.parquet")
    fields = {"evaluation": made.root / "run" / "evaluation", "effects": tmp_path / "secret" / "effects.parquet"}
    make_gallery(made.config(tmp_path / "site", **fields, videos=str(made.root), top_clips=2))
    folders = {str(path) for path in (made.root, made.root.parent, tmp_path)} | {"secret"}
    for path in [*site[0].rglob("*"), *(tmp_path / "site").rglob("*")]:
        if path.suffix in (".html", ".js", ".css", ".json"):
            text = path.read_text()
            assert not [folder for folder in folders if folder in text], path
    config = json.loads((tmp_path / "site" / "gallery.json").read_text())["config"]
    named = {field: config[field] for field in ("run", "store", "evaluation", "effects", "videos")}
    wanted = {"run": "run", "store": "s.zarr", "evaluation": "evaluation", "effects": "effects.parquet"}
    assert named == {**wanted, "videos": made.root.name}
    assert "out" not in config
    assert config["top_clips"] == 2


def test_captions_cannot_break_a_page(site: tuple[Path, GallerySummary]) -> None:
    page = next(iter((site[0] / "latents").iterdir())).read_text()
    assert "&lt;/script&gt;" in page
    assert "<script>window" not in page
    assert "<img src=x" not in page
    assert HOSTILE.split(" ")[0] not in (site[0] / "overview-data.js").read_text()


def test_figures_are_the_evaluations_with_their_definitions(made: Made, site: tuple[Path, GallerySummary]) -> None:
    table = pq.read_table(made.root / "run" / "evaluation" / "latents.parquet")
    text = (site[0] / "overview-data.js").read_text()
    data = json.loads(text.removeprefix("window.tubelet = ").rstrip(";\n"))
    columns = {column["name"]: column for column in data["columns"]}
    for field in table.schema:
        if field.name == "latent":
            continue
        assert columns[field.name]["definition"] == field.metadata[b"definition"].decode()
        whole = table[field.name].to_pylist()
        for latent, value in zip(data["latents"], columns[field.name]["values"], strict=True):
            assert value == (None if whole[latent] is None else pytest.approx(whole[latent], rel=1e-3, abs=1e-12))
    assert {"frequency", "mean_activation", "coherence", "clip_share"} <= set(columns)


def test_run_again_after_a_kill_it_gives_the_same_site_and_draws_only_what_is_missing(
    made: Made, tmp_path: Path
) -> None:
    config = made.config(tmp_path / "site", top_clips=4, lower_clips=3)
    make_gallery(config)
    whole = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    code = (
        "import sys, os, signal; sys.path[:0] = sys.argv[2:]\n"
        "from tubelet_lens.gallery import make_gallery as make; from tubelet_lens.gallery.config import GalleryConfig\n"
        "from tubelet_lens.gallery.pages import Pages\n"
        "Pages.overview = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "make.make_gallery(GalleryConfig.model_validate_json(sys.argv[1]))"
    )
    shutil.rmtree(tmp_path / "site")
    killed = subprocess.run([sys.executable, "-c", code, config.model_dump_json()], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not (tmp_path / "site" / "index.html").exists()
    sheets = {path: path.stat().st_mtime_ns for path in (tmp_path / "site" / "clips").iterdir()}
    dropped = next(iter(sheets))
    dropped.unlink()
    make_gallery(config)
    again = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert again == whole
    del sheets[dropped]
    assert {path: path.stat().st_mtime_ns for path in sheets} == sheets


def test_other_image_settings_redraw_the_images_and_fewer_latents_leave_no_page_behind(
    made: Made, tmp_path: Path
) -> None:
    make_gallery(made.config(tmp_path / "site"))
    sheet = next((tmp_path / "site" / "clips").iterdir())
    before = Image.open(sheet).size
    shown = sorted(int(path.stem) for path in (tmp_path / "site" / "latents").iterdir())
    few = {"kind": "list", "numbers": shown[:2]}
    make_gallery(made.config(tmp_path / "site", frame_px=32, latents=few, top_clips=20))
    assert Image.open(next((tmp_path / "site" / "clips").iterdir())).size < before
    assert sorted(int(path.stem) for path in (tmp_path / "site" / "latents").iterdir()) == shown[:2]


def test_a_folder_with_other_files_is_left_alone(made: Made, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(TubeletError, match="other files than a gallery"):
        make_gallery(made.config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_on_object_storage_each_file_has_its_content_type(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as endpoint:
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        create_bucket(endpoint, "shows")
        config = made.config("s3://shows/a", latents={"kind": "top", "n": 3})
        assert make_gallery(config).address == "s3://shows/a/index.html"
        client = boto3.client("s3", endpoint_url=endpoint)
        objects = {each["Key"]: each for each in client.list_objects_v2(Bucket="shows")["Contents"]}
        kinds = {key: client.head_object(Bucket="shows", Key=key)["ContentType"] for key in objects}
        assert len([key for key in kinds if key.startswith("a/latents/")]) == 3
        wanted = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".webp": "image/webp"}
        for key, kind in kinds.items():
            assert kind == wanted.get(Path(key).suffix, kind), key
        local = tmp_path / "site"
        make_gallery(made.config(local, latents={"kind": "top", "n": 3}))
        for path in local.rglob("*.html"):
            key = f"a/{path.relative_to(local)}"
            assert client.get_object(Bucket="shows", Key=key)["Body"].read() == path.read_bytes()


# --- which latents, effects, errors ---------------------------------------------------------------------------------


def test_the_top_latents_by_a_figure_get_the_pages(
    made: Made, site: tuple[Path, GallerySummary], tmp_path: Path
) -> None:
    frequency = (codes_of(made) != 0).mean((0, 1, 2))
    for lowest in (False, True):
        wanted = {"kind": "top", "n": 3, "by": "frequency", "lowest": lowest}
        make_gallery(made.config(tmp_path / str(lowest), latents=wanted))
        shown = [int(path.stem) for path in (tmp_path / str(lowest) / "latents").iterdir()]
        values = np.sort(frequency[frequency > 0])
        assert sorted(frequency[shown]) == pytest.approx(values[:3] if lowest else values[-3:])


def test_setting_a_latent_to_zero_changes_the_probes_logits_as_reported() -> None:
    rng = np.random.default_rng(0)
    class_N = np.arange(90) % 3
    codes = np.abs(rng.standard_normal((90, 5))).astype(np.float32)
    codes[:, 4] = 0
    codes[np.arange(90), class_N] += 2
    codes[rng.random((90, 5)) < 0.3] = 0
    test = np.arange(90) >= 60
    videos = [str(i) for i in range(90)]
    found = probe_effects(codes, class_N, videos, test, ["a", "b", "c"], 0)
    assert sorted(found) == [0, 1, 2, 3]
    assert "30 other clips" in found[0][0].definition
    penalty = float(re.search(r"L2 penalty ([\d.e-]+)\)", found[0][0].definition)[1])  # type: ignore[index]
    probe = fit_probe(codes[~test], class_N[~test], 3, penalty)

    def logits(rows: np.ndarray) -> np.ndarray:
        return probe.logits(rows)

    for latent in range(4):
        without = codes.copy()
        without[:, latent] = 0
        change = (logits(without) - logits(codes))[codes[:, latent] != 0].mean(0)
        said = dict(found[latent][0].by_target)
        np.testing.assert_allclose([said[name] for name in "abc"], change, rtol=1e-5, atol=1e-8)
    # Each of the first three latents marks a label; losing it costs that label most.
    assert [found[latent][0].by_target[0][0] for latent in range(3)] == ["a", "b", "c"]


def test_a_table_of_edits_is_shown_with_its_definition(
    made: Made, site: tuple[Path, GallerySummary], tmp_path: Path
) -> None:
    latent = sorted(int(path.stem) for path in (site[0] / "latents").iterdir())[0]
    rows = {
        "latent": [latent, latent, 10_000],
        "target": ["moving <b>", "still", "x"],
        "effect": [-0.25, 0.5, 1.0],
        "definition": ["Measured in the running backbone."] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "effects.parquet")
    make_gallery(made.config(tmp_path / "site", effects=tmp_path / "effects.parquet"))
    page = (tmp_path / "site" / "latents" / f"{latent:06d}.html").read_text()
    assert "Measured in the running backbone." in page
    assert page.index("still") < page.index("moving &lt;b&gt;")
    assert "\N{MINUS SIGN}0.25" in page
    assert "Set to 0 in the code, not in the backbone" in page


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": {"kind": "top", "by": "beauty"}}, r"no figure 'beauty'.*frequency"),
        ({"latents": {"kind": "list", "numbers": [16]}}, "no latent 16.*0 to 15"),
        ({"evaluation": "nowhere"}, "No latent table at nowhere"),
        ({"effects": "nowhere.parquet"}, r"No table of effects at nowhere\.parquet"),
        ({"run": "nowhere"}, "No SAE in nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(made: Made, tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(TubeletError, match=message):
        make_gallery(made.config(tmp_path / "site", **fields))
    assert not (tmp_path / "site").exists()


def test_an_evaluation_of_another_sae_is_refused(made: Made, tmp_path: Path) -> None:
    pq.write_table(pa.table({"latent": [0, 1], "frequency": [0.1, 0.2]}), tmp_path / "latents.parquet")
    with pytest.raises(TubeletError, match="one row for each of the 16 latents"):
        make_gallery(made.config(tmp_path / "site", evaluation=tmp_path))


def test_the_verb_says_what_it_wrote_and_is_described_without_torch(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert GALLERY.run(made.config(tmp_path / "site", latents={"kind": "top", "n": 2})) == 0
    said = capsys.readouterr().out
    assert "2 latents" in said
    assert str(tmp_path / "site" / "index.html") in said
    code = (
        "import sys; from tubelet_lens.verbs import GALLERY; GALLERY.config();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'PIL', 'jinja2', 'av')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
