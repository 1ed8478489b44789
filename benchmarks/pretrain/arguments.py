"""The command line of a training, and the corpus it names."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.corpus import open_corpus


@dataclass(frozen=True)
class Arguments:
    """What a training is told."""

    out: Path
    """Folder of the checkpoint."""
    corpus: Path | None
    """File in which the rendered videos are kept between runs."""

    def open_corpus(self, videos: int) -> NDArray[np.uint8]:
        """Frames of the videos, as `corpus.open_corpus` gives them."""
        return open_corpus(videos, self.corpus)


def parse_arguments(description: str | None) -> Arguments:
    """The command line's, for a training on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--corpus", type=Path, help="file (.npy) in which the rendered videos are kept between runs")
    found = parser.parse_args()
    torch.set_num_threads(1)
    return Arguments(found.out, found.corpus)
