"""The trainer's verbs: `tubelet train`, `tubelet export`, `tubelet import`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_trainer.config import TrainConfig
    from tubelet_trainer.sae.interop.exchange import ExportConfig, ImportConfig


def _config() -> type[TrainConfig]:
    from tubelet_trainer.config import TrainConfig

    return TrainConfig


def _run(config: TrainConfig) -> int:
    from tubelet_trainer.run.loop import train

    result = train(config)
    if len(result):
        print(result)
    return 0


def _export_config() -> type[ExportConfig]:
    from tubelet_trainer.sae.interop.exchange import ExportConfig

    return ExportConfig


def _export(config: ExportConfig) -> int:
    from tubelet_trainer.sae.interop.exchange import export_sae

    print(export_sae(config))
    return 0


def _import_config() -> type[ImportConfig]:
    from tubelet_trainer.sae.interop.exchange import ImportConfig

    return ImportConfig


def _import(config: ImportConfig) -> int:
    from tubelet_trainer.sae.interop.exchange import import_sae

    print(import_sae(config))
    return 0


TRAIN = Verb("train", "Train a sparse autoencoder on an activation store.", _config, _run, positionals=("store",))

EXPORT = Verb("export", "Write a trained SAE for other libraries.", _export_config, _export, positionals=("run",))

IMPORT = Verb("import", "Read an SAE of another library.", _import_config, _import, positionals=("path",))
