"""Laws of changing latents in running activations: what is added, where, and that nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from families import CASES, backbone_for, pixels_for
from tubelet.errors import TubeletError
from tubelet_lens.inputs.clip_selection import stratified_sample
from tubelet_lens.steering.class_edits import change_rates, edit_classes
from tubelet_lens.steering.classification_edits import best_latents
from tubelet_lens.steering.edit_controls import LatentUsage, RandomDirection, matched_edits
from tubelet_lens.steering.latent_edits import Edit, LatentEdits
from tubelet_lens.steering.operations import Amplify, Region, SetTo, Suppress, region_mask
from tubelet_lens.steering.readout import LastTokenProbe, fit_probe, later_hooks
from tubelet_lens.steering.segmentation_edits import Marks
from tubelet_pipeline.backbones import Backbone, rewriting
from tubelet_store.plan import Grid
from tubelet_trainer.sae.config import NormalizationConfig, ReLUConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

D, F = 6, 11
ROTATION = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(5)))[0]
SCALED = Normalization(torch.linspace(-40, 60, D), torch.tensor(7.0))
WHITENED = Normalization(torch.linspace(-4, 6, D), torch.tensor(1.0), ROTATION * 0.3, (ROTATION * 0.3).inverse())


def sae_with(normalization: Normalization, kind: str = "relu", channels: int = D, latents: int = F) -> SAE:
    """Random weights, decoder rows of unit norm."""
    whitening = "none" if normalization.whiten is None else "zca"
    config = {"latents": latents, "normalization": NormalizationConfig(whitening=whitening), "seed": 2}
    sae = SAE(ReLUConfig(**config) if kind == "relu" else TopKConfig(k=3, **config), normalization)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, channels))
        sae.b_enc.copy_(torch.linspace(-0.5, 0.5, latents))
    return sae.eval().requires_grad_(False)


def tokens_of(normalization: Normalization, clips: int = 2, seed: int = 0) -> Tensor:
    """[B, 3, 4, D] in raw units."""
    generator = torch.Generator().manual_seed(seed)
    return normalization.inverse(torch.randn(clips * 12, D, generator=generator)).view(clips, 3, 4, D)


@pytest.fixture(params=["scaled-relu", "scaled-topk", "whitened-relu", "whitened-topk"])
def sae(request: pytest.FixtureRequest) -> SAE:
    space, kind = request.param.split("-")
    return sae_with(SCALED if space == "scaled" else WHITENED, kind)


def active_latent(sae: SAE, tokens: Tensor) -> int:
    return int((sae.encode(tokens.flatten(0, 2)) > 0).sum(0).argmax())


OPERATIONS = [Suppress(), Suppress(strength=2.0), Amplify(factor=3.0), SetTo(value=1.25)]


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_the_token_moves_along_the_latents_direction_in_the_backbones_own_units(
    sae: SAE, operation: Suppress | Amplify | SetTo
) -> None:
    """x' = x + (f' - f) d_j with d_j taken back through the normalization, against two whole decodings."""
    x = tokens_of(sae.normalization)
    latent = active_latent(sae, x)
    largest = torch.full((F,), 3.0)
    new = LatentEdits(sae, [Edit(latent, operation)], largest)(x)
    f_NF = sae.encode(x.flatten(0, 2))
    wanted = f_NF.clone()
    match operation:
        case Suppress(strength=s):
            wanted[:, latent] = -s * 3.0
        case Amplify(factor=factor):
            wanted[:, latent] *= factor
        case SetTo(value=value):
            wanted[:, latent] = value
    moved = (sae.decode(wanted) - sae.decode(f_NF)).view(x.shape)
    assert float(moved.norm()) > 1
    torch.testing.assert_close(new - x, moved, rtol=1e-4, atol=1e-4)
    # The error term is kept exactly: x' - Dec(f') = x - Dec(f).
    torch.testing.assert_close(
        new.flatten(0, 2) - sae.decode(wanted), x.flatten(0, 2) - sae.decode(f_NF), rtol=1e-4, atol=1e-4
    )


def test_a_step_has_the_length_of_the_change_of_code_in_raw_units() -> None:
    """Forgetting the scale is the classic mistake."""
    sae = sae_with(SCALED)
    x = tokens_of(SCALED)
    edits = LatentEdits(sae, [Edit(1, SetTo(value=2.0))])
    step = (edits(x) - x).norm(dim=-1).flatten()
    change = (2.0 - sae.encode(x.flatten(0, 2))[:, 1]).abs()
    torch.testing.assert_close(step, 7.0 * change, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("identity", [Amplify(factor=1.0), "set", "silent"])
def test_an_identity_edit_changes_no_bit(sae: SAE, identity: object) -> None:
    x = tokens_of(sae.normalization)
    latent = active_latent(sae, x)
    codes = sae.encode(x[0].flatten(0, 1)).view(3, 4, F)
    if identity == "set":
        place = codes[..., latent].nonzero()[0]
        mask = torch.zeros(3, 4, dtype=torch.bool)
        mask[tuple(place)] = True
        edits = [Edit(latent, SetTo(value=float(codes[(*place, latent)])), mask)]
        x = x[:1]
    elif identity == "silent":
        silent = codes[..., latent] == 0
        assert silent.any()
        edits, x = [Edit(latent, Suppress(), silent)], x[:1]
    else:
        edits = [Edit(latent, identity)]
    rewrite = LatentEdits(sae, edits)
    assert torch.equal(rewrite.step(x).delta, torch.zeros_like(x))
    assert torch.equal(rewrite(x), x)


def test_outside_the_region_nothing_is_added(sae: SAE) -> None:
    x = tokens_of(sae.normalization)
    region = Region(steps=(1, 3), rows=(0, 1))
    mask = region_mask(region, Grid(time=3, height=2, width=2), None)
    assert mask is not None
    delta = LatentEdits(sae, [Edit(4, SetTo(value=9.0), torch.from_numpy(mask))]).step(x).delta
    inside = torch.from_numpy(mask).expand(2, 3, 4)
    assert torch.equal(delta[~inside], torch.zeros_like(delta[~inside]))
    assert (delta[inside] != 0).any(-1).all()
    assert int(mask.sum()) == 2 * 2


def test_edits_of_several_latents_add_up_and_edits_of_one_follow_each_other(sae: SAE) -> None:
    x = tokens_of(sae.normalization)
    first, second = Edit(2, SetTo(value=1.0)), Edit(7, Amplify(factor=-2.0))
    both = LatentEdits(sae, [first, second]).step(x).delta
    apart = LatentEdits(sae, [first]).step(x).delta + LatentEdits(sae, [second]).step(x).delta
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-4)
    chained = LatentEdits(sae, [first, Edit(2, Amplify(factor=3.0))]).step(x).delta
    torch.testing.assert_close(
        chained, LatentEdits(sae, [Edit(2, SetTo(value=3.0))]).step(x).delta, rtol=1e-4, atol=1e-4
    )


def test_the_control_steps_as_far_as_the_edit_on_every_token(sae: SAE) -> None:
    x = tokens_of(sae.normalization)
    edits = LatentEdits(sae, [Edit(active_latent(sae, x), Suppress())])
    control = RandomDirection(edits, seed=1)
    steps, wanted = (control(x) - x).norm(dim=-1), edits.step(x).delta.norm(dim=-1)
    torch.testing.assert_close(steps, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(control(x), control(x))
    assert not torch.allclose(control(x), RandomDirection(edits, seed=2)(x))


def test_matched_latents_are_others_that_are_about_as_active(sae: SAE) -> None:
    x = tokens_of(sae.normalization)[0]
    latent = active_latent(sae, x[None])
    mean = sae.encode(x.flatten(0, 1)).abs().mean(0).double().numpy()
    usage = LatentUsage(mean + 1, mean, (mean > 0).astype(float), 12)
    drawn = matched_edits(sae, [Edit(latent, Suppress())], x, usage, draws=5, seed=0)
    assert len(drawn) == 5
    for control in drawn:
        assert latent not in control.latents
        assert mean[control.latents[0]] > 0


def test_what_cannot_be_done_is_refused(sae: SAE) -> None:
    with pytest.raises(TubeletError, match=r"no latent 11: this SAE has 11.*from 0 to 10"):
        LatentEdits(sae, [Edit(11, Suppress())])
    with pytest.raises(TubeletError, match="not known"):
        LatentEdits(sae, [Edit(3, Suppress(strength=2.0))])
    grid = Grid(time=3, height=2, width=2)
    with pytest.raises(TubeletError, match=r"columns \[1, 5\] exceeds the grid, which has 2"):
        region_mask(Region(columns=(1, 5)), grid, None)
    with pytest.raises(TubeletError, match="no frame times"):
        region_mask(Region(seconds=(0.0, 1.0)), grid, None)
    with pytest.raises(ValidationError, match="not both"):
        Region(steps=(0, 1), seconds=(0.0, 1.0))
    with pytest.raises(ValidationError, match="is empty"):
        Region(rows=(2, 2))


def test_seconds_take_every_step_with_a_frame_inside() -> None:
    grid, times = Grid(time=4, height=1, width=1), np.arange(8) / 2  # two frames a step: 0, 0.5 | 1, 1.5 | ...
    mask = region_mask(Region(seconds=(0.5, 2.0)), grid, times)
    assert mask is not None
    assert mask.ravel().tolist() == [True, True, False, False]
    with pytest.raises(TubeletError, match=r"between 0\.00 s and 3\.50 s"):
        region_mask(Region(seconds=(9.0, 10.0)), grid, times)


def test_a_mask_file_cuts_out_of_the_rest(tmp_path: Path) -> None:
    grid = Grid(time=3, height=2, width=2)
    np.save(tmp_path / "m.npy", np.array([[True, False], [False, True]]))
    mask = region_mask(Region(steps=(0, 2), mask=tmp_path / "m.npy"), grid, None)
    assert mask is not None
    assert mask.tolist() == [[True, False, False, True]] * 2 + [[False] * 4]
    np.save(tmp_path / "w.npy", np.ones((3, 3), dtype=bool))
    with pytest.raises(TubeletError, match=r"not an array of bool \[2, 2\]"):
        region_mask(Region(mask=tmp_path / "w.npy"), grid, None)


@pytest.fixture(scope="module")
def backbone_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    root, loaded = tmp_path_factory.mktemp("families"), {}

    def get(case: str) -> Backbone:
        if case not in loaded:
            loaded[case] = backbone_for(case, root)
        return loaded[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_in_every_family_the_edit_lands_on_its_tokens_alone(backbone_of: Callable[[str], Backbone], case: str) -> None:
    backbone = backbone_of(case)
    pixels = pixels_for(backbone)
    before = backbone.activations(pixels, ["blocks.1", "blocks.2"])
    flat = before["blocks.1"].tokens.flatten(0, 2)
    normal = Normalization(flat.mean(0), flat.std())
    sae = sae_with(normal, channels=flat.shape[1], latents=40)
    mask = torch.zeros(backbone.grid.time, backbone.grid.space, dtype=torch.bool)
    mask[1, 4:6] = True
    mask[-1, 15] = True
    edits = LatentEdits(sae, [Edit(3, SetTo(value=5.0), mask)])
    with rewriting(backbone, "blocks.1", edits):
        after = backbone.activations(pixels, ["blocks.1", "blocks.2"])
    change = after["blocks.1"].tokens - before["blocks.1"].tokens
    assert torch.equal((change != 0).any(-1), mask.expand(2, -1, -1))
    f = sae.encode(flat)[:, 3].view(before["blocks.1"].tokens.shape[:3])
    wanted = (5.0 - f)[..., None] * normal.scale * sae.W_dec[3]
    torch.testing.assert_close(change[:, mask], wanted[:, mask], rtol=1e-3, atol=1e-3)
    if before["blocks.1"].special is not None:
        assert torch.equal(after["blocks.1"].special, before["blocks.1"].special)
    assert not torch.equal(after["blocks.2"].tokens, before["blocks.2"].tokens)


def test_later_hooks_are_those_that_an_edit_reaches(backbone_of: Callable[[str], Backbone]) -> None:
    backbone = backbone_of("dinov2")
    assert later_hooks(backbone, "blocks.0") == ("blocks.1", "blocks.2", "final_norm")
    assert later_hooks(backbone, "blocks.2") == ("final_norm",)
    assert later_hooks(backbone, "blocks.1.mlp") == ("blocks.1", "blocks.2", "final_norm")
    assert later_hooks(backbone, "final_norm") == ()
    for hook in ("blocks.0", "blocks.1.mlp"):
        with rewriting(backbone, hook, lambda tokens: tokens * 2):
            edited = backbone.activations(pixels_for(backbone), backbone.hook_names)
        plain = backbone.activations(pixels_for(backbone), backbone.hook_names)
        whole = [name for name in plain if name.count(".") <= 1]
        reached = [name for name in whole if not torch.equal(edited[name].tokens, plain[name].tokens)]
        assert set(reached) == {*later_hooks(backbone, hook), hook} & set(whole)


def test_the_probe_reads_what_its_weights_say(backbone_of: Callable[[str], Backbone]) -> None:
    """Weights folded back from standardized coordinates give the logits of the fitted model."""
    backbone = backbone_of("videomae")
    generator = torch.Generator().manual_seed(0)
    class_N = np.arange(40) % 3
    rows = torch.randn(40, 32, generator=generator) * 3 + 5
    rows[:, 0] += 10 * torch.from_numpy(class_N)
    probe = fit_probe(backbone, rows, class_N, ("a", "b", "c"), [str(i) for i in range(40)])
    assert isinstance(probe, LastTokenProbe)
    predicted = (rows @ probe.weights_CD.T + probe.bias_C).argmax(1)
    assert (predicted.numpy() == class_N).mean() > 0.9
    pixels = pixels_for(backbone)
    pooled = backbone.activations(pixels, [probe.hook])[probe.hook].tokens.flatten(1, 2).mean(1)
    torch.testing.assert_close(probe.logits(pixels), pooled @ probe.weights_CD.T + probe.bias_C)
    with pytest.raises(TubeletError, match="fewer than two classes"):
        fit_probe(backbone, rows, np.zeros(40, dtype=np.int64), ("a",), [str(i) for i in range(40)])


def test_change_rates_are_shares_of_what_was_predicted_before() -> None:
    before = np.array([0, 0, 0, 1, 1, 2])
    after = [np.array([1, 0, 2, 1, 0, 2]), np.array([0, 0, 0, 1, 1, 2])]
    # Class 0: 2 of 3 changed in the first draw, none in the second; of the 3 others 1 changed.
    assert change_rates(before, after, 0) == (2, 6, 1, 6)
    assert change_rates(before, after, 3) == (0, 0, 3, 12)


def test_means_over_classes_and_pooled_rates_differ_as_they_should() -> None:
    """Two classes: one of 2 units, all changed; one of 8, none changed: mean 1/2, pooled 2/10."""
    sae = sae_with(SCALED)
    before = np.array([0] * 2 + [1] * 8)

    def predict(rewrite: object) -> np.ndarray:
        edited = isinstance(rewrite, LatentEdits) and rewrite.latents == (3,)
        return np.where((before == 0) & edited, 2, before)

    found = edit_classes(
        predict,
        sae,
        {0: 3, 1: 4},
        largest_F=np.ones(F),
        mean_F=np.where(np.arange(F) == 3, 1e-9, np.linspace(1, 2, F)),
        strengths=(0.0, 2.0),
        draws=1,
        seed=0,
    )
    for rates in found.rates["class"]:
        assert rates.target() == 0.5
        assert rates.target(micro=True) == 0.2
        assert rates.other() == 0.0
    for rates in found.rates["direction"]:
        assert rates.target() == 0.0


def test_the_latent_of_a_class_is_the_one_that_marks_it() -> None:
    """Planted: latent 1 fires on class 1 alone, latent 2 on class 2 and much else, latent 0 always."""
    label = np.array([0] * 50 + [1] * 10 + [2] * 10 + [-1] * 30)
    codes = torch.zeros(100, 4)
    codes[:, 0] = 1.0
    codes[torch.from_numpy(label == 1), 1] = 0.5
    codes[torch.from_numpy(label == 2), 2] = 2.0
    codes[:20, 2] = 0.2  # gone above the threshold 0.3
    marks = Marks(4, 3)
    marks.add(codes[:40], label[:40])
    marks.add(codes[40:], label[40:])
    latents, scores = marks.best(max_frequency=0.5)
    assert latents == {1: 1, 2: 2}
    assert scores == {1: 1.0, 2: 1.0}
    # Latent 2 fires on 30 of 100 tokens.
    assert marks.best(max_frequency=0.25)[0] == {1: 1}
    np.testing.assert_allclose(marks.mean_F.numpy(), codes.abs().mean(0).numpy(), rtol=1e-6)


def test_the_latent_of_a_class_of_clips_is_the_one_that_marks_it() -> None:
    rng = np.random.default_rng(0)
    class_N = np.arange(80) % 4
    codes = rng.random((80, 6)).astype(np.float32)
    codes[:, 5] += 2 * (class_N == 2)
    codes[:, 1] += 2 * (class_N == 0)
    best = best_latents(codes, class_N)
    assert best[2][0] == 5
    assert best[0][0] == 1
    assert best[2][1] == 1.0


def test_a_few_clips_show_every_class_however_classes_are_ordered() -> None:
    in_turn, in_blocks = np.arange(32) % 16, np.repeat(np.arange(16), 2)
    for class_N in (in_turn, in_blocks):
        chosen = stratified_sample(class_N, 16)
        assert sorted(class_N[chosen]) == list(range(16))
        assert (np.diff(chosen) > 0).all()
        assert len(stratified_sample(class_N, 99)) == 32


def test_differences_do_not_go_through_the_mean() -> None:
    for normal in (SCALED, WHITENED):
        sae = sae_with(normal)
        rows = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
        wanted = normal.inverse(rows) - normal.inverse(torch.zeros(3, D))
        torch.testing.assert_close(sae.normalization.raw_difference(rows), wanted, rtol=1e-4, atol=1e-4)
