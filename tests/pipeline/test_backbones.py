"""Every family gives [clip, time, space, channel] of the tokens it names; what cannot be trusted is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone, pretrained
from tubelet_pipeline.backbones.tiny import write_tiny_dinov2, write_tiny_videomae
from tubelet_pipeline.preprocess import Preprocessing

SMALL = {"image_size": 32, "patch_size": 8, "hidden": 32, "layers": 3, "heads": 4}
Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "videomae": write_tiny_videomae(root / "videomae", 1, frames=8, **SMALL),
        "videomae-norm": write_tiny_videomae(root / "videomae-norm", 1, frames=8, use_mean_pooling=False, **SMALL),
        "dinov2": write_tiny_dinov2(root / "dinov2", 2, **SMALL),
    }


def load(folder: Path, frames: int | None = None, **options: object) -> Backbone:
    return load_backbone(BackboneConfig(id=str(folder), device="cpu", **options), frames)


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> dict[str, Backbone]:
    return {name: load(folder, None if "videomae" in name else 6) for name, folder in folders.items()}


FAMILIES = ["videomae", "videomae-norm", "dinov2"]


def pixels_for(backbone: Backbone, clips: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips, backbone.frames, 3, *backbone.preprocessing.size, generator=generator)


def edited_copy(source: Path, target: Path, edit: Edit) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    grid = backbone.grid
    assert (grid.height, grid.width) == (4, 4)
    assert (backbone.frames, grid.time) == ((8, 4) if "videomae" in name else (6, 6))
    got = backbone.activations(pixels_for(backbone, 3), backbone.hook_names)
    assert tuple(got) == backbone.hook_names
    for hook, captured in got.items():
        assert captured.tokens.shape == (3, grid.time, grid.space, backbone.channels(hook))
        if backbone.special_tokens:
            assert captured.special is not None
            assert captured.special.shape == (3, backbone.special_time, len(backbone.special_tokens), 32)
        else:
            assert captured.special is None


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_one_cell_changes_its_token_most(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    step = backbone.frames // backbone.grid.time
    base = pixels_for(backbone, 1)
    before = backbone.activations(base, ["blocks.0"])["blocks.0"].tokens
    for time, row, column in [(0, 0, 0), (1, 0, 2), (2, 3, 1), (backbone.grid.time - 1, 3, 3)]:
        changed = base.clone()
        changed[:, time * step : (time + 1) * step, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 3.0
        after = backbone.activations(changed, ["blocks.0"])["blocks.0"].tokens
        delta = (after - before).norm(dim=-1)[0]
        assert divmod(int(delta.argmax()), backbone.grid.space) == (time, row * backbone.grid.width + column)


def test_an_image_model_sees_frames_apart(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["dinov2"]
    base = pixels_for(backbone)
    changed = base.clone()
    changed[1, 2] += 1.0
    before, after = (backbone.activations(p, ["final_norm"])["final_norm"] for p in (base, changed))
    moved = (after.tokens - before.tokens).abs().amax(dim=(2, 3)) > 0
    assert moved.nonzero().tolist() == [[1, 2]]
    assert before.special is not None
    assert after.special is not None
    assert ((after.special - before.special).abs().amax(dim=(2, 3)) > 0).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_the_hidden_states_of_the_model(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    pixels = pixels_for(backbone)
    inputs = pixels.flatten(0, 1) if name == "dinov2" else pixels
    with torch.no_grad():
        reference = backbone.model(pixel_values=inputs, output_hidden_states=True)
    got = backbone.activations(pixels, backbone.hook_names)
    for block in range(3):
        whole = backbone.arrange(reference.hidden_states[block + 1])
        assert torch.equal(got[f"blocks.{block}"].tokens, whole.tokens)
        if whole.special is not None:
            assert torch.equal(got[f"blocks.{block}"].special, whole.special)
    last = backbone.arrange(reference.last_hidden_state)
    assert torch.equal(got["final_norm" if name != "videomae" else "blocks.2"].tokens, last.tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_adds_its_attention_and_its_mlp(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    got = backbone.activations(pixels_for(backbone), backbone.hook_names)
    total = got["blocks.0"].tokens + got["blocks.1.attn"].tokens + got["blocks.1.mlp"].tokens
    torch.testing.assert_close(total, got["blocks.1"].tokens, rtol=1e-5, atol=1e-5)


def test_final_norm_is_there_only_if_tokens_pass_it(backbones: dict[str, Backbone]) -> None:
    assert "final_norm" not in backbones["videomae"].hook_names
    assert "final_norm" in backbones["videomae-norm"].hook_names
    with pytest.raises(TubeletError, match="no hook 'final_norm'"):
        backbones["videomae"].resolve_hook("final_norm")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_that_stops_early_gives_the_same_bits(backbones: dict[str, Backbone], name: str) -> None:
    backbone = backbones[name]
    pixels = pixels_for(backbone)
    full = backbone.activations(pixels, backbone.hook_names)
    listeners = sum(len(module._forward_hooks) for module in backbone.model.modules())
    called: list[int] = []
    listener = backbone.blocks[2].register_forward_hook(lambda *_: called.append(2))
    early = backbone.activations(pixels, ["blocks.1", "blocks.0"])
    listener.remove()
    assert called == []
    for hook in early:
        assert torch.equal(early[hook].tokens, full[hook].tokens)
    assert listeners == sum(len(module._forward_hooks) for module in backbone.model.modules()), "listeners pile up"


def test_hook_names(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["dinov2"]
    assert backbone.resolve_hook("blocks.-1") == "blocks.2"
    assert backbone.resolve_hook("blocks.-3.mlp") == "blocks.0.mlp"
    assert list(backbone.activations(pixels_for(backbone), ["blocks.-1", "blocks.2"])) == ["blocks.-1", "blocks.2"]
    for wrong in ("blocks.3", "blocks.-4", "finalnorm", "", "blocks"):
        with pytest.raises(TubeletError, match=r"blocks\.0 to blocks\.2.*final_norm"):
            backbone.resolve_hook(wrong)
    with pytest.raises(TubeletError, match=r"Did you mean 'final_norm'\?"):
        backbone.channels("finalnorm")
    assert backbone.activations(pixels_for(backbone), []) == {}


def test_a_wrong_number_of_frames_names_the_right_one(folders: dict[str, Path]) -> None:
    with pytest.raises(TubeletError, match=r"takes 8 frames per clip, not 16\. Set sampling\.frames: 8"):
        load(folders["videomae"], 16)
    assert load(folders["videomae"], 8).frames == 8
    assert load(folders["dinov2"]).frames == 16
    assert load(folders["dinov2"], 3).grid.time == 3
    with pytest.raises(TubeletError, match="cannot have 0 frames"):
        load(folders["dinov2"], 0)


def test_pixels_of_another_shape_are_refused(backbones: dict[str, Backbone]) -> None:
    # DINOv2 itself would interpolate its positions and say nothing.
    with pytest.raises(TubeletError, match=r"takes pixels \[B, 6, 3, 32, 32\], not \[1, 6, 3, 40, 32\]"):
        backbones["dinov2"].activations(torch.zeros(1, 6, 3, 40, 32), ["blocks.0"])


def test_a_number_of_tokens_that_is_not_the_grids_is_refused(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["dinov2"]
    whole = backbone.forward
    backbone.forward = lambda pixels: whole(pixels[..., :24])  # type: ignore[method-assign]
    try:
        with pytest.raises(
            TubeletError, match=r"gave 6 x 13 tokens for 1 clips; a grid of 6x4x4 and 1 special.* 6 x 17"
        ):
            backbone.activations(pixels_for(backbone, 1), ["blocks.0"])
    finally:
        del backbone.forward


def test_a_frame_size_that_the_model_does_not_take_is_refused(folders: dict[str, Path]) -> None:
    other = Preprocessing(shortest_edge=40, crop=(40, 40))
    with pytest.raises(TubeletError, match=r"32x32 .*40x40"):
        load(folders["videomae"], preprocessing=other)
    # DINOv2 takes any; the grid follows.
    assert load(folders["dinov2"], 2, preprocessing=other).grid.space == 25


def test_preprocess_gives_pixels_and_the_box_the_grid_covers(folders: dict[str, Path]) -> None:
    backbone = load(folders["dinov2"], 2, preprocessing=Preprocessing(shortest_edge=36, crop=(36, 36)))
    pixels, box = backbone.preprocess(np.zeros((2, 72, 144, 3), np.uint8))
    assert pixels.shape == (2, 3, 36, 36)
    assert backbone.grid.space == 16
    assert tuple(box) == (0, 36, 64, 64), "32 of 36 pixels become patches"
    with pytest.raises(ValueError, match="2 frames"):
        backbone.preprocess(np.zeros((3, 72, 144, 3), np.uint8))
    assert backbone.activations(pixels[None], ["blocks.0"])["blocks.0"].tokens.shape == (1, 2, 16, 32)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["videomae", "dinov2"])
def test_precision_is_respected(folders: dict[str, Path], name: str, precision: str) -> None:
    exact, rough = load(folders[name]), load(folders[name], precision=precision)
    assert {p.dtype for p in rough.model.parameters()} == {getattr(torch, precision)}
    pixels = pixels_for(exact, 1)
    want = exact.activations(pixels, ["blocks.2"])["blocks.2"].tokens
    got = rough.activations(pixels, ["blocks.2"])["blocks.2"].tokens
    assert got.dtype == getattr(torch, precision)
    assert 0 < (got.float() - want).norm() / want.norm() < (0.005 if precision == "float16" else 0.05)


def test_a_checkpoint_in_half_precision_loads_in_the_given_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].to(torch.bfloat16)

    folder = edited_copy(folders["dinov2"], tmp_path / "half", halve)
    assert (
        load(folder).activations(torch.zeros(1, 16, 3, 32, 32), ["blocks.0"])["blocks.0"].tokens.dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("name", "lost"),
    [("videomae", "q_bias"), ("dinov2", "encoder.layer.1.mlp.fc1.weight"), ("videomae-norm", "layernorm.weight")],
)
def test_missing_weights_are_refused(folders: dict[str, Path], tmp_path: Path, name: str, lost: str) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        names = [n for n in tensors if n.endswith(lost) and (lost != "layernorm.weight" or n == lost)]
        assert names
        for n in names:
            del tensors[n]

    named = "query.bias" if lost == "q_bias" else lost
    with pytest.raises(TubeletError, match=rf"lacks \d of the weights of .*{named}") as caught:
        load(edited_copy(folders[name], tmp_path / "broken", drop))
    assert "5.18" in caught.value.remedy


def test_what_no_hook_needs_may_be_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited_copy(folders["dinov2"], tmp_path / "maskless", lambda t: t.pop("embeddings.mask_token"))
    assert load(folder).weights_digest == load(folders["dinov2"]).weights_digest


def test_weights_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layernorm.weight"] = tensors["layernorm.weight"][:7].clone()

    with pytest.raises(TubeletError, match="'broken' does not load as Dinov2Model"):
        load(edited_copy(folders["dinov2"], tmp_path / "broken", cut))
    torn = tmp_path / "torn"
    shutil.copytree(folders["dinov2"], torn)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(TubeletError, match="'torn' does not load"):
        load(torn)


@pytest.mark.parametrize("head", ["VideoMAEForPreTraining", "VideoMAEForVideoClassification"])
def test_checkpoints_with_heads_give_their_encoder(folders: dict[str, Path], tmp_path: Path, head: str) -> None:
    import transformers

    config = transformers.VideoMAEConfig.from_pretrained(folders["videomae-norm"])
    config.use_mean_pooling = head.endswith("Classification")
    config.decoder_hidden_size, config.decoder_num_attention_heads, config.decoder_num_hidden_layers = 16, 2, 3
    model = getattr(transformers, head)(config).eval()
    model.save_pretrained(tmp_path)
    shutil.copy(folders["videomae"] / "preprocessor_config.json", tmp_path)
    backbone = load(tmp_path)
    assert ("final_norm" in backbone.hook_names) == (head == "VideoMAEForPreTraining")
    pixels = pixels_for(backbone, 1)
    with torch.no_grad():
        want = model.videomae(pixels).last_hidden_state
    last = "final_norm" if "final_norm" in backbone.hook_names else "blocks.-1"
    assert torch.equal(backbone.activations(pixels, [last])[last].tokens.flatten(1, 2), want)


def test_videomae_keeps_its_query_and_value_biases(folders: dict[str, Path]) -> None:
    backbone = load(folders["videomae"])
    saved = load_file(folders["videomae"] / "model.safetensors")
    for block, module in enumerate(backbone.blocks):
        inner = module.get_submodule("attention.attention")
        for layer, name in (("query", "q_bias"), ("value", "v_bias")):
            bias = saved[f"encoder.layer.{block}.attention.attention.{name}"]
            assert bias.abs().max() > 0
            assert torch.equal(inner.get_submodule(layer).bias, bias)


def test_describe_does_not_depend_on_the_folders_location(folders: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "videomae"
    shutil.copytree(folders["videomae"], moved)
    here, there = load(folders["videomae"]), load(moved)
    assert here.describe() == there.describe()
    text = json.dumps([here.describe(), here.describe_preprocessing()])
    assert str(tmp_path) not in text
    assert str(folders["videomae"].parent) not in text
    assert here.describe()["id"] == "videomae"
    assert Preprocessing.model_validate(json.loads(text)[1]) == here.preprocessing


def test_one_weight_changes_the_digest(folders: dict[str, Path], tmp_path: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.2.output.dense.bias"][0] += 1e-3

    nudged = edited_copy(folders["videomae"], tmp_path / "videomae", nudge)
    assert load(nudged).weights_digest != load(folders["videomae"]).weights_digest


def test_a_setting_that_changes_numbers_changes_the_description(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "videomae"
    shutil.copytree(folders["videomae"], folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"transformers_version": "9.9"}))
    assert load(folder).describe() == load(folders["videomae"]).describe()
    (folder / "config.json").write_text(json.dumps(fields | {"num_attention_heads": 2}))
    assert load(folder).describe() != load(folders["videomae"]).describe()


def test_tiny_checkpoints_are_a_function_of_their_seed(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        load(write_tiny_videomae(tmp_path / f"{i}", seed, frames=8, **SMALL)) for i, seed in enumerate((5, 5, 6))
    )
    assert first.weights_digest == again.weights_digest != other.weights_digest
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_default_tiny_videomae_has_the_demos_grid(tmp_path: Path) -> None:
    backbone = load(write_tiny_videomae(tmp_path / "tiny"))
    assert (backbone.frames, backbone.grid.time, backbone.grid.height, backbone.grid.width) == (16, 8, 8, 8)


def test_families_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    assert load(folders["dinov2"], family="dinov2").family == "dinov2"
    with pytest.raises(TubeletError, match=r"Did you mean 'videomae'\?"):
        load(folders["dinov2"], family="video-mae")
    with pytest.raises(TubeletError, match="belongs to the family 'dinov2', not 'videomae'"):
        load(folders["dinov2"], family="videomae")
    folder = tmp_path / "text"
    shutil.copytree(folders["dinov2"], folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(TubeletError, match=r"'bert'.*dinov2, .*videomae"):
        load(folder)


def test_folders_that_are_no_checkpoint_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TubeletError, match="There is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(TubeletError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(TubeletError, match="local folder and has no revision 'main'"):
        load(folders["dinov2"], revision="main")
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["dinov2"], pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(TubeletError, match=r"no model\.safetensors; weights in pickle files .* are not read"):
        load(pickled)
    unprepared = tmp_path / "unprepared"
    shutil.copytree(folders["dinov2"], unprepared)
    (unprepared / "preprocessor_config.json").unlink()
    with pytest.raises(TubeletError, match=r"no preprocessor_config\.json.*set backbone\.preprocessing"):
        load(unprepared)
    assert load(unprepared, preprocessing=Preprocessing(shortest_edge=32, crop=(32, 32))).grid.space == 16


def offline(config: str, hub_home: Path) -> list[str]:
    """Lines said by a process without a network that loads `config`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hub_home)}
    body = (
        "from tubelet_pipeline.backbones import *\nfrom tubelet.errors import TubeletError\n"
        f"try:\n    described = load_backbone(BackboneConfig({config})).describe()\n"
        "    print(described['id'], described['revision'])\n"
        "except TubeletError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_a_hub_model_that_cannot_be_reached_is_one_clear_line(tmp_path: Path) -> None:
    (said,) = offline("id='some-owner/some-model'", tmp_path)
    assert said.startswith("There is no folder 'some-owner/some-model', and the hub cannot be reached")
    for wrong in ("models/videomae-tiny", "/data/videomae-tiny", "videomae_tiny"):
        (said,) = offline(f"id={wrong!r}", tmp_path)
        assert "Did you mean 'videomae-tiny', which comes with Tubelet?" in said


def test_the_commit_that_was_loaded_is_recorded(folders: dict[str, Path], tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--some-owner--tiny"
    shutil.copytree(folders["dinov2"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert offline("id='some-owner/tiny'", tmp_path) == [f"some-owner/tiny {commit}"]


def test_old_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setattr(pretrained, "version", lambda _: "5.17.0")
    with pytest.raises(TubeletError, match=r"transformers 5\.17\.0 is too old.*>=5\.18"):
        load(folders["dinov2"])


def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(TubeletError, match="Device 'gpu' cannot be used"):
        load_backbone(BackboneConfig(id=str(folders["dinov2"]), device="gpu"))
