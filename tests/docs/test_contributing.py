"""The examples of CONTRIBUTING.md work as they stand there."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pages
import pytest
import torch


@pytest.fixture(scope="module")
def example() -> Any:
    """Everything that the page's Python defines."""
    scope: dict[str, Any] = {"__name__": "contributing"}
    for snippet in pages.snippets("python", pages.ROOT / "CONTRIBUTING.md"):
        exec(compile(snippet.text, snippet.where, "exec"), scope)
    return types.SimpleNamespace(**scope)


def test_the_backbone_gives_each_token_its_patch(example, tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTModel

    from tubelet_pipeline.backbones import registry
    from tubelet_pipeline.backbones.pretrained import BackboneConfig
    from tubelet_pipeline.backbones.tiny import save_random, write_processor

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    save_random(ViTModel, ViTConfig(image_size=32, patch_size=8, **settings), tmp_path, seed=0)
    write_processor(tmp_path, "ViTImageProcessor", shortest_edge=32, crop=32, resample=2)
    monkeypatch.setitem(registry.FAMILIES, "vit", example.ViT)
    backbone = registry.load_backbone(BackboneConfig(id=str(tmp_path), device="cpu"), frames=3)
    assert (backbone.grid.time, backbone.grid.height, backbone.grid.width) == (3, 4, 4)
    pixels = torch.zeros(1, 3, 3, 32, 32)
    before = backbone.activations(pixels, ["blocks.0", "final_norm"])
    pixels[:, 1] += torch.randn(3, 32, 32)
    after = backbone.activations(pixels, ["blocks.0", "final_norm"])
    changed = (before["blocks.0"].tokens != after["blocks.0"].tokens).any(-1)
    assert changed[0].any(-1).tolist() == [False, True, False]


def test_the_loss_term_has_the_gradient_of_its_formula(example):
    from tubelet_trainer.losses.objective import Forward
    from tubelet_trainer.sae.config import TopKConfig
    from tubelet_trainer.sae.model import SAE
    from tubelet_trainer.sae.normalization import Normalization

    torch.manual_seed(0)
    sae = SAE(TopKConfig(k=3, latents=12), Normalization.identity(6)).double()
    x_BD = torch.randn(5, 6, dtype=torch.float64)
    term = example.MeanActivation(0.1)(Forward.of(sae, x_BD, torch.zeros(12, dtype=torch.bool)))
    (gradient,) = torch.autograd.grad(term.loss, sae.W_enc)
    pre_BF = x_BD @ sae.W_enc.T
    kept = torch.zeros_like(pre_BF).scatter(1, pre_BF.topk(3, dim=1).indices, 1.0)
    dense = 0.1 * (torch.relu(pre_BF) * kept).square().sum() / 5
    torch.testing.assert_close(term.loss, dense)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, sae.W_enc)[0])


def test_the_metric_counts_tokens_that_are_worse_than_the_mean(example):
    store = types.SimpleNamespace(moments=lambda _: types.SimpleNamespace(mean=np.zeros(2)))
    metric = example.WorseThanMean(types.SimpleNamespace(store=store, hook="blocks.0", device=torch.device("cpu")))
    x = torch.ones(1, 1, 4, 2)
    for factor in (1.0, 0.5, 2.5):
        metric.add(types.SimpleNamespace(x_CTSD=x, xhat_CTSD=factor * x))
    (figure,) = metric.section().figures
    assert (figure.value, figure.n) == (1 / 3, 12)
