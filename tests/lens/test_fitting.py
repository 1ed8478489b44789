"""Laws of what the clip metrics are fitted with: partition, logistic regression, ridge, bootstrap, ranks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.metrics.retrieval import ranks
from tubelet_lens.stats.linear_models import (
    choose_penalty,
    fit_probe,
    fit_ridge,
    interval,
)


def test_a_partition_keeps_a_videos_clips_together_and_leaves_none_out() -> None:
    videos = [f"v{n % 20}" for n in range(60)]
    parts = partition(videos, validation=0.2, ranking=0.25, seed=1)
    masks = np.stack([parts.train, parts.validation, parts.ranking])
    assert (masks.sum(0) == 1).all()
    by_video = [len({tuple(masks[:, n]) for n in range(60) if videos[n] == video}) for video in set(videos)]
    assert by_video == [1] * 20
    assert masks.sum(1).tolist() == [33, 12, 15]


def test_a_partition_depends_on_the_videos_not_on_the_order_of_clips() -> None:
    videos = [f"v{n}" for n in range(30)]
    there, back = (partition(names, validation=0.3, ranking=0.2, seed=5) for names in (videos, videos[::-1]))
    assert (there.validation == back.validation[::-1]).all()
    assert (there.validation != partition(videos, validation=0.3, ranking=0.2, seed=6).validation).any()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_a_probe_reaches_the_optimum_that_scipy_finds_on_standardized_rows(penalty: float, classes: int) -> None:
    rng = np.random.default_rng(2)
    rows, class_N = rng.standard_normal((50, 4)) * [1, 2, 5, 0.1] + 3, rng.integers(0, classes, 50)
    standard = (rows - rows.mean(0)) / rows.std(0)

    def loss(flat: np.ndarray) -> float:
        weights, bias = flat[: 4 * classes].reshape(classes, 4), flat[4 * classes :]
        chosen = log_softmax(standard @ weights.T + bias, axis=1)[np.arange(50), class_N]
        return float(-chosen.mean() + penalty / 2 * (weights**2).sum())

    best = minimize(loss, np.zeros(5 * classes), method="BFGS", options={"gtol": 1e-8})
    probe = fit_probe(rows, class_N, classes, penalty)
    weights = probe.weights_CF * rows.std(0)
    bias = probe.bias_C + probe.weights_CF @ rows.mean(0)
    assert loss(np.concatenate([weights.ravel(), bias])) == pytest.approx(best.fun, abs=1e-9)
    assert weights == pytest.approx(best.x[: 4 * classes].reshape(classes, 4), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 5])
def test_probabilities_are_the_softmax_of_logits_and_constant_columns_weigh_nothing(classes: int) -> None:
    rng = np.random.default_rng(1)
    rows, class_N = rng.standard_normal((40, 6)).astype(np.float32), rng.integers(0, classes, 40)
    rows[:, 2] = 1.5
    probe = fit_probe(rows, class_N, classes, 0.1)
    assert probe.probabilities(rows) == pytest.approx(np.exp(log_softmax(probe.logits(rows), axis=1)))
    assert (probe.weights_CF[:, 2] == 0).all()
    assert (probe.weights_CF[:, [0, 1]] != 0).all()


def test_a_class_without_a_row_is_never_predicted_and_a_class_alone_always() -> None:
    rng = np.random.default_rng(3)
    rows, class_N = rng.standard_normal((40, 5)), rng.integers(0, 2, 40) * 2
    assert (fit_probe(rows, class_N, 4, 0.1).probabilities(rows)[:, [1, 3]] == 0).all()
    assert (fit_probe(rows, np.full(40, 1), 4, 0.1).probabilities(rows) == [0, 1, 0, 0]).all()
    held = np.arange(40) < 10
    assert choose_penalty(rows, np.where(held, 3, class_N), held, 4, (0.1, 1.0)) in (0.1, 1.0)


def test_the_chosen_penalty_is_the_one_that_validation_likes_best() -> None:
    rng = np.random.default_rng(4)
    classes = rng.integers(0, 3, 200)
    rows = rng.standard_normal((200, 40)).astype(np.float32)
    rows[np.arange(200), classes] += 1.5
    held, penalties = np.arange(200) >= 60, (1e-4, 1e-1, 10.0)
    scores = {}
    for penalty in penalties:
        found = fit_probe(rows[~held], classes[~held], 3, penalty).probabilities(rows[held])
        scores[penalty] = (found.argmax(1) == classes[held]).mean()
    assert len(set(scores.values())) == 3
    assert choose_penalty(rows, classes, held, 3, penalties) == max(penalties, key=lambda p: scores[p])


@pytest.mark.parametrize("shape", [(30, 5), (8, 20)])
def test_ridge_solves_the_normal_equations(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    rows, targets = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((shape[0], 3))
    maps = fit_ridge(rows, targets, (0.1, 10.0))
    wide = rows.astype(np.float64)
    standard = (wide - wide.mean(0)) / wide.std(0)
    for penalty, found in maps.items():
        left = standard.T @ standard + penalty * len(rows) * np.eye(shape[1])
        solved = np.linalg.solve(left, standard.T @ (targets - targets.mean(0)))
        assert found(rows) == pytest.approx(standard @ solved, abs=1e-9)


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    inside = 0
    for trial in range(300):
        low, high = interval((rng.random(80) < 0.3).astype(float), draws=300, seed=trial)
        inside += low <= 0.3 <= high
    assert 0.89 < inside / 300 < 0.985


def test_a_paired_interval_is_narrower_than_the_parts() -> None:
    rng = np.random.default_rng(7)
    one = (rng.random(200) < 0.5).astype(float)
    other = np.where(rng.random(200) < 0.05, 1 - one, one)
    low, high = interval(one - other, draws=1000, seed=0)
    alone_low, alone_high = interval(one, draws=1000, seed=0)
    assert high - low < (alone_high - alone_low) / 2


def test_ranks_with_ties_agree_with_counting_one_by_one() -> None:
    rng = np.random.default_rng(8)
    scores = rng.integers(0, 4, (25, 9)).astype(float)
    right = rng.random((25, 9)) < 0.3
    right[np.arange(25), rng.integers(0, 9, 25)] = True
    found = ranks(scores, right)
    for query in range(25):
        best = max(scores[query, item] for item in range(9) if right[query, item])
        greater = sum(scores[query, item] > best and not right[query, item] for item in range(9))
        ties = sum(scores[query, item] == best and not right[query, item] for item in range(9))
        assert found.rank[query] == 1 + greater + ties / 2
        assert (found.optimistic[query], found.pessimistic[query]) == (1 + greater, 1 + greater + ties)
    assert found.recall(2).mean() == (found.rank <= 2).mean()
    assert found.chance_r1 == pytest.approx(right.mean())


def test_a_code_that_is_always_the_same_ranks_in_the_middle_not_first() -> None:
    found = ranks(np.zeros((5, 11)), np.eye(5, 11, dtype=bool))
    assert (found.rank == 6).all()
