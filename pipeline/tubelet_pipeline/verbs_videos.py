"""`tubelet videos OUT`: render and encode the demo data set."""

from __future__ import annotations

import time

from tubelet.cli.main import Verb
from tubelet_pipeline.synthetic.config import VideosConfig


def _run(config: VideosConfig) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tubelet_pipeline.synthetic.render_dataset import dataset_bytes, make_dataset

    console = Console(stderr=True)
    begin_s = time.monotonic()
    rendered = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("rendering videos", total=config.videos)

        def on_video(is_new: bool) -> None:
            nonlocal rendered
            rendered += is_new
            progress.advance(bar)

        entries = make_dataset(config, on_video)
    splits = {split: sum(e.split == split for e in entries) for split in ("train", "validation", "test")}
    print(
        f"{config.out}: {len(entries)} videos ({', '.join(f'{n} {split}' for split, n in splits.items() if n)}), "
        f"{len({e.template for e in entries})} classes, {dataset_bytes(config.out) / 1e6:.1f} MB; "
        f"{rendered} rendered in {time.monotonic() - begin_s:.1f} s, {len(entries) - rendered} were there"
    )
    return 0


VIDEOS = Verb(
    name="videos",
    summary="Render a labeled demo data set of moving shapes as real video files.",
    config=lambda: VideosConfig,
    run=_run,
    positionals=("out",),
)
