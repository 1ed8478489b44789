"""The recorded codes, SAE and labels give the recorded figures by their definitions (see `audit/README.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tubelet import load_sae

AUDIT = Path(__file__).parent / "audit"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(AUDIT / "codes.npz", allow_pickle=False) as found:
        return dict(found)


@pytest.fixture(scope="module")
def code_FCST(arrays) -> np.ndarray:
    shape = tuple(arrays["shape"])
    fired = np.unpackbits(arrays["fired"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    codes = np.zeros(shape, np.float32)
    codes[fired] = arrays["values"]
    return codes


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    sections = json.loads((AUDIT / "evaluation.json").read_text())["sections"]
    return {figure["name"]: figure["value"] for section in sections for figure in section["figures"]}


@pytest.fixture(scope="module")
def latents() -> dict[str, np.ndarray]:
    table = pq.read_table(AUDIT / "latents.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.array([clip["label"] for clip in json.loads((AUDIT / "clips.json").read_text())])


def test_fraction_of_variance_unexplained(arrays, figures):
    tokens = int(np.prod(arrays["shape"][2:])) * len(arrays["squared_norm"])
    spread = arrays["squared_norm"].sum() - np.square(arrays["sum"].sum(axis=0, dtype=np.float64)).sum() / tokens
    assert arrays["squared_error"].sum() / spread == pytest.approx(figures["reconstruction.fvu"], rel=1e-6)


def test_sparsity(code_FCST, figures, latents):
    fired_FN = (code_FCST != 0).reshape(len(code_FCST), -1)
    density_F = fired_FN.mean(axis=1)
    assert fired_FN.sum(axis=0).mean() == pytest.approx(figures["sparsity.l0"])
    assert (density_F == 0).mean() == pytest.approx(figures["sparsity.dead_fraction"])
    assert (density_F > 0.5).sum() == figures["sparsity.always_on"]
    assert np.median(density_F[density_F > 0]) == pytest.approx(figures["sparsity.median_density"])
    np.testing.assert_allclose(density_F, latents["frequency"], rtol=1e-9)
    np.testing.assert_allclose(code_FCST.max(axis=(1, 2, 3)), latents["max_activation"], rtol=0.01)
    alive_F = density_F > 0
    mean_F = code_FCST.sum(axis=(1, 2, 3), dtype=np.float64)[alive_F] / fired_FN.sum(axis=1)[alive_F]
    np.testing.assert_allclose(mean_F, latents["mean_activation"][alive_F], rtol=0.01)


def test_temporal_coherence(code_FCST, figures, latents):
    """Pearson correlation of each latent now and one step later, over clips and patches; its mean over latents."""
    now_FN, later_FN = (part.reshape(len(part), -1).astype(float) for part in (code_FCST[..., :-1], code_FCST[..., 1:]))
    now_FN, later_FN = (part - part.mean(axis=1, keepdims=True) for part in (now_FN, later_FN))
    scale_F = np.sqrt(np.square(now_FN).sum(axis=1) * np.square(later_FN).sum(axis=1))
    defined_F = scale_F > 0
    rho_F = (now_FN * later_FN).sum(axis=1)[defined_F] / scale_F[defined_F]
    assert np.isfinite(latents["coherence"]).sum() == defined_F.sum()
    np.testing.assert_allclose(rho_F, latents["coherence"][defined_F], atol=2e-3)
    assert rho_F.mean() == pytest.approx(figures["coherence.lag1.sae"], abs=1e-4)


def test_purity_of_the_strongest_clips(code_FCST, labels, latents):
    """Largest share of one class among the 16 clips on which a latent is strongest, where it fires on as many."""
    strongest_FC = code_FCST.max(axis=(2, 3))
    top_FK = np.argsort(-strongest_FC, axis=1, kind="stable")[:, :16]
    counts_FL = np.stack([(labels[top_FK] == label).sum(axis=1) for label in np.unique(labels)], axis=1)
    purity_F, recorded_F = counts_FL.max(axis=1) / 16, latents["purity_16"]
    known_F = np.isfinite(recorded_F)
    assert known_F.sum() > 100
    # Rounded codes may tie at the sixteenth place.
    assert (np.abs(purity_F - recorded_F)[known_F] < 1e-9).mean() > 0.9


def test_the_sae_gives_these_codes(arrays, code_FCST):
    sae = load_sae(AUDIT)
    x_TSD = torch.from_numpy(arrays["x"].astype(np.float32))
    found_NF = sae.encode(x_TSD.flatten(0, 1)).numpy()
    recorded_NF = code_FCST[:, 0, :, : len(x_TSD)].transpose(2, 1, 0).reshape(found_NF.shape)
    # Another machine's rounding may choose another sixteenth latent.
    agree_NF = (found_NF != 0) == (recorded_NF != 0)
    assert agree_NF.all(axis=1).mean() > 0.98
    np.testing.assert_allclose(found_NF[agree_NF], recorded_NF[agree_NF], rtol=0.01)
