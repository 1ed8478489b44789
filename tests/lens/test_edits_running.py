"""Laws of edits in a running backbone: planted answers in a linear one, and the whole path on the demo's."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from in_process import extract_here
from tubelet.config import validate
from tubelet.errors import TubeletError
from tubelet_lens.config import EvaluateConfig, InBackboneConfig, Topic
from tubelet_lens.evaluate import evaluate
from tubelet_lens.gallery.config import GalleryConfig
from tubelet_lens.gallery.effects import read_effects
from tubelet_lens.gallery.make_gallery import make_gallery
from tubelet_lens.inputs.labeled_clips import labeled_clips
from tubelet_lens.inputs.pooled_clips import Pooled, PooledSplit
from tubelet_lens.report.evaluation_result import EvaluationResult
from tubelet_lens.results.latent_table import LatentEffect, write_effects
from tubelet_lens.steering.backbone_ablation import accuracy_without
from tubelet_lens.steering.backbone_session import BackboneSession
from tubelet_lens.steering.class_edits import class_edit_section, edit_classes, edit_table
from tubelet_lens.steering.classification_edits import classification_edits
from tubelet_lens.steering.clip_source import Clip, ClipSource
from tubelet_lens.steering.config import EditConfig
from tubelet_lens.steering.edit import edit
from tubelet_lens.steering.edit_report import EditReport
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.latent_effects import changes
from tubelet_lens.steering.operations import Amplify, Suppress
from tubelet_lens.steering.patch_labels import NONE, Described, patch_labels, phrases
from tubelet_lens.steering.readout import match_class_names, unknown_names
from tubelet_lens.steering.recovery import recover
from tubelet_lens.steering.segmentation_edits import validation_rows
from tubelet_lens.study.cells import cells
from tubelet_lens.study.config import StudyConfig
from tubelet_lens.study.run_study import run_cell, study
from tubelet_lens.verbs import EDIT
from tubelet_pipeline.backbones import rewriting
from tubelet_pipeline.backbones.backbone import Captured
from tubelet_pipeline.backbones.hooks import capture
from tubelet_pipeline.demo_backbones import demo_backbone
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.redecode import backbone_of
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_pipeline.synthetic.video_files import read_masks
from tubelet_store.plan import Grid
from tubelet_store.reader import Store, open_store
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.config import ReLUConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization
from tubelet_trainer.sae.sae_files import load_record, load_sae, save_sae

D, CLASSES, SCALE = 6, 4, 3.0
BACKBONE = "my-videomae"
"""A folder beside the store: neither a shipped backbone nor on the hub."""
MEAN = torch.linspace(2, 5, D)


class LinearBackbone:
    """Two linear blocks on pixels [T, D, 2, 2], a token each: what an edit does at the end is known in closed form."""

    compiled = False
    checkpoint = SimpleNamespace(name="linear")
    grid = Grid(time=2, height=2, width=2)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
        self.blocks = nn.ModuleList([nn.Identity(), nn.Linear(D, D, bias=False)])
        self.blocks[1].weight.data = self.turn
        self.hook_names = ("blocks.0", "blocks.1")

    def resolve_hook(self, name: str) -> str:
        return name

    def module(self, hook: str) -> nn.Module:
        return self.blocks[self.hook_names.index(hook)]

    def arrange(self, hidden: Tensor) -> Captured:
        return Captured(hidden.unflatten(1, (2, 4)), None)

    def activations(self, pixels: Tensor, hooks: list[str]) -> dict[str, Captured]:
        hidden = pixels.permute(0, 1, 3, 4, 2).flatten(1, 3)
        found = capture({hook: self.module(hook) for hook in hooks}, lambda: self.blocks[1](self.blocks[0](hidden)))
        return {hook: self.arrange(tokens) for hook, tokens in found.items()}


class MeanReadout:
    """Logits: weights on the mean last token."""

    description = "planted weights"
    classes = tuple("abcd")

    def __init__(self, backbone: LinearBackbone, weights_CD: Tensor) -> None:
        self.backbone, self.weights_CD = backbone, weights_CD

    def logits(self, pixels: Tensor) -> Tensor:
        return self.backbone.activations(pixels, ["blocks.1"])["blocks.1"].tokens.mean((1, 2)) @ self.weights_CD.T


@pytest.fixture(scope="module")
def planted() -> BackboneSession:
    """Class c is latent c, on in every token; latents 4 and 5 say nothing. The SAE is exact."""
    sae = SAE(ReLUConfig(latents=D), Normalization(MEAN, torch.tensor(SCALE)))
    sae.load_state_dict({**sae.state_dict(), "W_enc": torch.eye(D), "W_dec": torch.eye(D)})
    sae.eval().requires_grad_(False)
    backbone = LinearBackbone()
    weights_CD = (backbone.turn @ torch.eye(D)[:CLASSES].T).T  # reads latent c back out
    class_N = np.repeat(np.arange(CLASSES), 5)
    rng = torch.Generator().manual_seed(1)
    clips = []
    for number in class_N:
        codes = torch.rand(2, 4, D, generator=rng) * 0.5
        codes[..., number] += 1.0
        tokens = codes * SCALE + MEAN
        clips.append(clip_of(tokens.view(2, 2, 2, D).permute(0, 3, 1, 2)))
    # The means of the tokens add the same to each class's logit only in raw units: take them out of the readout.
    readout = MeanReadout(backbone, weights_CD)
    offset = (MEAN @ backbone.turn.T) @ weights_CD.T
    plain = readout.logits
    readout.logits = lambda pixels: plain(pixels) - offset  # type: ignore[method-assign]
    parts: dict[str, Any] = {"fit_source": None, "test_source": None, "fit_rows": np.empty(0)}
    return BackboneSession(
        config=InBackboneConfig(),
        backbone=backbone,  # type: ignore[arg-type]
        hook="blocks.0",
        sae=sae,
        readout=readout,
        clips=tuple(clips),
        rows=np.arange(len(clips)),
        class_N=class_N,
        **parts,
    )


def clip_of(pixels: Tensor) -> Clip:
    nothing: Any = np.empty(0)
    return Clip("made", None, pixels, nothing, nothing, nothing, nothing)


def test_the_logits_move_by_what_the_edit_takes_through_the_linear_rest(planted: BackboneSession) -> None:
    """d logit = W M (scale (f' - f) d_j), mean over tokens."""
    before = planted.logits()
    with rewriting(planted.backbone, "blocks.0", LatentEdits(planted.sae, [Edit(2, Amplify(factor=3.0))])):
        after = planted.logits()
    f_N = torch.stack([(clip.pixels.permute(0, 2, 3, 1)[..., 2] - MEAN[2]).mean() / SCALE for clip in planted.clips])
    wanted = torch.zeros(len(f_N), CLASSES)
    wanted[:, 2] = SCALE * 2.0 * f_N
    torch.testing.assert_close(after - before, wanted, rtol=1e-4, atol=1e-4)


def test_ablating_a_classs_latent_costs_that_class_alone(planted: BackboneSession) -> None:
    assert accuracy_without(planted, np.array([], dtype=np.int64)) == 1.0
    assert accuracy_without(planted, np.array([4, 5])) == 1.0
    assert accuracy_without(planted, np.array([1])) == 0.75
    assert accuracy_without(planted, np.array([1, 2, 3])) == 0.25


def test_suppressing_a_classs_latent_changes_that_class_and_no_other(planted: BackboneSession) -> None:
    def predict(rewrite: Any) -> np.ndarray:
        with rewriting(planted.backbone, planted.hook, rewrite or (lambda _tokens: None)):
            return planted.logits().argmax(1).numpy()

    found = edit_classes(
        predict,
        planted.sae,
        {number: number for number in range(CLASSES)},
        largest_F=np.full(D, 1.5),
        mean_F=np.linspace(0.5, 0.6, D),
        strengths=(0.0, 2.0),
        draws=2,
        seed=0,
    )
    for rates in found.rates["class"]:
        assert (rates.target(), rates.other()) == (1.0, 0.0)
        assert (rates.target(micro=True), rates.other(micro=True)) == (1.0, 0.0)
    # Another latent is never the class's own, so its predictions stay.
    for arm in ("matched", "latent"):
        assert found.rates[arm][1].target() == 0.0


def test_where_no_other_latent_is_alive_matched_latents_are_undefined_and_the_rest_is_not(
    planted: BackboneSession,
) -> None:
    def predict(rewrite: Any) -> np.ndarray:
        with rewriting(planted.backbone, planted.hook, rewrite or (lambda _tokens: None)):
            return planted.logits().argmax(1).numpy()

    alone = np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0])
    settings: dict[str, Any] = {"largest_F": np.full(D, 1.5), "strengths": (2.0,), "draws": 2, "seed": 0}
    found = edit_classes(predict, planted.sae, {2: 2}, mean_F=alone, **settings)
    assert found.rates["class"][0].target() == 1.0
    assert found.rates["direction"][0].target() is not None
    for arm in ("matched", "latent"):
        assert (found.rates[arm][0].target(), found.rates[arm][0].other()) == (None, None)
    section = class_edit_section(found, table=edit_table("made", "clips"), title="t", lead="l", how="", extra=())
    figures = {figure.name: figure for figure in section.figures}
    assert (figures["made.target.matched"].value, figures["made.target.matched"].n) == (None, 0)
    assert "Undefined where no other latent is alive" in figures["made.other.latent"].definition
    assert figures["made.target.class"].value == 1.0


