"""What a gallery costs: seconds per 1,000 latents, KiB per page, KiB per clip; and why clips are sheets of WebP.

    tubelet demo --out DIR          (videos, stores; made if they are not there)
    python benchmarks/gallery.py --work DIR --out benchmarks/results/gallery.txt

A wider SAE (more than 1,000 latents that fire) is trained on the demo's store, briefly: what its latents mean does
not matter here. Then the gallery of its validation store is made twice: once drawing the pictures, once keeping them.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from goals import Goal, goal_lines
from tubelet_lens.demo.demo import DemoConfig
from tubelet_lens.gallery.config import GalleryConfig
from tubelet_lens.gallery.make_gallery import make_gallery
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.run.loop import train

_HOOK = "blocks.2"
_EXPANSION = 16


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the demo")
    parser.add_argument("--out", type=Path, help="file for the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    work: Path = arguments.work
    if not (work / "validation.zarr").is_dir():
        from tubelet_lens.demo.demo import demo

        demo(DemoConfig(out=work))
    run = work / f"wide-{_EXPANSION}"
    train(
        TrainConfig.model_validate(
            {
                "store": str(work / "train.zarr"),
                "out": run,
                "hook": _HOOK,
                "steps": 300,
                "batch_tokens": 1024,
                "device": "cpu",
                "sae": {"kind": "topk", "expansion": _EXPANSION, "k": 16},
            }
        )
    )
    goals: list[Goal] = []
    parts = [_gallery(run, work / "validation.zarr", goals), _formats(work)]
    text = "\n\n".join(parts) + "\n" + "\n".join(goal_lines(goals)) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


def _gallery(run: Path, store: Path, goals: list[Goal]) -> str:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        config = GalleryConfig(run=run, store=str(store), other_store=True, out=str(site), device="cpu")
        for name in ("with pictures", "pictures kept"):
            began, busy = time.perf_counter(), time.process_time()
            made = make_gallery(config)
            wall, cpu = time.perf_counter() - began, time.process_time() - busy
            rows.append((name, made.pages, wall, 1000 * wall / made.pages, 1000 * cpu / made.pages))
        goals.append(Goal("gallery/s-per-1000-latents", rows[0][3], at_most=600))
        pages = [path.stat().st_size for path in (site / "latents").iterdir()]
        sheets = [path.stat().st_size for path in (site / "clips").iterdir()]
        whole = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
        overview = sum((site / name).stat().st_size for name in ("index.html", "overview-data.js"))
    lines = [
        f"Gallery of the demo's validation store, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        f"{'':<16}{'latents':>9}{'seconds':>9}{'s / 1,000':>11}{'CPU s / 1,000 (this process)':>30}",
        *(f"{n:<16}{count:>9,}{wall:>9.1f}{each:>11.1f}{cpu:>30.1f}" for n, count, wall, each, cpu in rows),
        "",
        f"page of a latent   {np.mean(pages) / 1024:7.1f} KiB mean, {max(pages) / 1024:.1f} KiB largest",
        f"sheet of a clip    {np.mean(sheets) / 1024:7.1f} KiB mean, {len(sheets)} clips, shared by all pages",
        f"overview           {overview / 1024:7.1f} KiB",
        f"whole site         {whole / 2**20:7.1f} MiB",
    ]
    return "\n".join(lines)


def _formats(work: Path) -> str:
    clips = [_frames(path) for path in sorted((work / "ssv2").glob("20bn*/*.webm"))[:24]]
    makers: dict[str, Callable[[list[Image.Image]], int]] = {
        "sheet, WebP 60": lambda frames: _picture(_sheet(frames), "WEBP", quality=60, method=4),
        "sheet, JPEG 70": lambda frames: _picture(_sheet(frames), "JPEG", quality=70, optimize=True),
        "animated WebP 60": lambda frames: _picture(
            frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=100, quality=60, method=4
        ),
        "MP4, H.264 crf 28": _video,
    }
    lines = [f"16 frames of 64 pixels, mean of {len(clips)} clips", f"{'':<20}{'KiB':>7}{'CPU ms':>9}{'size':>7}"]
    first = None
    for name, make in makers.items():
        busy = time.process_time()
        size = float(np.mean([make(frames) for frames in clips])) / 1024
        cpu = 1000 * (time.process_time() - busy) / len(clips)
        first = first or size
        lines.append(f"{name:<20}{size:>7.1f}{cpu:>9.1f}{size / first:>7.2f}")
    return "\n".join(lines)


def _frames(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)][::3][:16]
    return [picture.resize((64, 64), Image.Resampling.BICUBIC) for picture in every]


def _sheet(frames: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (4 * 64, 4 * 64))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (place % 4 * 64, place // 4 * 64))
    return sheet


def _picture(picture: Image.Image, kind: str, **options: object) -> int:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.tell()


def _video(frames: list[Image.Image]) -> int:
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "28", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return data.tell()


if __name__ == "__main__":
    main()
