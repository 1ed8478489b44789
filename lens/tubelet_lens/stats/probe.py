"""The action probe's model: a penalty chosen on validation videos, fitted again on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.stats.basis import Basis
from tubelet_lens.stats.logistic import Logistic, fit_logistic, fit_path


@dataclass(frozen=True, eq=False)
class Probe:
    """Multinomial logistic regression on standardized vectors."""

    basis: Basis
    model: Logistic
    penalty: float

    def probabilities(self, rows_NF: NDArray[np.floating]) -> Tensor:
        """[N, C]"""
        return self.model.logits(self.basis.coordinates(rows_NF)).softmax(1)

    def weights(self, columns: int) -> NDArray[np.float64]:
        """[C, columns], in units of the vectors."""
        return self.basis.weights(self.model.weights_CR, columns)


def choose_penalty(
    rows_NF: NDArray[np.floating],
    class_N: NDArray[np.int64],
    validation_N: NDArray[np.bool_],
    classes: int,
    penalties: Sequence[float],
    device: torch.device,
) -> float:
    """The penalty with the best top-1 on the validation rows, fitted on the others; of equals that of least loss."""
    if len(set(penalties)) == 1 or not validation_N.any() or validation_N.all():
        return max(penalties)
    basis = Basis.fit(rows_NF[~validation_N], device)
    train, held = (basis.coordinates(rows_NF[part]) for part in (~validation_N, validation_N))
    wanted = torch.from_numpy(class_N).to(device)
    scores = {}
    for penalty, model in fit_path(train, wanted[torch.from_numpy(~validation_N)], classes, penalties).items():
        logits, truth = model.logits(held), wanted[torch.from_numpy(validation_N)]
        right = float((logits.argmax(1) == truth).double().mean())
        scores[penalty] = (right, -float(nnf.cross_entropy(logits, truth)))
    return max(scores, key=lambda penalty: scores[penalty])


def fit_probe(
    rows_NF: NDArray[np.floating], class_N: NDArray[np.int64], classes: int, penalty: float, device: torch.device
) -> Probe:
    """The probe of `rows_NF`."""
    basis = Basis.fit(rows_NF, device)
    wanted = torch.from_numpy(class_N).to(device)
    return Probe(basis, fit_logistic(basis.coordinates(rows_NF), wanted, classes, penalty), penalty)