def test_the_effect_of_a_latent_is_what_it_gave_to_its_class(planted: BackboneSession) -> None:
    """d logit_c = -scale f_c, mean over the clips on which it fires; a silent latent has no effect to tell."""
    f_NF = torch.stack(
        [(clip.pixels.permute(0, 2, 3, 1).flatten(0, 2) - MEAN).mean(0) / SCALE for clip in planted.clips]
    )
    fires = np.zeros((len(f_NF), 3), dtype=bool)
    fires[5:10, 0], fires[:, 1] = True, True
    one, two = changes(planted, fires, np.array([1, 3, 4]), seed=0)
    assert ((one.latent, one.clips), (two.latent, two.clips)) == ((1, 5), (3, 20))
    for found, clips in ((one, slice(5, 10)), (two, slice(None))):
        wanted = np.zeros(CLASSES)
        wanted[found.latent] = -SCALE * float(f_NF[clips, found.latent].mean())
        np.testing.assert_allclose(found.own_C, wanted, atol=1e-4)
        assert 0 < np.abs(found.random_C).max() < np.abs(found.own_C).max()


def test_a_table_of_effects_goes_with_its_evaluation_and_others_stay(tmp_path: Path) -> None:
    rows = [LatentEffect(3, "still", -0.5, "Made."), LatentEffect(3, "moving", 0.25, "Made.")]
    write_effects(rows, tmp_path)
    table = pq.read_table(tmp_path / "effects.parquet")
    assert [LatentEffect(**row) for row in table.to_pylist()] == rows
    assert read_effects(tmp_path / "effects.parquet")[3][0].by_target == (("still", -0.5), ("moving", 0.25))
    write_effects([], tmp_path)
    assert not list(tmp_path.iterdir())
    pq.write_table(table.replace_schema_metadata(None), tmp_path / "effects.parquet")
    write_effects([], tmp_path)
    assert (tmp_path / "effects.parquet").is_file()


