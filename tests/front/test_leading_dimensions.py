"""SAEs take tokens with any leading dimensions, of torch or numpy, in the dtypes of stores."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from tubelet.errors import TubeletError
from tubelet_trainer.sae.config import BatchTopKConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

D, F = 8, 16
KINDS = [TopKConfig(k=3, latents=F), BatchTopKConfig(k=3, latents=F), ReLUConfig(latents=F), JumpReLUConfig(latents=F)]


def _sae(config) -> SAE:
    return SAE(config, Normalization.identity(D, False)).eval().requires_grad_(False)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4), (0, 3), (2, 0, 4)])
def test_leading_dimensions_are_kept_and_each_token_is_coded_alone(config, leading) -> None:
    sae, x = _sae(config), torch.randn(*leading, D, generator=torch.Generator().manual_seed(0))
    codes = sae.encode(x)
    assert codes.shape == (*leading, F)
    assert sae.decode(codes).shape == x.shape
    assert sae(x).shape == x.shape
    for place in np.ndindex(*leading):
        alone = sae.encode_sparse(x[place][None]).dense(F)[0]
        torch.testing.assert_close(codes[place], alone)
        torch.testing.assert_close(sae(x)[place], sae.decode(alone))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numpy_arrays_in_a_stores_dtypes_are_taken_as_they_are(dtype) -> None:
    sae = _sae(TopKConfig(k=3, latents=F))
    stored = (
        np.random.default_rng(0).normal(size=(2, 3, D)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    )
    stored.setflags(write=False)
    exact = torch.from_numpy(stored.astype(np.float32))
    torch.testing.assert_close(sae.encode(stored), sae.encode(exact), rtol=0, atol=0)
    torch.testing.assert_close(sae.encode(exact.to(getattr(torch, dtype))), sae.encode(exact), rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(sae.encode(stored).numpy()), sae(exact))


def test_other_channels_are_refused_in_one_line() -> None:
    sae = _sae(TopKConfig(k=3, latents=F))
    with pytest.raises(TubeletError, match=r"\[2, 3, 7\].*\[\.\.\., 8\]"):
        sae.encode(torch.zeros(2, 3, 7))
    with pytest.raises(TubeletError, match=r"\[2, 3\].*16 latents"):
        sae.decode(torch.zeros(2, 3))
