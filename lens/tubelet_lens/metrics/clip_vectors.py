"""One vector per clip and subject: the input of probes and maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from tubelet_lens.codes.sparse_codes import Encoder
from tubelet_lens.inputs.pooled_clips import Pooled, PooledSplit
from tubelet_lens.metrics.metric import ClipSetting
from tubelet_lens.results.section import Subject

PoolingKind = Literal["mean", "max", "mean_max", "mean_then_encode"]

POOLING_WORDS: dict[PoolingKind, str] = {
    "mean": "mean over its tokens",
    "max": "largest value over its tokens",
    "mean_max": "mean and largest value over its tokens, end to end",
    "mean_then_encode": "mean over its tokens",
}

SUBJECT_WORDS: dict[Subject, str] = {
    "sae": "the SAE's codes",
    "raw": "the raw activations",
    "untrained": "the codes of the SAE's recipe with fresh weights",
    "random_topk": "a random projection to as many latents, the k largest of each token kept if positive",
    "pca": "principal components of the raw vectors, each scaled to variance 1",
}
"""What is pooled, in the report's order."""

_NOT_ENCODED: tuple[Subject, ...] = ("raw", "pca")

# Rows encoded at once.
_ROWS = 1024


def subjects(clips: ClipSetting) -> tuple[Subject, ...]:
    """Subjects that have vectors."""
    measured = set(clips.test.draws) | ({"pca"} if clips.config.controls else set())
    return tuple(subject for subject in SUBJECT_WORDS if subject in measured)


def vector_words(subject: Subject, kind: PoolingKind) -> str:
    """What a clip's vector is."""
    if kind == "mean_then_encode" and subject not in _NOT_ENCODED:
        return f"{SUBJECT_WORDS[subject]}, of one token: the mean of the clip's raw tokens (pooled first, then encoded)"
    return f"the {POOLING_WORDS[kind]} of {SUBJECT_WORDS[subject]}"


def vectors(
    clips: ClipSetting, fit: PooledSplit, subject: Subject, kind: PoolingKind
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Fit rows [N, F] and test rows of each draw of `subject`."""
    if kind == "mean_then_encode" and subject not in _NOT_ENCODED:
        for encoder in clips.encoders[subject]:
            rows, test_rows = (_encoded(encoder, side, clips.setting.device) for side in (fit, clips.test))
            yield rows, test_rows
        return
    source: Subject = "raw" if subject == "pca" else subject
    for fit_codes, test_codes in zip(fit.draws[source], clips.test.draws[source], strict=True):
        rows, test_rows = _one(fit_codes, kind), _one(test_codes, kind)
        yield _components(rows, test_rows) if subject == "pca" else (rows, test_rows)


def _one(pooled: Pooled, kind: PoolingKind) -> NDArray[np.float32]:
    if kind == "mean_max":
        return np.concatenate([pooled.mean_NF, pooled.max_NF], axis=1)
    return pooled.max_NF if kind == "max" else pooled.mean_NF


def _encoded(encoder: Encoder, side: PooledSplit, device: torch.device) -> NDArray[np.float32]:
    """[N, F] Code of each clip's mean raw token."""
    rows_ND = torch.from_numpy(side.pooled["raw"].mean_NF)
    with torch.no_grad():
        parts = [encoder.encode(part.to(device)).cpu() for part in rows_ND.split(_ROWS)]
    codes_NF: NDArray[np.float32] = torch.cat(parts).numpy()
    return codes_NF


def _components(
    rows_ND: NDArray[np.float32], test_ND: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All principal components that the fit rows have, min(D, N - 1) of them at most."""
    pca = PCA(svd_solver="full").fit(rows_ND.astype(np.float64))
    # Directions without variance would be rounding, scaled up to variance 1.
    varies_R = pca.singular_values_ > pca.singular_values_[0] * 1e-6
    rows_NR, test_NR = (pca.transform(part.astype(np.float64))[:, varies_R] for part in (rows_ND, test_ND))
    return rows_NR.astype(np.float32), test_NR.astype(np.float32)
