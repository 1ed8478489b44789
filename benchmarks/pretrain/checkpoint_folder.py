"""What a pre-training leaves behind: encoder, processor file and a report of how it went."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.corpus import SIDE
from tubelet_pipeline.backbones import BackboneConfig, load_backbone
from tubelet_pipeline.backbones.checkpoint import quiet_transformers
from tubelet_pipeline.backbones.tiny import write_processor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REPORT_FILE = "training.json"


@dataclass
class Clock:
    """Wall-clock and CPU minutes since it was made."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def minutes(self) -> dict[str, float]:
        """What has passed."""
        wall_s, cpu_s = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"minutes": round(wall_s / 60, 1), "cpu_minutes": round(cpu_s / 60, 1)}


def write_checkpoint(
    folder: Path, encoder: Any, processor: str, recipe: DataclassInstance, clock: Clock, curve: list[dict[str, float]]
) -> None:
    """Write `encoder` in half precision in transformers' layout, its processor file, and `REPORT_FILE`."""
    with quiet_transformers():
        encoder.half().save_pretrained(folder)
    write_processor(folder, processor, shortest_edge=SIDE, crop=SIDE, resample=2)
    backbone = load_backbone(BackboneConfig(id=str(folder), device="cpu"))
    report = {
        "recipe": asdict(recipe),
        "threads": 1,
        **clock.minutes(),
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numpy")},
        "weights_digest": backbone.weights_digest,
        "curve": curve,
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
