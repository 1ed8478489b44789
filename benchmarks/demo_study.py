"""The small study of the documentation: two tiny backbones, six kinds of SAE, three seeds, every question of the lens.

    python benchmarks/demo_study.py --work DIR [--out docs/science/demo-study] [--videos 240] [--epochs 8] [--workers 2]

Renders the demo's videos, extracts them with the tiny VideoMAE and the tiny frame-wise DINOv2 that ship with the
package (training, validation, and validation again with shifted views), writes `study.yaml` and runs `tubelet study` on
it. What the documentation shows is copied to `--out`. A second run with the same `--work` skips what is done.

The neutral embedding that judges monosemanticity is that of the videos' captions (words, no model): neither backbone
made it, and both are judged by the same.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tubelet.cli import main as cli
from tubelet_store.reader import open_store

HOOK = "blocks.2"
# Every second of a video's 48 frames: a window of 16, and one that begins a tubelet later, both fit.
SAMPLING = {"kind": "dense", "frames": 16, "stride": 2}
BACKBONES = {"videomae": "VideoMAE (tiny)", "dinov2": "DINOv2 (tiny, frame by frame)"}
STORES: dict[str, dict[str, Any]] = {
    "train": {"split": "train"},
    "test": {"split": "validation"},
    "shifted": {"split": "validation", "views": {"kind": "shifted", "patches": 1, "tubelets": 1}},
}


def make_stores(work: Path, videos: int) -> None:
    """Render the videos and extract every store of every backbone."""
    verb("videos", str(work / "ssv2"), "--videos", str(videos))
    for backbone in BACKBONES:
        for name, store in STORES.items():
            settings = {
                "dataset": {"kind": "ssv2", "root": str(work / "ssv2"), "split": store["split"]},
                "sampling": SAMPLING,
                "views": store.get("views", {"kind": "center"}),
                "backbone": {"id": f"{backbone}-tiny"},
                "hooks": [HOOK],
                "store": str(work / f"{backbone}-{name}.zarr"),
            }
            verb("extract", settings_file(work / f"{backbone}-{name}.yaml", settings))


def embed_captions(work: Path) -> None:
    """Write `captions.parquet`: for each validation video, which words its caption holds, as a unit vector."""
    table = open_store(str(work / "videomae-test.zarr")).clips()
    words = [set(caption.lower().split()) for caption in table["caption"].to_pylist()]
    vocabulary = sorted(set().union(*words))
    vectors_NW = np.array([[float(word in caption_words) for word in vocabulary] for caption_words in words])
    vectors_NW /= np.linalg.norm(vectors_NW, axis=1, keepdims=True)
    captions = pa.table({"video_id": table["video_id"], "embedding": list(vectors_NW)})
    pq.write_table(captions, work / "captions.parquet")


def study_settings(work: Path, workers: int, epochs: int) -> dict[str, Any]:
    """The study, as its YAML file has it."""
    topk = {"kind": "topk", "k": 16, "expansion": 8}
    contrast = {"codes": "pre", "lambda_s": 0.03}
    nested = {"kind": "groups"}
    return {
        "out": str(work / "study"),
        "sources": {
            backbone: {
                "backbone": title,
                "dataset": "rendered shapes",
                "train": str(work / f"{backbone}-train.zarr"),
                "test": str(work / f"{backbone}-test.zarr"),
                "hook": HOOK,
                "evaluate": {
                    "scope": {"store": str(work / f"{backbone}-shifted.zarr")},
                    "monosemanticity": {
                        "references": [
                            {
                                "kind": "array",
                                "name": "captions",
                                "path": str(work / "captions.parquet"),
                                "neutral": True,
                            },
                            *(
                                {"kind": "store", "name": name, "store": str(work / f"{name}-test.zarr"), "hook": HOOK}
                                for name in BACKBONES
                            ),
                        ]
                    },
                },
            }
            for backbone, title in BACKBONES.items()
        },
        "variants": {
            "topk": {"settings": {"sae": topk}},
            "batchtopk": {"settings": {"sae": {**topk, "kind": "batchtopk"}}},
            "matryoshka": {"settings": {"sae": {**topk, "nesting": nested}}},
            "spatio-temporal": {
                "settings": {"sae": topk, "objective": contrast},
                "weights": {"objective.lambda_t": [0.03, 0.1]},
            },
            "matryoshka-st": {
                "settings": {"sae": {**topk, "nesting": nested}, "objective": {**contrast, "lambda_t": 0.03}}
            },
        },
        "seeds": [0, 1, 2],
        "train": {"epochs": epochs, "batch_tokens": 1024, "optimizer": {"lr": 1e-3}, "pairs": {"anchors": 256}},
        "evaluate": {"null_draws": 2, "control_draws": 1, "action": {"bootstrap": 500, "poolings": ["mean"]}},
        "cluster": {"workers": workers, "threads": 1},
    }


def settings_file(path: Path, settings: dict[str, Any]) -> str:
    """Write `settings` as YAML; the path."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def verb(*arguments: str) -> None:
    """Run one verb; stop the script where it fails."""
    print(f"$ tubelet {' '.join(arguments)}", flush=True)
    if status := cli.run(list(arguments)):
        raise SystemExit(f"`tubelet {' '.join(arguments)}` ended with status {status}")


def main() -> None:
    """Make the stores, run the study, copy what the documentation shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--videos", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    make_stores(options.work, options.videos)
    embed_captions(options.work)
    settings = study_settings(options.work, options.workers, options.epochs)
    verb("study", settings_file(options.work / "study.yaml", settings))
    if options.out is not None:
        study = options.work / "study"
        for folder in ("tables", "plots"):
            shutil.copytree(study / folder, options.out / folder, dirs_exist_ok=True)
        shutil.copy(study / "study.md", options.out / "tables.md")


if __name__ == "__main__":
    main()
