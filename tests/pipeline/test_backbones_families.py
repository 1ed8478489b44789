"""The laws of every family, on tiny models with random weights: layout, hooks against the model's own outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from families import CASES, IMAGE, LAYERS, WIDE, pixels_for
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import FAMILIES, Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.backbones.tiny import save_random, write_processor
from tubelet_pipeline.preprocess import Preprocessing


def test_every_family_is_tried() -> None:
    assert {case.partition("-")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_shapes(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    _, _, _, time, special, norm = CASES[case]
    assert backbone.family == case.partition("-")[0]
    assert (backbone.grid.time, backbone.grid.height, backbone.grid.width) == (time, 4, 4)
    assert len(backbone.special_tokens) == special
    assert ("final_norm" in backbone.hook_names) == norm
    for hook, captured in backbone.activations(pixels_for(backbone), backbone.hook_names).items():
        assert captured.tokens.shape == (2, time, 16, backbone.channels(hook))
        if special:
            assert captured.special is not None
            assert captured.special.shape == (2, backbone.special_time, special, backbone.channels(hook))
        else:
            assert captured.special is None


@pytest.mark.parametrize("case", CASES)
def test_changing_one_cell_changes_its_token_most(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    step = backbone.frames // backbone.grid.time
    base = pixels_for(backbone, 1)
    before = backbone.activations(base, ["blocks.0"])["blocks.0"].tokens
    for time, row, column in [(0, 0, 0), (1, 0, 2), (2, 3, 1), (1, 2, 3)]:
        changed = base.clone()
        changed[:, time * step : (time + 1) * step, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 4.0
        after = backbone.activations(changed, ["blocks.0"])["blocks.0"].tokens
        assert divmod(int((after - before).norm(dim=-1)[0].argmax()), 16) == (time, row * 4 + column)


@pytest.mark.parametrize("case", CASES)
def test_hooks_are_the_models_own_states(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    pixels = pixels_for(backbone)
    plain = type(backbone.model).forward
    outputs: list[Any] = []
    original = backbone.model.forward
    backbone.model.forward = lambda *args, **kwargs: outputs.append(
        plain(backbone.model, *args, **kwargs, output_hidden_states=True)
    )
    try:
        with torch.no_grad():
            backbone.forward(pixels)
    finally:
        backbone.model.forward = original
    states, last = outputs[0].hidden_states, outputs[0].last_hidden_state
    got = backbone.activations(pixels, backbone.hook_names)
    assert len(states) == LAYERS + 1
    for block in range(LAYERS):
        assert torch.equal(got[f"blocks.{block}"].tokens, backbone.arrange(states[block + 1]).tokens)
    assert torch.equal(got["final_norm" if CASES[case][-1] else "blocks.2"].tokens, backbone.arrange(last).tokens)


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("timesformer")])
def test_a_block_adds_its_attention_and_its_mlp(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    got = backbone.activations(pixels_for(backbone), backbone.hook_names)
    total = got["blocks.0"].tokens + got["blocks.1.attn"].tokens + got["blocks.1.mlp"].tokens
    torch.testing.assert_close(total, got["blocks.1"].tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_description_is_json_and_names_the_family(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    described = json.loads(json.dumps(backbone.describe()))
    assert described["family"] == backbone.family
    assert described["layers"] == LAYERS
    assert described["id"] == case


def test_the_vision_tower_alone_equals_that_of_the_whole_model(backbone_of: Callable[[str], Backbone]) -> None:
    import transformers

    for case, name in (("clip-whole", "CLIPModel"), ("siglip-whole", "SiglipModel")):
        backbone = backbone_of(case)
        whole = getattr(transformers, name).from_pretrained(backbone.checkpoint.folder).eval()
        pixels = pixels_for(backbone, 1)
        with torch.no_grad():
            want = whole.vision_model(pixel_values=pixels[0]).last_hidden_state
        hook = "final_norm" if "final_norm" in backbone.hook_names else "blocks.-1"
        assert torch.equal(backbone.activations(pixels, [hook])[hook].tokens, backbone.arrange(want).tokens)


def test_vjepa2_takes_any_whole_number_of_tubelets(backbone_of: Callable[[str], Backbone], root: Path) -> None:
    backbone_of("vjepa2")
    config = BackboneConfig(id=str(root / "vjepa2"), device="cpu")
    assert load_backbone(config).frames == 8
    with pytest.raises(TubeletError, match=r"multiple of 2 frames per clip, not 7\. Set sampling\.frames: 6"):
        load_backbone(config, 7)


def test_siglip2_patches_are_those_of_its_processor(backbone_of: Callable[[str], Backbone], root: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    backbone_of("siglip2")
    tall = Preprocessing(resize_to=(64, 16))
    backbone = load_backbone(BackboneConfig(id=str(root / "siglip2"), device="cpu", preprocessing=tall), 1)
    pixels = pixels_for(backbone, 1)
    patches = torch.as_tensor(np.asarray(convert_image_to_patches(pixels[0, 0].numpy(), 8)))[None]
    with torch.no_grad():
        want = backbone.model(patches, torch.ones(1, 16, dtype=torch.int64), torch.tensor([[8, 2]])).last_hidden_state
    assert torch.equal(backbone.activations(pixels, ["final_norm"])["final_norm"].tokens, want[None])


def test_timesformer_that_folds_time_into_the_batch_is_refused(root: Path) -> None:
    import transformers

    settings = IMAGE | WIDE | {"num_frames": 4, "attention_type": "space_only"}
    folder = root / "space-only"
    save_random(transformers.TimesformerModel, transformers.TimesformerConfig(**settings), folder, seed=3)
    write_processor(folder, "x", shortest_edge=32, crop=32, resample=2)
    with pytest.raises(TubeletError, match="attends over space only"):
        load_backbone(BackboneConfig(id=str(folder), device="cpu"))


@pytest.mark.parametrize("case", ["videomae", "vivit", "timesformer", "vjepa2"])
def test_a_wrong_number_of_frames_names_the_right_one(
    backbone_of: Callable[[str], Backbone], root: Path, case: str
) -> None:
    right = backbone_of(case).frames
    with pytest.raises(TubeletError, match=f"sampling.frames: {right}"):
        load_backbone(BackboneConfig(id=str(root / case), device="cpu"), right + 1)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_family_runs_in_half_precision(
    backbone_of: Callable[[str], Backbone], root: Path, case: str, precision: str
) -> None:
    exact = backbone_of(case)
    rough = load_backbone(BackboneConfig(id=str(root / case), device="cpu", precision=precision), exact.frames)
    pixels = pixels_for(exact)
    want = exact.activations(pixels, ["blocks.-1"])["blocks.-1"].tokens
    got = rough.activations(pixels, ["blocks.-1"])["blocks.-1"].tokens
    assert got.dtype == getattr(torch, precision)
    assert (got.float() - want).norm() / want.norm() < (0.02 if precision == "float16" else 0.1)
    assert rough.describe()["precision"] == precision


@pytest.mark.parametrize("case", ["videomae", "timesformer"])
def test_compiled_as_one_graph_it_says_the_same(
    backbone_of: Callable[[str], Backbone], root: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tracing is the real one; machine code would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = backbone_of(case)
    compiled = load_backbone(BackboneConfig(id=str(root / case), device="cpu", compile=True), plain.frames)
    for hooks, sizes in ((["blocks.0", "blocks.1"], (2, 3)), (["blocks.1"], (2,))):
        for clips in sizes:
            pixels = pixels_for(plain, clips)
            wanted, activations = plain.activations(pixels, hooks), compiled.activations(pixels, hooks)
            for hook in hooks:
                torch.testing.assert_close(activations[hook].tokens, wanted[hook].tokens, rtol=1e-4, atol=1e-4)
    assert compiled.describe() == {**plain.describe(), "compiled": True}
