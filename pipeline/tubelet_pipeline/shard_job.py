"""What every shard task of an extraction is told."""

from __future__ import annotations

from typing import Literal

from tubelet.config import Config
from tubelet_pipeline.backbones import BackboneConfig
from tubelet_pipeline.decode.config import DecodeConfig
from tubelet_pipeline.sampling import Sampling
from tubelet_pipeline.token_selection import AllTokens, Tokens
from tubelet_pipeline.views import CenterView, Views
from tubelet_store.spool import UploadConfig


class ShardJob(Config):
    """Travels through Dask as JSON, without secrets."""

    store: str
    plan_digest: str
    dataset_root: str
    sampling: Sampling
    views: Views = CenterView()
    tokens: Tokens = AllTokens()
    backbone: BackboneConfig
    hooks: tuple[str, ...]
    decode: DecodeConfig
    batch_size: int | Literal["auto"]
    threads: int
    upload: UploadConfig
