"""Backbones that come with the package, so that the demo needs no network; each folder has a model card.

`backbone.id` takes their names on every machine; the store records name and digest of the weights.

They were trained by the scripts in `benchmarks/pretrain/` on videos of the demo's generator, with another seed, and
are of no use on real videos.
"""

from __future__ import annotations

from pathlib import Path

from tubelet.errors import TubeletError, nearest

NAMES = ("videomae-tiny", "dinov2-tiny")


def demo_backbone(name: str) -> Path:
    """Folder of the checkpoint `name`.

    Raises:
        TubeletError: there is no such demo backbone.
    """
    if name not in NAMES:
        raise TubeletError(f"There is no demo backbone '{name}'", nearest(name, NAMES))
    return Path(__file__).parent / name
