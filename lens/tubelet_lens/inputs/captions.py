"""Captions as vectors, by a frozen text model, a bag of words or a file.

captions, each once ─▶ words (tf-idf) | a transformers text model | a file ─▶ unit vectors [captions, E]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tubelet.errors import TubeletError
from tubelet_lens.config import AnyText, PrecomputedText, TransformersText, Words

_WORD = re.compile(r"\w+")


def embed(captions: Sequence[str], known: Sequence[str], config: AnyText, device: torch.device) -> NDArray[np.float64]:
    """Unit vectors float64 [captions, E]; a caption without an embedding is the zero vector.

    Args:
        captions: Distinct texts.
        known: Those of them on the fit side: words are weighed by these alone.
        config: The text model.
        device: Where a model computes.

    Raises:
        TubeletError: the model or file cannot be had, or the file lacks a caption.
    """
    if isinstance(config, Words):
        values = _words(captions, known)
    elif isinstance(config, TransformersText):
        values = _model(captions, config, device)
    else:
        values = _file(captions, config)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)


def described(config: AnyText) -> str:
    """Words for a definition: what embeds the captions."""
    if isinstance(config, Words):
        return "a bag of words (tf-idf over the captions fitted on; no language model: synonyms are unrelated)"
    if isinstance(config, TransformersText):
        return f"the frozen text model {Path(config.id).name if Path(config.id).is_dir() else config.id}"
    return f"precomputed vectors ({config.path.name})"


def _words(captions: Sequence[str], known: Sequence[str]) -> NDArray[np.float64]:
    counts = [Counter(_WORD.findall(caption.lower())) for caption in captions]
    wanted = set(known)
    documents = Counter(
        word for caption, words in zip(captions, counts, strict=True) if caption in wanted for word in words
    )
    column = {word: place for place, word in enumerate(sorted(documents))}
    values = np.zeros((len(captions), len(column)))
    for row, words in enumerate(counts):
        for word, times in words.items():
            if word in column:
                values[row, column[word]] = times * (1 + np.log((1 + len(wanted)) / (1 + documents[word])))
    return values


def _file(captions: Sequence[str], config: PrecomputedText) -> NDArray[np.float64]:
    names, values = _read(config.path)
    if values.ndim != 2 or len(names) != len(values) or not np.isfinite(values).all():
        raise TubeletError(
            f"{config.path} holds {list(values.shape)} numbers for {len(names)} captions",
            "Give one finite vector of the same width for each caption",
        )
    place = {name: row for row, name in enumerate(names)}
    missing = [caption for caption in captions if caption not in place]
    if missing:
        raise TubeletError(
            f"{config.path} has no vector for {len(missing)} of {len(captions)} captions, such as '{missing[0]}'",
            "Embed these captions too, exactly as the store spells them",
        )
    return values[[place[caption] for caption in captions]].astype(np.float64)


def _read(path: Path) -> tuple[list[str], NDArray[Any]]:
    try:
        if path.suffix == ".npy":
            # Never unpickled: a file may come from anywhere.
            values = np.load(path, allow_pickle=False)
            return path.with_suffix(".txt").read_text().splitlines(), values
        table = pq.read_table(path, columns=["caption", "embedding"])
        return table["caption"].to_pylist(), np.asarray(table["embedding"].to_pylist(), dtype=np.float64)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise TubeletError(
            f"{path} cannot be read as text embeddings: {str(error).splitlines()[0]}",
            "Give a Parquet file with columns caption and embedding, or NAME.npy with NAME.txt",
        ) from error


def _model(captions: Sequence[str], config: TransformersText, device: torch.device) -> NDArray[np.float64]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise TubeletError(
            "A text model needs transformers, not installed here", "pip install 'tubelet[pipeline]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.id, revision=config.revision)
        model = AutoModel.from_pretrained(config.id, revision=config.revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TubeletError(
            f"No text model at '{config.id}': {str(error).splitlines()[0]}", "Give a hub id or a folder of such a model"
        ) from error
    model = model.eval().to(device)
    parts = []
    for start in range(0, len(captions), config.batch):
        batch = tokenizer(
            list(captions[start : start + config.batch]), padding=True, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            parts.append(_embedded(model, dict(batch.to(device)), config.pooling).double().cpu())
    return torch.cat(parts).numpy()


def _embedded(model: nn.Module, batch: dict[str, Tensor], pooling: str) -> Tensor:
    """[N, E]. Models with a vision half give their text embedding by `get_text_features`."""
    features = getattr(model, "get_text_features", None)
    if pooling == "auto" and features is not None:
        output = features(**batch)
        return output if isinstance(output, Tensor) else output.pooler_output
    tower: nn.Module = getattr(model, "text_model", model)
    states_NLE = tower(**batch).last_hidden_state
    if pooling == "cls":
        return states_NLE[:, 0]
    mask_NL1 = batch["attention_mask"][:, :, None].to(states_NLE)
    return (states_NLE * mask_NL1).sum(1) / mask_NL1.sum(1)
