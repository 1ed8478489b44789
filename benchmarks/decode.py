"""Decoders side by side on the same files in one run: which one `decode.backend: auto` should be.

    python benchmarks/decode.py [FOLDER] > benchmarks/results/decode.txt

CPU time of one process per clip, demux pass included where the decoder uses it, best of three in turn. CPU and not
wall time, because an extraction keeps every core busy with decode processes and decord runs a thread of its own. Clips
are rendered; video files in FOLDER are measured beside them.
"""

from __future__ import annotations

import gc
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from barcode import ClipSpec, make_clip  # type: ignore[import-not-found]
from tubelet_pipeline.clips.root import VIDEO_SUFFIXES
from tubelet_pipeline.decode import decord_backend, policy, pyav_backend
from tubelet_pipeline.decode.child import FrameMemory
from tubelet_pipeline.decode.probe import probe
from tubelet_pipeline.decode.pyav_backend import Choose
from tubelet_pipeline.frames import dense_frames, uniform_frames

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
    "720p 120f gop 48": ClipSpec(".mp4", frames=120, width=1280, height=720, gop=48, options=FAST),
}
CHOICES: dict[str, Choose] = {
    "uniform 16": lambda n: uniform_frames(n, frames=16, clips=1, view=0),
    "dense 16x4": lambda n: dense_frames(n, frames=16, stride=4, clips=1, view=0),
}


def cpu_ms(decode: Callable[[], object]) -> float:
    """CPU milliseconds of one call, other threads of this process included."""
    begin = time.process_time()
    decode()
    gc.collect()
    return (time.process_time() - begin) * 1000


def measure(path: str, choose: Choose, allocate: pyav_backend.Allocate) -> tuple[float, float, float | None]:
    """CPU milliseconds of sequential PyAV, of `auto`, and of decord (None: not exact on this file)."""

    def sequential() -> None:
        picture = pyav_backend._Picture(choose(probe(path).frames), allocate)
        pyav_backend._by_counting(path, 0, picture)

    def auto() -> None:
        policy.decode(path, "auto", choose, allocate, lambda _: None)

    def decord() -> None:
        decord_backend.decode(path, probe(path), choose, allocate)

    contenders = [sequential, auto, decord] if probe(path).hazard is None else [sequential, auto]
    rounds = [[cpu_ms(contender) for contender in contenders] for _ in range(REPEATS)]
    best = [min(times) for times in zip(*rounds, strict=True)]
    return best[0], best[1], best[2] if len(best) > 2 else None


def main() -> None:
    """Print one line per file and sampling."""
    print(f"{pyav_backend.DECODER}; {decord_backend.DECODER}; Python {platform.python_version()}; CPU ms per clip")
    print(f"{'file':<34}{'sampling':<12}{'PyAV seq':>9}{'auto':>9}{'decord':>9}{'auto/seq':>10}{'auto/decord':>13}")
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        files = {
            name: make_clip(Path(folder) / f"{i}{spec.suffix}", spec) for i, (name, spec) in enumerate(RENDERED.items())
        }
        if len(sys.argv) > 1:
            found = sorted(Path(sys.argv[1]).iterdir())
            files |= {f"{path.name}": path for path in found if path.suffix in VIDEO_SUFFIXES}
        with tempfile.TemporaryFile() as frames:
            memory = FrameMemory(frames.fileno(), 1 << 30)
            for name, path in files.items():
                for sampling, choose in CHOICES.items():
                    sequential, auto, decord = measure(str(path), choose, memory.allocate)
                    theirs = f"{decord:>9.1f}" if decord is not None else f"{'inexact':>9}"
                    ratio = f"{auto / decord:>13.2f}" if decord is not None else f"{'-':>13}"
                    print(
                        f"{name[:33]:<34}{sampling:<12}{sequential:>9.1f}{auto:>9.1f}{theirs}"
                        f"{auto / sequential:>10.2f}{ratio}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
