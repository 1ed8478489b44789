"""Laws of caption embeddings: words, a text model from disk, files that are never unpickled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tubelet.errors import TubeletError
from tubelet_lens.config import PrecomputedText, TransformersText, Words
from tubelet_lens.inputs.captions import embed

CPU = torch.device("cpu")
CAPTIONS = ["Moving a red ball up", "Moving a red ball down", "Turning a cube"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with random weights and a tokenizer of the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for caption in CAPTIONS for word in caption.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("text-model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


def test_every_embedding_is_a_unit_vector(text_model: Path) -> None:
    for config in (Words(), TransformersText(id=str(text_model))):
        values = embed(CAPTIONS, CAPTIONS, config, CPU)
        assert np.linalg.norm(values, axis=1) == pytest.approx(1)


def test_words_are_weighed_by_the_fit_side_alone() -> None:
    values = embed([*CAPTIONS, "zebra"], CAPTIONS, Words(), CPU)
    assert values[:3] == pytest.approx(embed(CAPTIONS, CAPTIONS, Words(), CPU))
    assert (values[3] == 0).all()
    likeness = values @ values.T
    assert likeness[0, 1] > likeness[0, 2] > 0


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls"])
def test_a_captions_embedding_does_not_depend_on_its_batch(text_model: Path, pooling: str) -> None:
    config = TransformersText(id=str(text_model), pooling=pooling)
    together = embed(CAPTIONS, CAPTIONS, config, CPU)
    alone = np.concatenate([embed([caption], CAPTIONS, config, CPU) for caption in CAPTIONS])
    assert together == pytest.approx(alone, abs=1e-5)
    assert not np.allclose(together[0], together[2])


def test_an_image_text_model_gives_its_own_text_embedding(text_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, **small}
    vision = {"image_size": 8, "patch_size": 4, **small}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(tmp_path)
    values = embed(CAPTIONS[:1], CAPTIONS, TransformersText(id=str(tmp_path)), CPU)
    with torch.no_grad():
        batch = tokenizer(CAPTIONS[0], return_tensors="pt")
        states = model.text_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        wanted = model.text_projection(states.pooler_output)[0].double().numpy()
    assert values[0] == pytest.approx(wanted / np.linalg.norm(wanted), abs=1e-5)


def test_precomputed_vectors_are_found_by_caption_in_both_forms(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.save(tmp_path / "e.npy", vectors)
    (tmp_path / "e.txt").write_text("\n".join(CAPTIONS))
    pq.write_table(pa.table({"caption": CAPTIONS, "embedding": vectors.tolist()}), tmp_path / "e.parquet")
    wanted = vectors[[2, 0]] / np.linalg.norm(vectors[[2, 0]], axis=1, keepdims=True)
    for name in ("e.npy", "e.parquet"):
        config = PrecomputedText(path=tmp_path / name)
        assert embed([CAPTIONS[2], CAPTIONS[0]], CAPTIONS, config, CPU) == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(TubeletError, match="no vector for 1 of 1 captions, such as 'zebra'"):
        embed(["zebra"], CAPTIONS, PrecomputedText(path=tmp_path / "e.npy"), CPU)


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "e.txt").write_text("a")
    with pytest.raises(TubeletError, match="cannot be read as text embeddings"):
        embed(["a"], ["a"], PrecomputedText(path=tmp_path / "e.npy"), CPU)


def test_a_text_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TubeletError, match="No text model at"):
        embed(["a"], ["a"], TransformersText(id=str(tmp_path / "none")), CPU)
