"""Laws of the evaluation on held-out tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stores import make_plan, make_store
from tubelet_store.moments import Moments
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.source import Source
from tubelet_trainer.run.heldout import evaluate
from tubelet_trainer.sae.config import NormalizationConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

D, F = 12, 48


@pytest.fixture(scope="module")
def activations():
    """Tokens whose directions differ a hundredfold in variance, far from the origin."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((D, D)))[0]
    x = rng.standard_normal((10, 4, 6, D)) * np.geomspace(0.1, 10, D) @ turn
    return (x + 50 * rng.standard_normal(D)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory, activations):
    plan = make_plan(clips=10, clips_per_shard=4, grid=(4, 2, 3), hooks={"h": D}, dtype="float32")
    return make_store(tmp_path_factory.mktemp("evaluation") / "s.zarr", plan, {"h": activations})


@pytest.mark.parametrize(
    "normalization",
    [{}, {"scale": False}, {"center": False}, {"whitening": "zca"}, {"whitening": "pca", "center": False}],
    ids=str,
)
def test_the_fvu_is_that_of_raw_tokens(store, activations, normalization):
    config = TopKConfig(latents=F, k=4, normalization=NormalizationConfig(**normalization))
    x = activations.reshape(-1, D)
    sae = SAE(config, Normalization.from_moments(Moments.of(x), config.normalization))
    found = evaluate(sae, ActivationLoader(Source(store, "h", 6), np.arange(10), batch_tokens=32, window_tokens=100))
    raw = torch.from_numpy(x)
    with torch.no_grad():
        error = (raw.double() - sae.eval()(raw).double()).square().sum()
    spread = (raw.double() - raw.double().mean(dim=0)).square().sum()
    assert found["fvu"] == pytest.approx(float(error / spread), rel=1e-4)
    assert found["tokens"] == len(x)
    if "whitening" in normalization:
        inner = sae.normalization(raw).double()
        with torch.no_grad():
            error = (inner - sae.reconstruct(sae.encode_sparse(raw)).double()).square().sum()
        assert abs(float(error / (inner - inner.mean(dim=0)).square().sum()) - found["fvu"]) > 0.01