@pytest.fixture(scope="module")
def known_classes(planted: BackboneSession) -> Callable[[tuple[str, ...]], tuple[Any, BackboneSession]]:
    """What `classification_edits` needs, with classes of these names in the data set: latent c is class c on both
    sides."""

    def make(names: tuple[str, ...]) -> tuple[Any, BackboneSession]:
        codes_NF = np.eye(D, dtype=np.float32)[planted.class_N] + 0.1
        nothing: Any = None
        one_side = PooledSplit(
            store=nothing,
            clips=planted.rows,
            videos=planted.rows.astype(str).astype(object),
            labels=planted.class_N,
            label_names=np.array(names, dtype=object)[planted.class_N],
            captions=nothing,
            draws={"sae": (Pooled(codes_NF, codes_NF),)},
        )
        quick = replace(planted, config=InBackboneConfig(strengths=(2.0,), control_draws=1))
        given = SimpleNamespace(fit=one_side, test=one_side, config=SimpleNamespace(seed=0))
        return SimpleNamespace(**vars(given), labeled=labeled_clips(one_side, one_side)), quick

    return make


def test_a_class_is_found_by_its_name_but_never_guessed() -> None:
    classes = ("Pushing something", "pulling_something", "Dropping  Something", "a_b", "a b")
    names = ("pushing_something", "pulling_something", "dropping something", "Puling something", "A B", "a b")
    assert match_class_names(names, classes) == {names[0]: 0, names[1]: 1, names[2]: 2, "a b": 4}
    said = unknown_names(names, classes)
    assert said is not None
    assert "'Puling something' (nearest: 'pulling_something')" in said
    assert said.startswith("2 of the data set's 6 classes")
    assert all(f"'{name}'" in said for name in classes)
    assert unknown_names(names[:3], classes) is None
    many = tuple(f"class {number}" for number in range(400))
    assert "380 more" in str(unknown_names(["x"], many))


