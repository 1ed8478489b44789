"""Laws of monosemanticity: the closed form is the pairwise sum, chance is the mean cosine, references are matched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet_lens.codes.sparse_codes import SparseCodes
from tubelet_lens.config import ArrayReference, StoreReference
from tubelet_lens.inputs.clip_stream import Window, windows
from tubelet_lens.inputs.pooled_clips import PooledSplit, Pooling, pooled_split
from tubelet_lens.inputs.references import own_reference, read_reference
from tubelet_lens.metrics.monosemanticity import _activations, _Units, mean_cosine, monosemanticity
from tubelet_store.reader import Store

HOOK = "blocks.1"


def pairwise(a_NF: np.ndarray, e_NE: np.ndarray) -> np.ndarray:
    """The definition: sums over the pairs n < m."""
    scores = np.full(a_NF.shape[1], np.nan)
    n, m = np.triu_indices(len(a_NF), 1)
    likeness = (e_NE[n] * e_NE[m]).sum(1)
    for j, a in enumerate(a_NF.T.astype(float)):
        if a.max() == a.min():
            continue
        a = (a - a.min()) / (a.max() - a.min())
        weight = a[n] * a[m]
        if weight.sum():
            scores[j] = weight @ likeness / weight.sum()
    return scores


def unit(rng: np.random.Generator, clips: int, width: int) -> np.ndarray:
    e = rng.standard_normal((clips, width)) + 0.5
    return e / np.linalg.norm(e, axis=1, keepdims=True)


@given(clips=st.integers(2, 12), seed=st.integers(0, 10**6), sparse=st.booleans(), signed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_closed_form_is_the_pairwise_sum(clips: int, seed: int, sparse: bool, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((clips, 300)).astype(np.float32)
    if not signed:
        a = np.maximum(a - (1.0 if sparse else 0.0), 0)
    e = unit(rng, clips, 5)
    # The closed form subtracts sums: where nearly all weight lies on one clip, a few digits cancel.
    np.testing.assert_allclose(monosemanticity(a, e), pairwise(a, e), rtol=0, atol=1e-9)


def test_dead_constant_and_single_clip_latents_have_no_score() -> None:
    e = unit(np.random.default_rng(0), 4, 3)
    a = np.array([[0, 2, 0, 1], [0, 2, 0, 1], [0, 2, 3, 0], [0, 2, 0, 0]], dtype=np.float32)
    scores = monosemanticity(a, e)
    assert np.isnan(scores[:3]).all()
    assert scores[3] == pytest.approx(e[0] @ e[1])


def test_permuting_clips_gives_the_mean_cosine_in_expectation() -> None:
    rng = np.random.default_rng(1)
    e, a = unit(rng, 12, 4), np.maximum(rng.standard_normal((12, 6)), 0)
    draws = np.array([monosemanticity(a, e[rng.permutation(12)]) for _ in range(4000)])
    np.testing.assert_allclose(draws.mean(0), mean_cosine(e), atol=5 * draws.std(0).max() / np.sqrt(len(draws)))
    cosines = (e @ e.T)[np.triu_indices(12, 1)]
    assert mean_cosine(e) == pytest.approx(cosines.mean(), abs=1e-14)


def test_a_latent_of_one_class_scores_one_and_a_latent_of_all_the_floor() -> None:
    labels = np.arange(40) % 4
    e = np.eye(4)[labels]
    a = np.stack([(labels == 2) * 3.0, np.random.default_rng(2).random(40) + 1], axis=1)
    a[:, 1] = np.where(np.arange(40) < 20, 1.0, 0.0)  # half of the clips, every class alike
    scores = monosemanticity(a, e)
    assert scores[0] == pytest.approx(1)
    assert scores[1] == pytest.approx(4 / 19)  # of 19 others in the half 4 are of one's class


class Mirror:
    """Codes of both signs: the activations themselves."""

    latents = 6

    def encode(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def decode(self, codes_NF: Tensor) -> Tensor:
        return codes_NF


def small_store(path: Path, seed: int = 0, channels: int = 6, **fields: object) -> Store:
    plan = make_plan(clips=9, hooks={HOOK: channels}, dtype="float32", grid=(2, 2, 2))
    return make_store(path, plan.model_copy(update=fields), seed=seed, failed=(3,), clips_per_video=2)


def side_of(store: Store) -> tuple[PooledSplit, list[Window]]:
    pooling, clips = Pooling({}), np.flatnonzero(store.ok())
    valid = np.ones((store.plan.clips, store.plan.grid.time), dtype=bool)
    seen = list(windows(store, HOOK, Mirror(), clips, valid, clips_per_window=3, device=torch.device("cpu")))
    for window in seen:
        pooling.add(window)
    return pooled_split(store, pooling), seen


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_signed_codes_are_split_into_two_halves(tmp_path: Path, kind: str) -> None:
    there, seen = side_of(small_store(tmp_path / "s.zarr"))
    z_NTF = torch.cat([window.codes_CTSF.flatten(1, 2) for window in seen]).numpy()
    halves = np.concatenate([np.maximum(z_NTF, 0), np.maximum(-z_NTF, 0)], axis=2)
    expected = halves.max(1) if kind == "max" else halves.mean(1)
    found = _activations(there.pooled["sae"], kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    scores = np.arange(12.0)
    larger = expected[:, :6].sum(0) >= expected[:, 6:].sum(0)
    np.testing.assert_array_equal(
        _Units(found, signed=True).by_latent(scores), np.where(larger, scores[:6], scores[6:])
    )


def test_pooled_codes_are_the_mean_and_the_largest_over_the_valid_tokens() -> None:
    """What is kept as a list of the latents that fire is what the dense codes pool to, of both signs."""
    codes = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    codes[codes.abs() < 0.8] = 0
    codes[1, ..., 0] = -1.0  # never silent: its largest value is below 0
    codes[..., 4] = 0
    valid = torch.tensor([[True, False, True], [True, True, True]])
    pooling = Pooling({})
    active = tuple(SparseCodes.of(codes_TSF) for codes_TSF in codes)
    pooling.add(Window(np.arange(2), codes, active, codes, valid))
    (pooled,) = pooling.draws()["sae"]
    seen = [codes[place][valid[place]].flatten(0, 1) for place in range(2)]
    np.testing.assert_allclose(pooled.mean_NF, torch.stack([z.mean(0) for z in seen]), atol=1e-6)
    np.testing.assert_array_equal(pooled.max_NF, torch.stack([z.amax(0) for z in seen]))
    assert pooled.negative is not None
    below = [z.clamp(max=0).neg() for z in seen]
    np.testing.assert_allclose(pooled.negative.mean_NF, torch.stack([z.mean(0) for z in below]), atol=1e-6)
    np.testing.assert_array_equal(pooled.negative.max_NF, torch.stack([z.amax(0) for z in below]))
    (raw,) = pooling.draws()["raw"]
    np.testing.assert_allclose(raw.mean_NF, pooled.mean_NF, atol=1e-6)


def test_the_backbones_own_embedding_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    there, seen = side_of(small_store(tmp_path / "s.zarr"))
    e = torch.cat([window.x_CTSD.flatten(1, 2).mean(1) for window in seen]).double().numpy()
    own = own_reference(there)
    np.testing.assert_allclose(own.e_ME, e / np.linalg.norm(e, axis=1, keepdims=True), atol=1e-6)
    assert len(own.places) == 8


def test_another_store_is_matched_by_video_and_view(tmp_path: Path) -> None:
    there, _ = side_of(small_store(tmp_path / "s.zarr"))
    other = small_store(tmp_path / "o.zarr", seed=5, channels=4, backbone={"family": "other", "id": "x"})
    found = read_reference(StoreReference(name="other", store=other.url, neutral=True), there)
    e = np.array([np.asarray(other[HOOK][int(clip)], dtype=float).mean((0, 1)) for clip in there.clips])
    np.testing.assert_allclose(found.e_ME, e / np.linalg.norm(e, axis=1, keepdims=True), atol=1e-12)
    assert found.neutral


def test_the_evaluated_backbone_cannot_be_called_neutral(tmp_path: Path) -> None:
    store = small_store(tmp_path / "s.zarr")
    with pytest.raises(TubeletError, match="called neutral"):
        read_reference(StoreReference(name="self", store=store.url, neutral=True), side_of(store)[0])


def test_arrays_come_in_clip_order_or_by_video(tmp_path: Path) -> None:
    there, _ = side_of(small_store(tmp_path / "s.zarr"))
    rows = np.random.default_rng(3).standard_normal((9, 3))
    rows[4] = np.nan
    np.save(tmp_path / "e.npy", rows)
    found = read_reference(ArrayReference(name="e", path=tmp_path / "e.npy"), there)
    kept = [clip for clip in there.clips if clip != 4]
    np.testing.assert_array_equal(there.clips[found.places], kept)
    np.testing.assert_allclose(found.e_ME, rows[kept] / np.linalg.norm(rows[kept], axis=1, keepdims=True))

    views = there.store.clips().select(["video_id", "view"])
    shuffled = np.random.default_rng(4).permutation(9)
    table = views.append_column("embedding", pa.array(rows.tolist())).take(shuffled)
    pq.write_table(table, tmp_path / "e.parquet")
    by_view = read_reference(ArrayReference(name="e", path=tmp_path / "e.parquet"), there)
    np.testing.assert_array_equal(by_view.e_ME, found.e_ME)

    by_video = {f"video-{v:04d}": rows[v] for v in range(3)}  # videos 3 and 4 are unknown to it
    pq.write_table(pa.table({"video_id": list(by_video), "embedding": [r.tolist() for r in by_video.values()]}),
                   tmp_path / "v.parquet")  # fmt: skip
    by_video_id = read_reference(ArrayReference(name="e", path=tmp_path / "v.parquet"), there)
    assert set(there.videos[by_video_id.places]) == set(by_video)


def test_a_pickled_array_is_refused_and_so_are_arrays_of_other_clips(tmp_path: Path) -> None:
    there, _ = side_of(small_store(tmp_path / "s.zarr"))
    np.save(tmp_path / "p.npy", np.array([{"a": 1}] * 9, dtype=object), allow_pickle=True)
    with pytest.raises(TubeletError, match="cannot be read as a NumPy array"):
        read_reference(ArrayReference(name="e", path=tmp_path / "p.npy"), there)
    np.save(tmp_path / "short.npy", np.zeros((8, 3)))
    with pytest.raises(TubeletError, match=r"not floats \[9, E\]"):
        read_reference(ArrayReference(name="e", path=tmp_path / "short.npy"), there)
    pq.write_table(pa.table({"video_id": ["x", "y"], "embedding": [[1.0], [2.0]]}), tmp_path / "x.parquet")
    with pytest.raises(TubeletError, match="0 of 8 evaluated clips"):
        read_reference(ArrayReference(name="e", path=tmp_path / "x.parquet"), there)
