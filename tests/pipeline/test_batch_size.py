"""The automatic batch size: the largest power of two that fits, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tubelet_pipeline import worker_state
from tubelet_pipeline.backbones import BackboneConfig, load_backbone
from tubelet_pipeline.worker_state import find_batch_size, largest_power


@given(room=st.integers(0, 5000), most=st.integers(1, 3000))
def test_the_largest_power_of_two_that_fits(room, most):
    tried = []
    largest = largest_power(lambda clips: tried.append(clips) or clips <= room, most)
    allowed = [2**k for k in range(13) if 2**k <= min(room, most)]
    assert largest == max(allowed, default=0)
    assert len(tried) <= len(allowed) + 1


def test_on_a_cpu_it_is_bounded_by_memory_and_by_use(backbone: Path, monkeypatch):
    model = load_backbone(BackboneConfig(id=str(backbone), device="cpu"), frames=8)
    assert find_batch_size(model, ["blocks.0"], most=1000) == 16
    assert find_batch_size(model, ["blocks.0"], most=5) == 4
    clip_bytes = 4 * (8 * 3 * 32 * 32 + 2 * 4 * 16 * 32)
    monkeypatch.setattr(worker_state, "_CPU_BYTES", 3 * clip_bytes)
    assert find_batch_size(model, ["blocks.0", "blocks.1"], most=1000) == 2
    monkeypatch.setattr(worker_state, "_CPU_BYTES", 1)
    assert find_batch_size(model, ["blocks.0"], most=1000) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_tried_and_leaves_a_margin(backbone: Path):
    model = load_backbone(BackboneConfig(id=str(backbone), device="cuda"), frames=8)
    clips_that_fit = find_batch_size(model, ["blocks.0"], most=1 << 30)
    assert clips_that_fit == find_batch_size(model, ["blocks.0"], most=1 << 30)
    assert clips_that_fit > 16
    assert find_batch_size(model, ["blocks.0"], most=100) == 64
