"""Laws of dictionaries: neighbors are found, permuted dictionaries are matched, planted features are recovered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_lens.codes import dictionary
from tubelet_lens.codes.dictionary import directions, effective_rank, nearest_latents, random_directions
from tubelet_lens.metrics.seed_stability import seed_figures
from tubelet_lens.stats.matching import cosines, match, recovery
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.sae_files import load_sae

HOOK = "blocks.1"
FEATURES, LATENTS, CHANNELS, ACTIVE = 24, 48, 16, 2


def test_neighbors_are_those_of_the_whole_matrix_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_directions(50, 6, 0) * torch.linspace(0.5, 3, 50)[:, None]
    whole = cosines(rows, rows)
    np.fill_diagonal(whole, 0)
    expected = np.argsort(-np.abs(whole), axis=1)[:, :5]
    monkeypatch.setattr(dictionary, "_CELLS", 7 * 50)
    found = nearest_latents(rows, 5)
    np.testing.assert_array_equal(found.latents_Fk, expected)
    np.testing.assert_allclose(found.cosines_Fk, np.take_along_axis(whole, expected, 1), atol=1e-6)


def test_only_alive_latents_are_neighbors() -> None:
    rows = random_directions(10, 4, 1)
    alive = np.arange(10) % 2 == 0
    found = nearest_latents(rows, 6, alive)
    assert (found.latents_Fk[~alive] == -1).all()
    assert np.isnan(found.cosines_Fk[~alive]).all()
    assert (found.latents_Fk[alive][:, :4] % 2 == 0).all()
    assert (found.latents_Fk[alive][:, 4:] == -1).all()  # five are alive: four others


def test_effective_rank_is_the_number_of_dimensions_filled_evenly() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.eye(7)[[0, 0, 1, 1]]) == pytest.approx(2)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1, abs=1e-5)


def test_a_permuted_dictionary_is_matched_exactly() -> None:
    rows = random_directions(200, 16, 2)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    found = match(cosines(rows, rows[order] * 3))
    np.testing.assert_array_equal(order.numpy()[found.second_M], found.first_M)
    np.testing.assert_allclose(found.likeness_M, 1)
    assert found.above(0.9) == 1
    flipped = -rows[order]
    assert match(cosines(rows, flipped)).mean < 0.9
    assert match(cosines(rows, flipped, signed=False)).mean == pytest.approx(1)


def test_one_learned_direction_cannot_match_two_true_ones() -> None:
    true = torch.eye(4)
    learned = torch.stack([true[0], true[0], nnf.normalize(true[1] + true[2], dim=0)])
    found = recovery(learned, true)
    assert found.mean_max_cosine == pytest.approx((1 + 2 / np.sqrt(2)) / 4)
    assert found.matched_cosine == pytest.approx((1 + 1 / np.sqrt(2)) / 4)
    assert found.found == 1 / 4


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Two runs that differ in their seed, on a store whose activations are sums of two of 24 directions; these."""
    root = tmp_path_factory.mktemp("planted")
    true = random_directions(FEATURES, CHANNELS, 4)
    rng = np.random.default_rng(5)
    clips, grid = 40, (4, 8, 8)
    tokens = clips * 4 * 64
    which = rng.random((tokens, FEATURES)).argpartition(ACTIVE, axis=1)[:, :ACTIVE]
    codes = np.zeros((tokens, FEATURES), dtype=np.float32)
    np.put_along_axis(codes, which, rng.uniform(1, 2, which.shape).astype(np.float32), axis=1)
    x = (codes @ true.numpy()).reshape(clips, 4, 64, CHANNELS)
    store = make_store(root / "s.zarr", make_plan(clips=clips, grid=grid, hooks={HOOK: CHANNELS}), {HOOK: x})
    settings = {"steps": 500, "batch_tokens": 256, "eval_every": 500, "optimizer": {"lr": 5e-3}, "device": "cpu"}
    for seed in (0, 1):
        sae = {"k": ACTIVE, "latents": LATENTS, "seed": seed, "init": {"directions": "data"}}
        train(TrainConfig(store=store.url, out=root / f"run{seed}", sae=sae, seed=seed, **settings))  # type: ignore[arg-type]
    return root, true


def test_a_trained_sae_finds_planted_features(planted: tuple[Path, torch.Tensor]) -> None:
    root, true = planted
    found = recovery(directions(load_sae(root / "run0")), true)
    assert found.mean_max_cosine > 0.9
    assert found.matched_cosine > 0.9
    by_chance = recovery(random_directions(LATENTS, CHANNELS, 9), true)
    assert by_chance.mean_max_cosine < 0.75
    assert by_chance.found == 0


def test_directions_are_what_one_unit_adds_in_raw_units(planted: tuple[Path, torch.Tensor]) -> None:
    sae = load_sae(planted[0] / "run0")
    codes = torch.rand(3, LATENTS)
    more = codes.clone()
    more[:, 7] += 1
    torch.testing.assert_close(
        sae.decode(more) - sae.decode(codes), directions(sae)[7].expand(3, -1), atol=1e-5, rtol=0
    )


def test_seeds_that_find_the_same_features_are_stable(planted: tuple[Path, torch.Tensor]) -> None:
    from tubelet_store.reader import open_store

    root, _ = planted
    figures = seed_figures([root / "run0", root / "run1"], store=open_store(str(root / "s.zarr")), limit_clips=10)
    value = {figure.name: figure.value for figure in figures}
    assert value["seeds.cosine"] > 0.75 > 0.6 > value["seeds.cosine.random"]
    assert value["seeds.above_09"] > 0.5 > 0.1 > value["seeds.above_09.random"]
    assert value["seeds.correlation"] > 0.4 > 0.2 > value["seeds.correlation.permuted"]
    assert len({figure.name for figure in figures}) == len(figures) == 12


def test_one_run_has_no_stability(planted: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(TubeletError, match="two runs or more"):
        seed_figures([planted[0] / "run0"])
