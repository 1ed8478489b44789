"""Decoders side by side on the same files in one run: which one `decode.backend: auto` should be.

    python benchmarks/decode.py [FOLDER] > benchmarks/results/decode.txt

CPU time of one process per clip, demux pass included, best of three in turn. CPU and not wall time, because an
extraction keeps every core busy with decode processes and decord runs a thread of its own. Every decoder is held to the
index of the demux pass, as in an extraction; `inexact`: it is not trusted with a file. Clips are rendered;
video files in FOLDER are measured too.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from barcode import ClipSpec, make_clip
from tubelet_pipeline.datasets.dataset_root import VIDEO_SUFFIXES
from tubelet_pipeline.decode import decoders, pyav_backend
from tubelet_pipeline.decode.process_main import FrameMemory
from tubelet_pipeline.decode.pyav_backend import Choose
from tubelet_pipeline.decode.video_index import probe
from tubelet_pipeline.frame_indices import dense_frames, uniform_frames

REPEATS = 3
FAST = {"preset": "veryfast"}
RENDERED = {
    "k400 340x256 300f gop 250": ClipSpec(".mp4", frames=300, width=340, height=256, gop=250, options=FAST),
    "k400 340x256 300f gop 12": ClipSpec(".mp4", frames=300, width=340, height=256, gop=12, options=FAST),
    "k400 rotated": ClipSpec(".mp4", frames=300, width=340, height=256, gop=250, options=FAST, rotation=90),
    "ssv2 vp9 428x240 48f": ClipSpec(
        ".webm", "libvpx-vp9", 48, 12, 428, 240, 48, options={"deadline": "realtime", "cpu-used": "6"}
    ),
    "mpeg4 340x256 300f gop 12": ClipSpec(".mp4", "mpeg4", frames=300, width=340, height=256),
    "128x96 40f gop 12": ClipSpec(".mp4", options=FAST),
    "720p 120f gop 48": ClipSpec(".mp4", frames=120, width=1280, height=720, gop=48, options=FAST),
    "1080p 120f gop 48": ClipSpec(".mp4", frames=120, width=1920, height=1080, gop=48, options=FAST),
    "340x256 300f bf 3 open-gop=1": ClipSpec(
        ".mp4",
        frames=300,
        width=340,
        height=256,
        gop=48,
        options={**FAST, "bf": "3", "x264-params": "open-gop=1:b-adapt=0"},
    ),
    "hevc 340x256 120f gop 48": ClipSpec(
        ".mp4",
        "libx265",
        frames=120,
        width=340,
        height=256,
        gop=48,
        options={"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    ),
    "av1 340x256 120f gop 48": ClipSpec(
        ".mp4",
        "libsvtav1",
        frames=120,
        width=340,
        height=256,
        gop=48,
        options={"preset": "12", "svtav1-params": "lp=1"},
    ),
    "vp8 428x240 48f": ClipSpec(
        ".webm", "libvpx", 48, 12, 428, 240, 48, options={"deadline": "realtime", "cpu-used": "6"}
    ),
}
CHOICES: dict[str, Choose] = {
    "uniform 16": lambda n: uniform_frames(n, frames=16, clips=1, view=0, first=0, more=0),
    "dense 16x4": lambda n: dense_frames(n, frames=16, stride=4, clips=1, view=0, first=0, more=0),
}


def cpu_ms(decode: Callable[[], object]) -> float:
    """CPU milliseconds of one call, other threads of this process included."""
    begin = time.process_time()
    decode()
    gc.collect()
    return (time.process_time() - begin) * 1000


def measure(path: str, choose: Choose, allocate: pyav_backend.Allocate) -> dict[str, float]:
    """CPU milliseconds of sequential PyAV, of `auto`, and of the other decoders where they are exact."""

    def sequential() -> None:
        buffer = pyav_backend._FrameBuffer(choose(probe(path).frames), allocate)
        pyav_backend._by_counting(path, 0, buffer)

    def auto() -> None:
        decoders.decode(path, "auto", choose, allocate, lambda _: None)

    def decord() -> None:
        decoders.decode_with_decord(path, probe(path), choose, allocate)

    def torchcodec() -> None:
        decoders.decode_with_torchcodec(path, probe(path), choose, allocate)

    index = probe(path)
    contenders: dict[str, Callable[[], None]] = {"PyAV seq": sequential, "auto": auto}
    if index.hazard is None:
        contenders["decord"] = decord
    if index.torchcodec_hazard is None:
        contenders["torchcodec"] = torchcodec
    rounds = [{name: cpu_ms(contender) for name, contender in contenders.items()} for _ in range(REPEATS)]
    return {name: min(times[name] for times in rounds) for name in contenders}


def main() -> None:
    """Print one line per file and sampling, then the ratios in sum."""
    torch.set_num_threads(1)
    versions = (pyav_backend.DECODER, decoders.decord_version(), decoders.torchcodec_version())
    print(f"{'; '.join(versions)}; Python {platform.python_version()}; CPU ms per clip")
    others = ("decord", "torchcodec")
    print(
        f"{'file':<34}{'sampling':<12}{'PyAV seq':>9}{'auto':>9}"
        + "".join(f"{o:>12}" for o in others)
        + "".join(f"{'auto/' + o:>17}" for o in others)
    )
    ratios: dict[str, list[float]] = {other: [] for other in others}
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: make_clip(Path(folder) / f"{i}{spec.suffix}", spec) for i, (name, spec) in enumerate(RENDERED.items())
        }
        if len(sys.argv) > 1:
            paths = sorted(Path(sys.argv[1]).iterdir())
            files |= {f"{path.name}": path for path in paths if path.suffix in VIDEO_SUFFIXES}
        with tempfile.TemporaryFile() as frames:
            memory = FrameMemory(frames.fileno(), 1 << 30)
            for name, path in files.items():
                for sampling, choose in CHOICES.items():
                    best = measure(str(path), choose, memory.allocate)
                    line = f"{name[:33]:<34}{sampling:<12}{best['PyAV seq']:>9.1f}{best['auto']:>9.1f}"
                    line += "".join(f"{best[o]:>12.1f}" if o in best else f"{'inexact':>12}" for o in others)
                    for other in others:
                        if other in best:
                            ratios[other].append(best["auto"] / best[other])
                        line += f"{ratios[other][-1]:>17.2f}" if other in best else f"{'-':>17}"
                    print(line, flush=True)
    for other, all_ratios in ratios.items():
        print(
            f"auto/{other}: median {statistics.median(all_ratios):.2f}, from {min(all_ratios):.2f} to "
            f"{max(all_ratios):.2f}, below 1 (auto is faster) in {sum(r < 1 for r in all_ratios)} of {len(all_ratios)}"
        )


if __name__ == "__main__":
    main()
