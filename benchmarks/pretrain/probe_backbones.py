"""Linear probes of the demo's actions on encoded videos, with the backbone and with the same net untrained.

    .webm ──decode, preprocess──▶ backbone ──pool──▶ ridge regression, train split ──▶ accuracy, validation split

Two poolings per block: `mean` over all tokens (so motion must be in the tokens), `time` over space alone (so a probe
may compare time steps). Two accuracies: `class` among all 16, `twins` among the two opposed actions, which consist of
the same frames (shaking and holding still left out, for their frames differ): one half
without motion information.

    PYTHONPATH=benchmarks python -m pretrain.probe_backbones [--videos 640] [--data DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_pipeline.backbones import Backbone, BackboneConfig, load_backbone
from tubelet_pipeline.backbones.pretrained import quiet_transformers
from tubelet_pipeline.datasets import Ssv2, resolve_uri
from tubelet_pipeline.datasets.ssv2 import list_videos
from tubelet_pipeline.decode.decoded_clip import DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.demo_backbones import NAMES, demo_backbone
from tubelet_pipeline.sampling import DenseSampling
from tubelet_pipeline.synthetic.actions import OPPOSITES, TEMPLATES
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset

SAMPLING = DenseSampling(frames=16, stride=3)
"""The demo's: the whole of a video."""

PENALTIES = tuple(10.0**exponent for exponent in range(-1, 6))
"""Ridge penalties tried, for standardized features."""

POOLINGS = ("mean", "time")
BATCH = 8


@dataclass(frozen=True)
class Clips:
    """Decoded videos with the probe's inputs; row = video."""

    frames: NDArray[np.uint8]
    """[N, 16, H, W, 3]."""
    labels: NDArray[np.int64]
    twins: NDArray[np.int64]
    """Number of the pair of twins a video belongs to; a pair is never torn between two parts of the data."""
    held_out: NDArray[np.bool_]


@dataclass(frozen=True)
class Accuracy:
    """Of one probe, on the videos held out."""

    of_classes: float
    of_twins: float


