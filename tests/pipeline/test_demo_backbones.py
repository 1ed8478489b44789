"""Laws of the shipped backbones and of how they were made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretrain import corpus, dinov2, videomae
from pretrain.corpus import frame_labels
from pretrain.motion import TARGETS, motion_targets
from pretrain.probe_backbones import SAMPLING, Clips, pooled_activations, probe, untrained
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.decode.decoded_clip import DecodedClip
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.demo_backbones import NAMES, demo_backbone
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_pipeline.synthetic.render_scene import render
from tubelet_pipeline.synthetic.scene import scene_at

GRIDS = {"videomae-tiny": (8, 8, 8), "dinov2-tiny": (16, 8, 8)}


def load(name: str) -> Backbone:
    return load_backbone(BackboneConfig(id=str(demo_backbone(name)), device="cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_videos() -> NDArray[np.uint8]:
    return corpus.render_corpus(16)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_has_the_stated_shape(name: str) -> None:
    backbone = load(name)
    grid = backbone.grid
    assert (grid.time, grid.height, grid.width) == GRIDS[name]
    assert backbone.frames == SAMPLING.frames
    pixels, _ = backbone.preprocess(np.zeros((backbone.frames, 128, 128, 3), np.uint8))
    for captured in backbone.activations(pixels[None], [f"blocks.{i}" for i in range(4)]).values():
        assert captured.tokens.shape == (1, grid.time, grid.space, 96)
        assert captured.tokens.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name: str) -> None:
    assert sum(path.stat().st_size for path in demo_backbone(name).iterdir()) < 2e6


@pytest.mark.parametrize("name", NAMES)
def test_card_and_report_name_these_very_weights(name: str) -> None:
    digest = load(name).weights_digest
    report = json.loads((demo_backbone(name) / "training.json").read_text())
    assert report["weights_digest"] == digest
    assert digest in (demo_backbone(name) / "README.md").read_text()


@pytest.mark.parametrize(("name", "recipe"), [("videomae-tiny", videomae.Recipe()), ("dinov2-tiny", dinov2.Recipe())])
def test_card_states_recipe_data_and_limits(name: str, recipe: videomae.Recipe | dinov2.Recipe) -> None:
    card = (demo_backbone(name) / "README.md").read_text()
    for heading in ("## Recipe", "## Data", "## Linear probes", "## Limits"):
        assert heading in card
    assert f"{recipe.steps} steps" in card
    assert f"seed {corpus.SEED}" in card
    report = json.loads((demo_backbone(name) / "training.json").read_text())
    assert report["recipe"] == vars(recipe)


def test_training_videos_are_not_the_demos() -> None:
    assert VideosConfig.model_fields["seed"].default != corpus.SEED


@pytest.mark.parametrize("name", NAMES)
def test_its_name_is_an_id_that_leads_to_the_same_weights_on_every_machine(name: str, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(demo_backbone(name), tmp_path / name)
    by_name, by_folder = (load_backbone(BackboneConfig(id=id, device="cpu")) for id in (name, str(elsewhere)))
    assert by_name.describe() == by_folder.describe()
    assert by_name.describe()["id"] == name
    assert str(demo_backbone(name).parent) not in json.dumps(by_name.describe())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(TubeletError, match="videomae-tiny"):
        demo_backbone("videomae-tini")


def test_corpus_is_what_the_decoder_and_the_preprocessing_give(few_videos: NDArray[np.uint8], tmp_path: Path) -> None:
    make_dataset(VideosConfig(out=tmp_path / "videos", videos=1, seed=corpus.SEED, workers=1))
    (path,) = tmp_path.rglob("*.webm")
    with DecodePool(DecodeConfig(processes=1)) as pool:
        (clip,) = pool.map_ordered([DecodeRequest(str(path), SAMPLING)], prefetch=1)
    assert isinstance(clip, DecodedClip)
    backbone = load("videomae-tiny")
    pixels, _ = backbone.preprocess(clip.frames)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.preprocessing.mean, backbone.preprocessing.std))
    expected = torch.from_numpy(few_videos[0, clip.frame_indices])
    torch.testing.assert_close((pixels * std + mean) * 255, expected.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_a_function_of_its_seed(name: str, few_videos: NDArray[np.uint8]) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        if name == "videomae-tiny":
            recipe = videomae.Recipe(steps=2, warmup=1, masked=2, whole=1, seed=seed)
            return videomae.train(recipe, few_videos)[0].state_dict()
        labels = frame_labels(16, dinov2.PATCH)
        return dinov2.train(dinov2.Recipe(steps=2, warmup=1, batch=4, seed=seed), few_videos, labels)[0].state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[parameter], again[parameter]) for parameter in first)
    assert not all(torch.equal(first[parameter], other[parameter]) for parameter in first)


def _blob(move: Callable[[int], tuple[float, float]]) -> torch.Tensor:
    """A soft disc whose center at frame t is `move(t)`, [1, 4, 3, 64, 64]."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    frames = [0.2 + 0.6 * torch.sigmoid(8 - torch.hypot(x - move(t)[0], y - move(t)[1])) for t in range(4)]
    return torch.stack(frames)[None, :, None].expand(-1, -1, 3, -1, -1)


@pytest.mark.parametrize(
    ("move", "name", "sign"),
    [
        (lambda t: (30 + 1.5 * t, 32), "right", 1),
        (lambda t: (34 - 1.5 * t, 32), "right", -1),
        (lambda t: (32, 30 + 1.5 * t), "down", 1),
    ],
)
def test_motion_targets_point_where_things_move(
    move: Callable[[int], tuple[float, float]], name: str, sign: int
) -> None:
    clip = _blob(move)
    target = motion_targets(clip, 8).mean((0, 1, 2))
    flow = dict(zip(TARGETS, target.tolist(), strict=True))
    assert sign * flow[name] > 5 * abs(flow["down" if name == "right" else "right"])
    backwards = motion_targets(clip.flip(1), 8).mean((0, 1, 2))
    torch.testing.assert_close(backwards[:2], -target[:2], atol=1e-5, rtol=1e-3)


def test_nothing_moves_in_a_still_clip() -> None:
    assert motion_targets(_blob(lambda t: (32, 32)), 8).abs().max() == 0


def test_frame_labels_are_on_their_objects(few_videos: NDArray[np.uint8]) -> None:
    batch = dinov2.draw_frames(few_videos, frame_labels(16, dinov2.PATCH), 64, np.random.default_rng(0))
    patch = batch.objects.nonzero()[:, 1]
    centers = (torch.stack([patch % 8, patch // 8], 1) + 0.5) / 4 - 1
    distance = (centers - batch.poses[:, :2]).norm(dim=1)
    assert len(patch) > 64
    assert (distance < 1.2 * batch.poses[:, 2] + 2**0.5 / 8).all()


def test_directions_are_linear_in_its_tokens_and_not_in_random_ones() -> None:
    """On raw pictures of a seed of its own; `pretrain.probe_backbones` measures on encoded videos."""
    numbers = [16 * round_ + action for round_ in range(14) for action in range(4)]
    frames = np.stack([render(scene_at(7, i, 48, 64, 64))[0][::3] for i in numbers])
    index = np.array(numbers)
    clips = Clips(frames, index % 16, index // 2, held_out=index // 16 >= 8)
    folder = demo_backbone("videomae-tiny")
    ours, random = (
        probe(pooled_activations(backbone, frames)["blocks.2", "mean"], clips).of_classes
        for backbone in (load("videomae-tiny"), untrained(folder, seed=0))
    )
    assert ours > 0.75
    assert ours > random + 0.2
