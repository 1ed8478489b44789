"""How much of a token's code survives one step of time: cosine, support Jaccard, flip rate (science note 1.4 c).

The note's flip rate is 1 - |S_t & S_t+1| / k, of a code in which k latents are active on every token. Here |S_t| stands
in place of k: the same number there, and defined where the count varies (BatchTopK, JumpReLU, ReLU, and TopK where
fewer than k values are positive); tokens on which nothing is active are left out. [RECON]
"""

from __future__ import annotations

from torch import Tensor

from tubelet_lens.codes.series import pairs_of_steps
from tubelet_lens.results.section import ratio


class StepCosine:
    """Cosine of each token's vector with that of the same patch one step later."""

    def __init__(self) -> None:
        self._sum = 0.0
        self.pairs = 0
        """Pairs in which neither vector is zero."""

    def add(self, products_TTS: Tensor, valid_T: Tensor, order_T: Tensor) -> None:
        """Add a clip, given the products of its steps patch by patch, with its steps in the order `order_T`."""
        early, late = pairs_of_steps(valid_T, order_T)
        squares = products_TTS[early, early] * products_TTS[late, late]
        both = squares > 0
        self._sum += float((products_TTS[early, late][both] / squares[both].sqrt()).sum())
        self.pairs += int(both.sum())

    @property
    def mean(self) -> float | None:
        """Mean over the pairs."""
        return ratio(self._sum, self.pairs)


class SupportOverlap:
    """Comparison of the set S_t of a token's active latents with that of the same patch one step later."""

    def __init__(self) -> None:
        self._jaccard = self._flip = 0.0
        self.jaccard_pairs = 0
        """Pairs in which at least one code is not zero."""
        self.flip_pairs = 0
        """Pairs in which the earlier code is not zero."""

    def add(self, common_TTS: Tensor, valid_T: Tensor, order_T: Tensor) -> None:
        """Add a clip, given |S_t & S_u| patch by patch, with its steps in the order `order_T`."""
        x, y = pairs_of_steps(valid_T, order_T)
        early, late, both = common_TTS[x, x], common_TTS[y, y], common_TTS[x, y]
        union = early + late - both
        self._jaccard += float((both[union > 0] / union[union > 0]).sum())
        self.jaccard_pairs += int((union > 0).sum())
        self._flip += float((1 - both[early > 0] / early[early > 0]).sum())
        self.flip_pairs += int((early > 0).sum())

    @property
    def jaccard(self) -> float | None:
        """Mean of |S_t & S_t+1| / |S_t | S_t+1|."""
        return ratio(self._jaccard, self.jaccard_pairs)

    @property
    def flip_rate(self) -> float | None:
        """Mean of 1 - |S_t & S_t+1| / |S_t|."""
        return ratio(self._flip, self.flip_pairs)
