"""The trainer's verb: `tubelet train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet_store.cli import Verb

if TYPE_CHECKING:
    from tubelet_trainer.config import TrainConfig


def _config() -> type[TrainConfig]:
    from tubelet_trainer.config import TrainConfig

    return TrainConfig


def _run(config: TrainConfig) -> int:
    from tubelet_trainer.train import train

    print(train(config))
    return 0


TRAIN = Verb("train", "Train a sparse autoencoder on an activation store.", _config, _run, positionals=("store",))
