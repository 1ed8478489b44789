"""The trainer's verb: `tubelet train`."""

from __future__ import annotations

from tubelet_store.cli import Verb
from tubelet_trainer.config import TrainConfig


def _run(config: TrainConfig) -> int:
    from tubelet_trainer.train import train

    print(train(config))
    return 0


TRAIN = Verb("train", "Train a sparse autoencoder on an activation store.", TrainConfig, _run, positionals=("store",))
