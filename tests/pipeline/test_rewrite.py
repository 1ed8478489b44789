"""Laws of writing into a running backbone, for every family: only what is rewritten changes, and nothing stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import CASES, pixels_for, write_checkpoint
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone, rewriting
from tubelet_pipeline.backbones.classifier import Classifier, has_classifier


def outputs_of(backbone: Backbone, hook: str) -> list[Any]:
    """Everything that the module of `hook` returns in a pass, heard after the edit."""
    heard: list[Any] = []
    handle = backbone.module(hook).register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    try:
        with torch.no_grad():
            backbone.forward(pixels_for(backbone))
    finally:
        handle.remove()
    return heard


@pytest.mark.parametrize("case", CASES)
def test_only_the_token_that_is_rewritten_changes(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    pixels = pixels_for(backbone)
    for hook in backbone.hook_names:
        before = backbone.activations(pixels, [hook])[hook]

        def shift(tokens: torch.Tensor) -> torch.Tensor:
            new = tokens.clone()
            new[1, 2, 7] += 3.0
            return new

        with rewriting(backbone, hook, shift):
            after = backbone.activations(pixels, [hook])[hook]
        assert (after.tokens != before.tokens).any(-1).nonzero().tolist() == [[1, 2, 7]]
        torch.testing.assert_close(after.tokens[1, 2, 7], before.tokens[1, 2, 7] + 3.0)
        if before.special is not None:
            assert after.special is not None
            assert torch.equal(after.special, before.special)


@pytest.mark.parametrize("case", CASES)
def test_a_blocks_output_keeps_its_form(backbone_of: Callable[[str], Backbone], case: str) -> None:
    """A tuple stays a tuple of the same length, and what stands beside the tokens stays the same object's value."""
    backbone = backbone_of(case)
    for hook in backbone.hook_names:
        (plain,) = outputs_of(backbone, hook)
        with rewriting(backbone, hook, lambda tokens: tokens + 1):
            (edited,) = outputs_of(backbone, hook)
        assert type(edited) is type(plain)
        if isinstance(plain, tuple):
            assert len(edited) == len(plain)
            for mine, theirs in zip(edited[1:], plain[1:], strict=True):
                assert type(mine) is type(theirs)
                assert not isinstance(mine, torch.Tensor) or torch.equal(mine, theirs)
            plain, edited = plain[0], edited[0]
        assert edited.shape == plain.shape
        assert edited.dtype == plain.dtype


def test_two_families_give_tuples(backbone_of: Callable[[str], Backbone]) -> None:
    """Else the law above would say nothing of them."""
    tuples = {case for case in CASES if isinstance(outputs_of(backbone_of(case), "blocks.1")[0], tuple)}
    assert tuples == {"vjepa2", "timesformer", "timesformer-joint"}


@pytest.mark.parametrize("case", CASES)
def test_a_rewrite_that_changes_nothing_changes_no_bit(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    pixels = pixels_for(backbone)
    before = backbone.activations(pixels, backbone.hook_names)
    for rewrite in (lambda tokens: tokens.clone(), lambda _tokens: None):
        with rewriting(backbone, "blocks.0", rewrite):
            after = backbone.activations(pixels, backbone.hook_names)
        for hook in backbone.hook_names:
            assert torch.equal(after[hook].tokens, before[hook].tokens)


@pytest.mark.parametrize("case", CASES)
def test_what_follows_is_what_follows_from_the_new_tokens(backbone_of: Callable[[str], Backbone], case: str) -> None:
    """The rest of the model, run by hand from the edited output, gives the same states."""
    backbone = backbone_of(case)
    pixels = pixels_for(backbone)
    with rewriting(backbone, "blocks.1", lambda tokens: -tokens):
        got = backbone.activations(pixels, ["blocks.1", "blocks.2"])
        (output,) = outputs_of(backbone, "blocks.1")
    replaced = backbone.blocks[1].register_forward_hook(lambda *_: output)
    try:
        want = backbone.activations(pixels, ["blocks.2"])["blocks.2"]
    finally:
        replaced.remove()
    assert torch.equal(got["blocks.2"].tokens, want.tokens)
    assert not torch.equal(got["blocks.2"].tokens, backbone.activations(pixels, ["blocks.2"])["blocks.2"].tokens)


def test_after_an_error_the_backbone_is_as_it_was(backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of("timesformer")
    pixels = pixels_for(backbone)
    before = backbone.activations(pixels, ["final_norm"])["final_norm"].tokens

    def fail(_tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), rewriting(backbone, "blocks.0", fail):
        backbone.activations(pixels, ["final_norm"])
    with pytest.raises(ValueError, match="gave"), rewriting(backbone, "blocks.0", lambda tokens: tokens[:, :1]):
        backbone.activations(pixels, ["final_norm"])
    assert not any(module._forward_hooks for module in backbone.model.modules())
    assert torch.equal(backbone.activations(pixels, ["final_norm"])["final_norm"].tokens, before)


def test_an_unknown_hook_is_refused_and_a_compiled_backbone_too(
    backbone_of: Callable[[str], Backbone], root: Path
) -> None:
    backbone = backbone_of("videomae")
    with pytest.raises(TubeletError, match=r"no hook 'blocks\.9'"), rewriting(backbone, "blocks.9", lambda t: t):
        pass
    compiled = load_backbone(BackboneConfig(id=str(root / "videomae"), device="cpu", compile=True))
    with pytest.raises(TubeletError, match="is compiled"), rewriting(compiled, "blocks.0", lambda t: t):
        pass


CLASSIFIERS = {
    "videomae": "VideoMAEForVideoClassification",
    "vjepa2": "VJEPA2ForVideoClassification",
    "timesformer": "TimesformerForVideoClassification",
    "vivit": "VivitForVideoClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "clip-whole": "CLIPForImageClassification",
    "siglip-whole": "SiglipForImageClassification",
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_the_checkpoints_own_classifier_says_the_same_on_our_backbone(tmp_path: Path, case: str) -> None:
    import transformers

    architecture = getattr(transformers, CLASSIFIERS[case])
    folder = write_checkpoint(architecture, CASES[case][1] | {"num_labels": 5}, tmp_path / case)
    backbone = load_backbone(BackboneConfig(id=str(folder), device="cpu"), CASES[case][2])
    assert has_classifier(backbone)
    classifier = Classifier(backbone)
    pixels = pixels_for(backbone)
    whole = architecture.from_pretrained(folder).eval()
    with torch.no_grad():
        want = whole(pixels).logits if "Video" in CLASSIFIERS[case] else whole(pixels.flatten(0, 1)).logits
    want = want.unflatten(0, (2, -1)).mean(1)
    torch.testing.assert_close(classifier.logits(pixels), want)
    assert classifier.classes == tuple(f"LABEL_{i}" for i in range(5))
    with rewriting(backbone, "blocks.0", lambda tokens: -tokens):
        assert not torch.allclose(classifier.logits(pixels), want)
    torch.testing.assert_close(classifier.logits(pixels), want)


def test_a_checkpoint_without_a_classifier_says_so(backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of("dinov2")
    assert not has_classifier(backbone)
    with pytest.raises(TubeletError, match="has no classifier"):
        Classifier(backbone)
