"""Backbones that come with the package, so that the demo needs no network: each folder has its model card.

`backbone.id` takes their names, whatever the machine; the store records name and digest of the weights.

They were trained on videos of the demo's own generator (of another seed) by `pretrain`, and know
nothing of the world.
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