def test_edits_of_classes_say_which_the_readout_does_not_have(
    known_classes: Callable[[tuple[str, ...]], tuple[Any, BackboneSession]],
) -> None:
    found = classification_edits(*known_classes(("A", "b", "cc", "D")))
    assert found is not None
    figures = {figure.name: figure for figure in found.section.figures}
    assert figures["classification_edits.target.class"].value == 1.0
    assert figures["classification_edits.f1"].n == 3
    assert "'cc'" in found.section.notes[-1]
    notes = classification_edits(*known_classes(tuple("abcd"))).section.notes
    assert "cc" not in " ".join(str(note) for note in notes)
    nothing = classification_edits(*known_classes(("one", "two", "three", "four")))
    assert nothing is not None
    assert nothing.section.figures == ()
    assert "4 of the data set's 4 classes" in nothing.section.notes[0]
    assert "'a', 'b', 'c', 'd'" in nothing.section.notes[0]


def test_an_exact_sae_recovers_everything_and_the_mean_nothing(planted: BackboneSession) -> None:
    found = recover(planted, MEAN)
    assert found.original.kl == 0
    assert (found.original.top1, found.reconstructed.top1) == (1.0, 1.0)
    for measure in ("loss", "top1", "kl"):
        assert found.recovered(measure) == pytest.approx(1.0, abs=1e-5)
    assert found.ablated.top1 == pytest.approx(0.25)
    assert found.ablated.loss == pytest.approx(np.log(CLASSES), rel=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ssv2`, a store of blocks.2 of a VideoMAE that is a local folder, and an SAE trained on it for a moment."""
    root = tmp_path_factory.mktemp("edits")
    torch.set_num_threads(1)
    shutil.copytree(demo_backbone("videomae-tiny"), root / BACKBONE)
    videos = VideosConfig(out=root / "ssv2", videos=32, frames=32, height=64, width=64, validation_share=0, workers=1)
    make_dataset(videos)
    settings = {
        "dataset": {"kind": "ssv2", "root": str(root / "ssv2"), "split": "train"},
        "sampling": {"kind": "dense", "frames": 16, "stride": 2},
        "backbone": {"id": str(root / BACKBONE)},
        "hooks": ["blocks.2"],
        "store": str(root / "s.zarr"),
        "decode": {"processes": 1},
    }
    extract_here(ExtractConfig.model_validate(settings))
    options = {"steps": 60, "batch_tokens": 512, "sae": {"kind": "topk", "k": 8, "expansion": 2}, "device": "cpu"}
    train(TrainConfig.model_validate({"store": str(root / "s.zarr"), "out": str(root / "run"), **options}))
    return root


@pytest.fixture(scope="module")
def store(made: Path) -> Store:
    return open_store(str(made / "s.zarr"))


def edit_config(made: Path, **fields: Any) -> EditConfig:
    base = {"run": made / "run", "store": str(made / "s.zarr"), "latent": 0, "device": "cpu", "controls": 2}
    return EditConfig.model_validate({**base, "usage_clips": 4, "probe_clips": 16, "clips": (1,), **fields})


def busiest(made: Path, store: Store, clip: int) -> int:
    from tubelet_lens.inputs.clip_stream import read_clip

    codes = load_sae(made / "run").encode(read_clip(store, "blocks.2", clip).flatten(0, 1))
    return int((codes > 0).sum(0).argmax())


@pytest.fixture(scope="module")
def report(made: Path, store: Store) -> EditReport:
    changed = {"latent": busiest(made, store, 1), "operation": {"kind": "suppress", "strength": 2.0}}
    return edit(edit_config(made, **changed, where={"steps": (2, 5)}))


def test_the_running_backbone_gives_what_the_store_holds(made: Path, store: Store) -> None:
    from tubelet_lens.inputs.clip_stream import read_clip

    backbone = backbone_of(store, device="cpu")
    (clip,) = ClipSource(store, backbone).clips([3])
    got = backbone.activations(clip.pixels[None], ["blocks.2"])["blocks.2"].tokens[0]
    torch.testing.assert_close(got, read_clip(store, "blocks.2", 3), rtol=2e-3, atol=2e-3)
    assert clip.frame_indices.tolist() == store.clips()["frame_indices"][3].as_py()


def test_a_backbone_in_a_local_folder_is_found_again(
    made: Path, report: EditReport, measured: EvaluationResult
) -> None:
    assert report.backbone == BACKBONE
    assert measured.evaluation.figure("recovery.kl.sae").value is not None
    moved = made.parent / f"{made.name}-moved"
    (made / BACKBONE).rename(moved)
    try:
        with pytest.raises(TubeletError, match=BACKBONE):
            edit(edit_config(made, probe_clips=0))
        assert edit(edit_config(made, probe_clips=0, checkpoint=str(moved))).clips
    finally:
        moved.rename(made / BACKBONE)


def test_an_edit_reports_what_changed_with_its_controls(report: EditReport) -> None:
    (clip,) = report.clips
    assert 0 < clip.changed_tokens <= 3 * 64
    assert [each.hook for each in clip.hooks] == ["blocks.2", "blocks.3"]
    for each in clip.hooks:
        assert each.change.edit > 0
        assert each.change.random is not None
    at_hook = clip.hooks[0].change
    assert at_hook.random is not None
    assert at_hook.random.mean == pytest.approx(at_hook.edit, rel=1e-3)  # steps of the same length
    (latent,) = clip.latents
    assert latent.mean_after == pytest.approx(-2 * latent.largest_observed, rel=1e-4)
    assert len(clip.classes) == 16
    assert abs(sum(each.probability_after for each in clip.classes) - 1) < 1e-5
    changes = [abs(each.logit_change.edit) for each in clip.classes]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert clip.kl is not None
    assert clip.kl.edit > 0


def test_an_identity_edit_changes_no_logit_and_no_hook(made: Path, store: Store) -> None:
    identity = {"latent": busiest(made, store, 1), "operation": {"kind": "amplify", "factor": 1.0}}
    (clip,) = edit(edit_config(made, **identity)).clips
    assert clip.changed_tokens == 0
    assert clip.kl is not None
    assert clip.kl.edit == 0
    assert all(each.logit_change.edit == 0 for each in clip.classes)
    assert all(each.change.edit == 0 for each in clip.hooks)


def test_the_page_is_self_contained_and_the_json_is_read_back(report: EditReport, tmp_path: Path) -> None:
    page = report.write(tmp_path).read_text()
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert "suppressed to" in page
    assert "latent steps 2 to 5" in page
    assert EditReport.model_validate_json((tmp_path / "edit.json").read_text()) == report


def test_the_verb_prints_and_writes(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = next((made / "ssv2").rglob("*.webm"))
    config = edit_config(made, clips=(), videos=(str(video),), probe_clips=0, out=tmp_path / "out")
    assert EDIT.run(config) == 0
    out = capsys.readouterr().out
    assert video.name in out
    assert "change at blocks.3" in out
    tree = json.loads((tmp_path / "out" / "edit.json").read_text())
    assert (tree["format"], tree["schema_version"], tree["readout"]) == ("tubelet-edit", 1, None)


def test_a_downstream_sae_reads_a_later_hook(made: Path) -> None:
    with pytest.raises(TubeletError, match=r"trained on 'blocks\.2', which does not come after"):
        edit(edit_config(made, downstream=(made / "run",), probe_clips=0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latent": 999}, r"no latent 999: this SAE has 192"),
        ({"clips": (99,)}, r"has no clip 99.*0 to 31"),
        ({"clips": (), "videos": ("nowhere.mp4",)}, r"nowhere\.mp4 cannot be read: missing"),
        ({"where": {"rows": (0, 9)}}, r"rows \[0, 9\] exceeds the grid, which has 8"),
        ({"checkpoint": str(demo_backbone("dinov2-tiny"))}, "pictures|frames|weights"),
        ({"root": "/nowhere"}, "cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(made: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(TubeletError, match=words):
        edit(edit_config(made, **{"probe_clips": 0, **fields}))


def test_the_verb_is_described_without_torch() -> None:
    code = (
        "import sys; from tubelet_lens.verbs import EDIT; EDIT.config();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_captions_tell_what_fills_the_placeholders() -> None:
    described = Described("1", "Moving something and something closer to each other", "")
    caption = "Moving a red striped circle and an orange star closer to each other"
    filled = Described("1", described.template, caption)
    assert phrases(filled) == ("a red striped circle", "an orange star")
    assert phrases(Described("1", None, caption)) == ()
    assert phrases(described) == ()


def test_patch_labels_are_those_of_the_masks(made: Path, store: Store) -> None:
    """Pixels counted one by one, on 64 x 64 frames that the backbone sees whole, in patches of 8 and steps of 2."""
    backbone = backbone_of(store, device="cpu")
    seen = set()
    for clip in ClipSource(store, backbone).clips(range(0, 32, 5)):
        row = store.clips().take([clip.clip]).to_pylist()[0]
        described = Described(row["video_id"], row["label_name"], row["caption"])
        labels = patch_labels(str(made / "ssv2"), described, clip, backbone.grid, "object", 0.9)
        masks = read_masks(made / "ssv2", row["video_id"])[clip.frame_indices] > 0
        for step, y, x in np.ndindex(8, 8, 8):
            share = masks[2 * step : 2 * step + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean()
            wanted = 1 if share >= 0.9 else 0 if share <= 0.1 else NONE
            assert labels[step, 8 * y + x] == wanted
        colored = patch_labels(str(made / "ssv2"), described, clip, backbone.grid, "color", 0.9)
        assert ((colored == 0) == (labels == 0)).all()
        assert (colored[labels == 1] != 0).all()
        seen |= set(np.unique(colored))
    assert len(seen - {NONE, 0}) >= 2


@pytest.mark.parametrize("clips_per_video", [1, 3])
def test_all_patches_of_a_video_choose_the_penalty_or_none_does(clips_per_video: int) -> None:
    videos = [f"video-{number // clips_per_video}" for number in range(10 * clips_per_video)]
    rows = [7 + place % 5 for place in range(len(videos))]
    chosen = validation_rows(videos, rows, seed=3)
    of_row = np.repeat(videos, rows)
    assert len(set(of_row[chosen])) == 2
    assert not set(of_row[chosen]) & set(of_row[~chosen])


IN_THE_BACKBONE = ["recovery", "backbone_ablation", "effects", "classification_edits", "segmentation_edits"]


@pytest.fixture(scope="module")
def measured(made: Path) -> EvaluationResult:
    settings = {
        "run": made / "run",
        "store": str(made / "s.zarr"),
        "split": "all",
        "limit_clips": 6,
        "fit_store": str(made / "s.zarr"),
        "controls": False,
        "device": "cpu",
        "skip": [topic for topic in get_args(Topic) if topic not in IN_THE_BACKBONE],
        "in_backbone": {
            "fit_clips": 16,
            "test_clips": 2,
            "largest": 1,
            "draws": 1,
            "control_draws": 1,
            "strengths": [2.0],
        }
        | {"masks": "object", "label_threshold": 0.6, "effects": 3},
    }
    return evaluate(EvaluateConfig.model_validate(settings))


def test_an_evaluation_measures_in_the_running_backbone(measured: EvaluationResult) -> None:
    figures = {figure.name: figure for figure in measured.evaluation.figures()}
    assert figures["recovery.kl.raw"].value == 0
    assert figures["recovery.kl.sae"].value < figures["recovery.kl.mean"].value  # type: ignore[operator]
    assert figures["recovery.recovered_kl"].value == pytest.approx(
        1 - figures["recovery.kl.sae"].value / figures["recovery.kl.mean"].value  # type: ignore[operator]
    )
    assert 0 <= figures["backbone_ablation.before"].value <= 1  # type: ignore[operator]
    assert figures["segmentation_edits.accuracy"].value > 0.8  # type: ignore[operator]
    for section in ("classification_edits", "segmentation_edits"):
        for arm in ("class", "matched", "latent", "direction"):
            assert figures[f"{section}.target.{arm}"].definition
    names = [section.name for section in measured.evaluation.sections]
    assert names == [*IN_THE_BACKBONE, "training"]


def test_the_gallery_shows_the_effects_that_an_evaluation_measured(
    made: Path, store: Store, measured: EvaluationResult, tmp_path: Path
) -> None:
    measured.write(tmp_path / "evaluation")
    assert len({row.latent for row in measured.effects}) == measured.evaluation.figure("effects.largest.sae").n == 3
    shown = {"kind": "list", "numbers": sorted({row.latent for row in measured.effects})}
    settings = {
        "run": made / "run",
        "store": store.url,
        "out": str(tmp_path / "site"),
        "evaluation": tmp_path / "evaluation",
    }
    make_gallery(GalleryConfig.model_validate({**settings, "latents": shown, "device": "cpu", "top_clips": 1}))
    for latent in shown["numbers"]:
        page = html.unescape((tmp_path / "site" / "latents" / f"{latent:06d}.html").read_text())
        mine = [row for row in measured.effects if row.latent == latent]
        assert mine[0].definition in page
        strongest = max(mine, key=lambda row: abs(row.effect))
        assert page.index(mine[0].definition) < page.index(strongest.target, page.index(mine[0].definition))


@pytest.mark.parametrize("alive", [0, 1])
def test_an_sae_of_one_living_latent_or_none_is_evaluated_to_the_end(
    made: Path, store: Store, tmp_path: Path, alive: int
) -> None:
    sae = load_sae(made / "run")
    dead = torch.ones(sae.latents, dtype=torch.bool)
    dead[busiest(made, store, 1)] = alive == 0
    sae.W_enc[dead], sae.b_enc[dead] = 0.0, -1.0
    save_sae(tmp_path / "run", sae, load_record(made / "run").provenance)
    settings = {
        "run": tmp_path / "run",
        "store": store.url,
        "split": "all",
        "limit_clips": 16,
        "fit_store": store.url,
        "controls": False,
        "device": "cpu",
        "null_draws": 1,
        "action": {"poolings": ["mean", "mean_then_encode"], "bootstrap": 10},
        "in_backbone": {
            "fit_clips": 16,
            "test_clips": 2,
            "draws": 1,
            "control_draws": 1,
            "strengths": [2.0],
            "effects": 1,
        }
        | {"masks": "object", "label_threshold": 0.6},
    }
    figures = {figure.name: figure for figure in evaluate(EvaluateConfig.model_validate(settings)).evaluation.figures()}
    assert figures["sparsity.dead_fraction"].value == pytest.approx(1 - alive / sae.latents)
    assert figures["recovery.kl.sae"].value is not None
    assert figures["action.top1_mean_then_encode.sae"].value is not None
    for name in ("classification_edits.target.latent", "segmentation_edits.target.matched"):
        assert name not in figures or figures[name].value is None
    assert ("classification_edits.target.class" in figures) == bool(alive)


def test_a_study_ablates_the_backbone_in_its_cells_where_it_is_at_hand(made: Path, tmp_path: Path) -> None:
    small = {"fit_clips": 16, "test_clips": 2, "largest": 1, "draws": 1, "control_draws": 1, "effects": 1}
    tree = {
        "out": str(tmp_path / "study"),
        "sources": {
            "demo": {
                "backbone": "B",
                "dataset": "D",
                "train": str(made / "s.zarr"),
                "evaluate": {"in_backbone": small},
            }
        },
        "variants": {"plain": {"settings": {"sae": {"kind": "topk", "k": 8, "expansion": 2}}}},
        "seeds": [0],
        "train": {"steps": 10, "batch_tokens": 512, "holdout": {"fraction": 0.4}, "device": "cpu"},
        "evaluate": {
            "controls": False,
            "device": "cpu",
            "limit_clips": 6,
            "skip": [topic for topic in get_args(Topic) if topic not in ("backbone_ablation", "effects")],
        },
    }
    config = validate(StudyConfig, tree, "the test")
    (cell,) = cells(config)
    told = (one.model_dump(mode="json") for one in (cell.train, cell.evaluate))
    run_cell(*told, str(cell.folder), cell.digest, 1)
    assert study(config).done_before == 1
    (row,) = csv.DictReader((tmp_path / "study" / "tables" / "backbone.csv").open())
    before = cell.evaluation().figure("backbone_ablation.before").value
    assert before is not None
    assert float(row["backbone_ablation.before"]) == before
    assert "backbone_ablation_curve.png" in (tmp_path / "study" / "study.md").read_text()


def test_switching_off_is_a_factor_of_zero(planted: BackboneSession) -> None:
    """And needs no largest activation."""
    tokens = torch.randn(1, 2, 4, D) * SCALE + MEAN
    off = LatentEdits(planted.sae, [Edit(1, Suppress())])(tokens)
    assert torch.equal(off, LatentEdits(planted.sae, [Edit(1, Amplify(factor=0.0))])(tokens))
