"""Laws of what the clip metrics are fitted with: partition, basis, logistic regression, ridge, bootstrap, ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.metrics.retrieval import ranks
from tubelet_lens.stats.linear_models import (
    Basis,
    choose_penalty,
    fit_logistic,
    fit_path,
    fit_probe,
    fit_ridge,
    interval,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("shape", [(40, 6), (12, 30)])
def test_a_basis_keeps_every_inner_product_of_standardized_rows(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(shape).astype(np.float32) * rng.gamma(1, 1, shape[1]).astype(np.float32) + 3
    rows[:, 2] = 1.5
    basis = Basis.fit(rows, CPU)
    assert 2 not in basis.kept
    wide = rows.astype(np.float64)[:, basis.kept]
    standard = (wide - wide.mean(0)) / wide.std(0)
    found = basis.coordinates(rows).numpy()
    assert found.shape[1] <= min(shape)
    assert found @ found.T == pytest.approx(standard @ standard.T, abs=1e-8)
    assert found.T @ found == pytest.approx(np.diag(basis.squares_R.numpy()), abs=1e-7)


@pytest.mark.parametrize("shape", [(40, 6), (12, 30)])
def test_weights_on_coordinates_are_weights_on_the_vectors(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal(shape).astype(np.float32)
    basis = Basis.fit(rows, CPU)
    weights = torch.from_numpy(rng.standard_normal((3, basis.axes_KR.shape[1])))
    on_vectors = rows.astype(np.float64) @ basis.weights(weights, shape[1]).T
    difference = (basis.coordinates(rows) @ weights.T).numpy() - on_vectors
    assert difference == pytest.approx(np.tile(difference[0], (shape[0], 1)), abs=1e-9)


@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_logistic_regression_reaches_the_optimum_that_scipy_finds(penalty: float) -> None:
    rng = np.random.default_rng(2)
    rows, classes = rng.standard_normal((50, 4)), rng.integers(0, 3, 50)

    def loss(flat: np.ndarray) -> float:
        weights, bias = flat[:12].reshape(3, 4), flat[12:]
        chosen = log_softmax(rows @ weights.T + bias, axis=1)[np.arange(50), classes]
        return float(-chosen.mean() + penalty / 2 * (weights**2).sum())

    best = minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-8})
    found = fit_logistic(torch.from_numpy(rows), torch.from_numpy(classes), 3, penalty)
    flat = np.concatenate([found.weights_CR.numpy().ravel(), found.bias_C.numpy()])
    assert loss(flat) == pytest.approx(best.fun, abs=1e-9)
    assert found.weights_CR.numpy() == pytest.approx(best.x[:12].reshape(3, 4), abs=1e-4)


def test_a_path_of_penalties_ends_where_each_would_alone() -> None:
    rng = np.random.default_rng(3)
    rows, classes = torch.from_numpy(rng.standard_normal((40, 5))), torch.from_numpy(rng.integers(0, 4, 40))
    path = fit_path(rows, classes, 4, (0.01, 1.0))
    alone = fit_logistic(rows, classes, 4, 0.01)
    assert path[0.01].weights_CR.numpy() == pytest.approx(alone.weights_CR.numpy(), abs=1e-3)
    assert path[1.0].weights_CR.norm() < path[0.01].weights_CR.norm()


def test_the_chosen_penalty_is_the_one_that_validation_likes_best() -> None:
    rng = np.random.default_rng(4)
    classes = rng.integers(0, 3, 200)
    rows = rng.standard_normal((200, 40)).astype(np.float32)
    rows[np.arange(200), classes] += 1.5
    held, penalties = np.arange(200) >= 60, (1e-4, 1e-1, 10.0)
    scores = {}
    for penalty in penalties:
        found = fit_probe(rows[~held], classes[~held], 3, penalty, CPU).probabilities(rows[held]).numpy()
        scores[penalty] = (found.argmax(1) == classes[held]).mean()
    assert len(set(scores.values())) == 3
    assert choose_penalty(rows, classes, held, 3, penalties, CPU) == max(penalties, key=lambda p: scores[p])


@pytest.mark.parametrize("shape", [(30, 5), (8, 20)])
def test_ridge_solves_the_normal_equations(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    rows, targets = rng.standard_normal(shape).astype(np.float32), rng.standard_normal((shape[0], 3))
    maps = fit_ridge(rows, torch.from_numpy(targets), (0.1, 10.0), CPU)
    wide = rows.astype(np.float64)
    standard = (wide - wide.mean(0)) / wide.std(0)
    for penalty, found in maps.items():
        left = standard.T @ standard + penalty * len(rows) * np.eye(shape[1])
        solved = np.linalg.solve(left, standard.T @ (targets - targets.mean(0)))
        assert found(rows).numpy() == pytest.approx(standard @ solved, abs=1e-9)


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
