"""`tubelet gallery`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_lens.gallery.config import GalleryConfig


def _config() -> type[GalleryConfig]:
    from tubelet_lens.gallery.config import GalleryConfig

    return GalleryConfig


def _run(config: GalleryConfig) -> int:
    from tubelet_lens.gallery.make_gallery import make_gallery

    made = make_gallery(config)
    print(f"{made.pages:,} latents, {made.clips:,} clips, {made.size_bytes / 2**20:.1f} MiB written")
    if made.no_evaluation:
        print(
            f"No evaluation in {config.run / 'evaluation'}: its figures of each latent are missing. Run `tubelet "
            f"evaluate {config.run} STORE` first, or give the evaluation's folder as --evaluation.",
            file=sys.stderr,
        )
    if made.silent:
        print(f"{made.silent:,} latents do not fire on any of these clips and have no page")
    if made.no_picture:
        print(f"{made.no_picture:,} clips are shown as heat-maps only, without pictures: {made.reason}")
    print(made.address)
    return 0


GALLERY = Verb(
    "gallery",
    "Show what every latent fires on: a static site, to be opened from a folder or object storage.",
    _config,
    _run,
    positionals=("run", "store"),
)