def read_clips(root: Path) -> Clips:
    """Decode the demo data set at `root`, as an extraction would."""
    parts = {split: list_videos(Ssv2(root=str(root), split=split))[0] for split in ("train", "validation")}
    videos = [video for part in parts.values() for video in part]
    requests = [DecodeRequest(resolve_uri(str(root), video.uri), SAMPLING) for video in videos]
    frames = []
    with DecodePool(DecodeConfig(processes=1)) as pool:
        for video, clip in zip(videos, pool.map_ordered(requests, prefetch=4), strict=True):
            if isinstance(clip, DecodeFailure):
                raise TubeletError(f"{video.uri} does not decode: {clip}", "Delete it and run `tubelet videos` again")
            frames.append(clip.frames)
    return Clips(
        frames=np.stack(frames),
        labels=np.array([video.label for video in videos], np.int64),
        twins=np.array([(int(video.video_id) - 1) // 2 for video in videos], np.int64),
        held_out=np.array([video.split == "validation" for video in videos]),
    )


def pooled_activations(
    backbone: Backbone, frames: Iterable[NDArray[np.uint8]]
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Features by (block, pooling), [N, D] for `mean` and [N, T' * D] for `time`."""
    hooks = [name for name in backbone.hook_names if name.removeprefix("blocks.").isdigit()]
    parts: dict[tuple[str, str], list[torch.Tensor]] = {(hook, pooling): [] for hook in hooks for pooling in POOLINGS}
    with torch.inference_mode():
        for batch in _batches(frames):
            pixels = torch.stack([backbone.preprocess(clip)[0] for clip in batch])
            for hook, captured in backbone.activations(pixels, hooks).items():
                by_time = captured.tokens.mean(2)
                parts[hook, "mean"].append(by_time.mean(1))
                parts[hook, "time"].append(by_time.flatten(1))
    return {key: torch.cat(values).double().numpy() for key, values in parts.items()}


def probe(features: NDArray[np.float64], clips: Clips) -> Accuracy:
    """Ridge regression on the classes' indicators; the penalty is chosen on a quarter of the training twins."""
    training = ~clips.held_out
    inner = training & (clips.twins // len(OPPOSITES) % 4 == 0)
    right = {
        penalty: (
            _scores(features, clips.labels, training & ~inner, inner, penalty).argmax(1) == clips.labels[inner]
        ).mean()
        for penalty in PENALTIES
    }
    penalty = max(right, key=lambda p: (right[p], p))
    scores = _scores(features, clips.labels, training, clips.held_out, penalty)
    labels = clips.labels[clips.held_out]
    reversed_ = labels < 2 * sum(not pair.twin_is_frozen for pair in OPPOSITES)
    rows = np.arange(len(labels))
    wins = scores[rows, labels] > scores[rows, labels ^ 1]
    return Accuracy(float((scores.argmax(1) == labels).mean()), float(wins[reversed_].mean()))


def _scores(
    features: NDArray[np.float64],
    labels: NDArray[np.int64],
    fit: NDArray[np.bool_],
    ask: NDArray[np.bool_],
    penalty: float,
) -> NDArray[np.float64]:
    center, spread = features[fit].mean(0), features[fit].std(0) + 1e-6
    x_ND, asked_MD = (features[fit] - center) / spread, (features[ask] - center) / spread
    wanted_NC = np.eye(len(TEMPLATES))[labels[fit]] - 1 / len(TEMPLATES)
    # The dual form: there are fewer videos than features.
    weights_NC = np.linalg.solve(x_ND @ x_ND.T + penalty * np.eye(len(x_ND)), wanted_NC)
    scores: NDArray[np.float64] = asked_MD @ (x_ND.T @ weights_NC)
    return scores


def untrained(folder: Path, seed: int) -> Backbone:
    """The architecture of the checkpoint in `folder` with the random weights that transformers begins training from."""
    import transformers

    trained = load_backbone(BackboneConfig(id=str(folder), device="cpu"))
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as copy, quiet_transformers():
        torch.manual_seed(seed)
        getattr(transformers, trained.architecture)(trained.model_config).save_pretrained(copy)
        (Path(copy) / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
        return load_backbone(BackboneConfig(id=copy, device="cpu"))


def _batches(frames: Iterable[NDArray[np.uint8]]) -> Iterator[list[NDArray[np.uint8]]]:
    source = iter(frames)
    while batch := list(islice(source, BATCH)):
        yield batch


def table(name: str, folder: Path, clips: Clips) -> str:
    """Accuracies at every block of the backbone in `folder` and of its untrained double, as text."""
    trained = load_backbone(BackboneConfig(id=str(folder), device="cpu"))
    results = [
        {key: probe(values, clips) for key, values in pooled_activations(backbone, clips.frames).items()}
        for backbone in (trained, untrained(folder, seed=0))
    ]
    lines = [
        f"{name}, weights {trained.weights_digest[:19]}",
        f"{'':<20}{'trained':>18}{'untrained':>20}",
        f"{'block':<12}{'pooling':<8}" + f"{'class':>9}{'twins':>9}" * 2,
    ]
    for (hook, pooling), accuracy in results[0].items():
        line = f"{hook:<12}{pooling:<8}"
        for result in results:
            accuracy = result[hook, pooling]
            line += f"{accuracy.of_classes:>9.1%}{accuracy.of_twins:>9.1%}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make or reuse the videos, probe every demo backbone, print and write to `--out` if given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=640, help="videos of seed 0, the demo's own first")
    parser.add_argument("--data", type=Path, help="folder of the videos, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tubelet-probe-") as temporary:
        data = arguments.data or Path(temporary) / "videos"
        make_dataset(VideosConfig(out=data, videos=arguments.videos, workers=1))
        clips = read_clips(data)
        held_out = int(clips.held_out.sum())
        text = (
            f"Linear probes on {len(clips.labels) - held_out} training and {held_out} held-out videos of seed 0 (VP9, "
            f"16 frames, stride 3). Chance: class {1 / len(TEMPLATES):.1%}, twins 50%.\n\n"
        )
        text += "\n".join(table(name, demo_backbone(name), clips) for name in NAMES)
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
