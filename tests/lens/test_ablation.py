"""Laws of ablation: sets, matching, m_50, concentration."""

from __future__ import annotations

import numpy as np
import pytest

from tubelet_lens.metrics.class_ranking import importance, ranked
from tubelet_lens.stats.ablation_curve import ablate, gini, m_50, matched_set, set_sizes


def test_importance_is_what_zeroing_takes_from_the_classs_logit() -> None:
    rng = np.random.default_rng(0)
    weights, codes = rng.standard_normal((3, 6)), rng.random((20, 6)).astype(np.float32)
    classes = rng.integers(0, 3, 20)
    found = importance(weights, codes, classes)
    for number in range(3):
        here = codes[classes == number].astype(np.float64)
        for latent in range(6):
            without = here.copy()
            without[:, latent] = 0
            effect = ((here - without) @ weights[number]).mean()
            assert found[number, latent] == pytest.approx(abs(effect))


def test_ranking_holds_alive_latents_only_best_first() -> None:
    alive = np.array([True, False, True, True, True])
    assert ranked(np.array([1.0, 9.0, 3.0, 1.0, 2.0]), alive).tolist() == [2, 4, 0, 3]


def test_a_matched_set_is_as_active_and_holds_no_target() -> None:
    rng = np.random.default_rng(1)
    mean = np.exp(rng.standard_normal(400))
    alive = rng.random(400) < 0.9
    targets = rng.choice(np.flatnonzero(alive), 20, replace=False)
    seen = set()
    for _ in range(20):
        chosen = matched_set(targets, mean, alive, rng)
        assert len(set(chosen)) == 20
        assert not set(chosen) & set(targets)
        assert alive[chosen].all()
        assert np.log(mean[chosen]).mean() == pytest.approx(np.log(mean[targets]).mean(), abs=0.1)
        seen.add(tuple(sorted(chosen)))
    assert len(seen) == 20
    assert len(matched_set(targets[:1], mean, alive, rng)) == 1


def test_matching_may_use_every_latent_that_is_left() -> None:
    chosen = matched_set(np.arange(5), np.ones(10), np.ones(10, dtype=bool), np.random.default_rng(0))
    assert sorted(chosen) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("planted", [1, 3, 6, 8, 13])
def test_m_50_is_the_planted_number(planted: int) -> None:
    """Accuracy falls from 1 to 0 when the last of the planted latents goes."""
    order = np.random.default_rng(2).permutation(64)
    vital = set(order[:planted].tolist())

    def measure(latents: np.ndarray) -> float:
        return 0.0 if vital <= set(latents.tolist()) else 1.0

    found = ablate(
        measure, order, np.ones(64), sizes=set_sizes(64, 100), draws=20, chance=0.25, rng=np.random.default_rng(3)
    )
    assert found.sizes == (1, 2, 4, 8, 16, 32)
    assert found.m_50 == planted
    assert (found.bottom == 1).all()
    assert found.random.shape == (20, 6)
    assert found.random.min() == 1
    assert found.area(found.random[0]) == 0
    lost = [size >= planted for size in found.sizes]
    assert found.area(found.top) == pytest.approx(np.mean(lost) / 0.75)
    assert found.mismatch == 1


def test_m_50_is_undefined_where_half_is_never_lost() -> None:
    sizes = (1, 2, 4)
    assert m_50(lambda size: size >= 5, sizes, np.zeros(3, dtype=bool)) is None
    blind = ablate(
        lambda latents: 0.25, np.arange(8), np.ones(8), sizes=sizes, draws=2, chance=0.25, rng=np.random.default_rng(0)
    )
    assert blind.m_50 is None
    assert blind.area(blind.top) is None


def test_sizes_leave_as_many_latents_to_draw_from() -> None:
    assert set_sizes(9, 100) == (1, 2, 4)
    assert set_sizes(1000, 5) == (1, 2, 4)
    assert set_sizes(1, 5) == ()


def test_gini_of_equality_and_of_monopoly() -> None:
    assert gini(np.ones(10)) == pytest.approx(0)
    assert gini(np.eye(1, 10)[0]) == pytest.approx(0.9)
    values = np.random.default_rng(4).random(30)
    pairwise = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert gini(values) == pytest.approx(pairwise)
    assert gini(np.zeros(3)) is None
