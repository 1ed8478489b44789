"""Laws of the metrics: what each must say of data whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stores import make_plan, make_store, planned_table
from tubelet.errors import TubeletError
from tubelet_lens.codes.series import FeatureProducts, Series, pairs_at_lags, patch_products, shuffled_steps
from tubelet_lens.codes.sparse_codes import SparseCodes
from tubelet_lens.evaluate import METRICS
from tubelet_lens.inputs.clip_stream import windows
from tubelet_lens.inputs.latent_time import LatentTime, latent_time
from tubelet_lens.metrics.metric import Setting
from tubelet_lens.results.section import Curve, Figure, Section
from tubelet_lens.stats.step_pairs import PooledAutocorrelation, StepCosine, SupportOverlap, WithinAutocorrelation
from tubelet_store.clip_table import ClipOutcome
from tubelet_store.reader import Store, open_store
from tubelet_store.store_writer import StoreWriter

HOOK = "blocks.1"
CPU = torch.device("cpu")


class Identity:
    """The SAE that changes nothing: D latents, one per channel."""

    def __init__(self, channels: int) -> None:
        self.latents = channels

    def encode(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def decode(self, codes_NF: Tensor) -> Tensor:
        return codes_NF


class MeanPredictor(Identity):
    """Always answers `mean`."""

    def __init__(self, mean_D: Tensor) -> None:
        super().__init__(len(mean_D))
        self.mean_D = mean_D

    def decode(self, codes_NF: Tensor) -> Tensor:
        return self.mean_D.expand_as(codes_NF)


class Rectified(Identity):
    """ReLU codes: sparse in no fixed number, and latents 0 and 1 are dead."""

    def encode(self, x_ND: Tensor) -> Tensor:
        codes = x_ND.relu()
        codes[:, :2] = 0
        return codes


def signal_store(path: Path, x_CTSD: np.ndarray, failed: tuple[int, ...] = (), dtype: str = "float32") -> Store:
    clips, steps, space, channels = x_CTSD.shape
    plan = make_plan(clips=clips, clips_per_shard=7, grid=(steps, 1, space), hooks={HOOK: channels}, dtype=dtype)
    return make_store(path, plan, {HOOK: x_CTSD.astype(np.float32)}, failed=failed)


def setting_of(store: Store, latents: int, clips: np.ndarray | None = None, **fields: int) -> Setting:
    chosen = np.flatnonzero(store.ok()) if clips is None else clips
    options = {"lags": 3, "null_draws": 3, "seed": 0} | fields
    time = latent_time(store, chosen)
    return Setting(store=store, hook=HOOK, clips=chosen, latents=latents, time=time, device=CPU, **options)


def measure(setting: Setting, sae: Identity, *, clips_per_window: int) -> list[Section]:
    metrics = [make(setting) for make in METRICS.values()]
    for window in windows(
        setting.store,
        HOOK,
        sae,
        setting.clips,
        setting.time.valid_CT,
        clips_per_window=clips_per_window,
        device=CPU,
    ):
        for metric in metrics:
            metric.add(window)
    return [metric.section() for metric in metrics]


def figures_of(setting: Setting, sae: Identity, window: int = 4) -> dict[str, Figure]:
    sections = measure(setting, sae, clips_per_window=window)
    return {figure.name: figure for section in sections for figure in section.figures}


def pooled(x_CTSF: np.ndarray, valid_CT: np.ndarray | None = None, lags: int = 1) -> PooledAutocorrelation:
    x, steps = torch.from_numpy(x_CTSF), x_CTSF.shape[1]
    valid = torch.ones(len(x), steps, dtype=torch.bool) if valid_CT is None else torch.from_numpy(valid_CT)
    statistic = PooledAutocorrelation(x.shape[3], lags, CPU)
    for x_TSF, valid_T in zip(x, valid, strict=True):
        statistic.add(FeatureProducts.of(x_TSF), valid_T, pairs_at_lags(valid_T, torch.arange(steps), lags))
    return statistic


# --- temporal coherence -----------------------------------------------------------------------------------------------


def test_white_noise_has_no_pooled_autocorrelation() -> None:
    x = np.random.default_rng(0).standard_normal((60, 8, 16, 5))
    statistic = pooled(x, lags=2)
    for lag in (1, 2):
        pairs = statistic.value(lag).pairs
        assert pairs == 60 * 16 * (8 - lag)
        assert np.abs(statistic.per_feature(lag).numpy()).max() < 4 / np.sqrt(pairs)


def test_within_series_of_white_noise_shows_its_bias() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 8, 16, 2)))
    within = WithinAutocorrelation()
    for x_TSF in x:
        within.add(x_TSF.flatten(1), torch.ones(8, dtype=torch.bool))
    assert within.mean == pytest.approx(-1 / 8, abs=0.01)


def test_clip_constant_signal_with_noise_has_the_correlation_of_theory() -> None:
    rng = np.random.default_rng(1)
    signal = rng.standard_normal((800, 1, 6, 4))
    x = signal + 0.3 * rng.standard_normal((800, 8, 6, 4))
    assert pooled(x).value(1).mean == pytest.approx(1 / 1.09, abs=0.005)  # 0.917


def test_pooled_autocorrelation_is_pearson_over_all_pairs() -> None:
    rng = np.random.default_rng(2)
    x = np.maximum(rng.standard_normal((9, 5, 4, 3)) - 0.8, 0)  # mostly zero, as codes are
    statistic = pooled(x, lags=2)
    for lag in (1, 2):
        now, later = x[:, :-lag].reshape(-1, 3), x[:, lag:].reshape(-1, 3)
        expected = [np.corrcoef(now[:, f], later[:, f])[0, 1] for f in range(3)]
        np.testing.assert_allclose(statistic.per_feature(lag).numpy(), expected, rtol=1e-12)


def test_shuffled_time_leaves_the_between_clip_part(tmp_path: Path) -> None:
    """z = u + w with u constant in a clip and w an AR(1): left is (var u + var w * mean of phi^|s-t|) / var z."""
    rng = np.random.default_rng(3)
    clips, steps, phi = 500, 6, 0.9
    w = np.empty((clips, steps, 8, 3))
    w[:, 0] = rng.standard_normal((clips, 8, 3))
    for t in range(1, steps):
        w[:, t] = phi * w[:, t - 1] + np.sqrt(1 - phi**2) * rng.standard_normal((clips, 8, 3))
    x = 0.7 * rng.standard_normal((clips, 1, 8, 3)) + w
    store = signal_store(tmp_path / "s.zarr", x)
    figures = figures_of(setting_of(store, 3), Identity(3), window=100)
    far = np.abs(np.subtract.outer(np.arange(steps), np.arange(steps)))
    left = (0.49 + (phi**far)[far > 0].mean()) / 1.49
    assert figures["coherence.lag1.raw"].value == pytest.approx((0.49 + phi) / 1.49, abs=0.01)
    assert figures["coherence.lag1.raw_shuffled"].value == pytest.approx(left, abs=0.01)
    shuffled, cosine = (figures[f"coherence.cosine.{subject}"].value for subject in ("raw_shuffled", "raw"))
    assert shuffled is not None
    assert cosine is not None
    assert shuffled < cosine - 0.05
    # The identity SAE is exactly as coherent as what it encodes, under the null too.
    assert figures["coherence.lag1.sae"].value == pytest.approx(figures["coherence.lag1.raw"].value, abs=1e-9)
    assert figures["coherence.lag1.sae_shuffled"].value == pytest.approx(
        figures["coherence.lag1.raw_shuffled"].value, abs=1e-9
    )
    assert figures["coherence.drop"].value == pytest.approx(0, abs=1e-9)


def test_the_shuffle_of_a_clip_depends_on_nothing_but_seed_draw_and_clip() -> None:
    valid = torch.ones(5, 8, dtype=torch.bool)
    whole = shuffled_steps(np.arange(5), valid, seed=1, draw=2)
    alone = shuffled_steps(np.array([3]), valid[:1], seed=1, draw=2)
    assert torch.equal(whole[3], alone[0])
    assert not torch.equal(whole, shuffled_steps(np.arange(5), valid, seed=1, draw=3))


def test_the_shuffle_moves_valid_steps_only() -> None:
    valid = torch.tensor([[True, True, True, False, False]])
    order = shuffled_steps(np.array([4]), valid, seed=0, draw=1)
    assert order[0, 3:].tolist() == [3, 4]
    assert sorted(order[0].tolist()) == [0, 1, 2, 3, 4]


def test_stability_of_a_hand_made_code() -> None:
    # One clip, one patch, three steps: {0,1} -> {1,2} -> {}.
    codes = torch.zeros(3, 1, 4)
    codes[0, 0, [0, 1]] = torch.tensor([3.0, 4.0])
    codes[1, 0, [1, 2]] = torch.tensor([6.0, 8.0])
    series, valid, order = Series.of(SparseCodes.of(codes)), torch.ones(3, dtype=torch.bool), torch.arange(3)
    cosine, overlap = StepCosine(), SupportOverlap()
    cosine.add(series.by_patch(), valid, order)
    overlap.add(series.common(), valid, order)
    assert cosine.mean == pytest.approx(4 * 6 / (5 * 10))
    assert overlap.jaccard == pytest.approx((1 / 3 + 0) / 2)
    assert overlap.flip_rate == pytest.approx((1 / 2 + 1) / 2)
    assert (cosine.pairs, overlap.jaccard_pairs, overlap.flip_pairs) == (1, 2, 2)


def test_the_flip_rate_of_a_code_of_k_latents_is_that_of_the_note() -> None:
    """1 - |S_t & S_t+1| / k, where every token has exactly k active latents."""
    k, rng = 4, np.random.default_rng(0)
    codes = torch.zeros(6, 5, 12)
    for step, patch in np.ndindex(6, 5):
        codes[step, patch, rng.choice(12, k, replace=False)] = 1.0
    overlap = SupportOverlap()
    overlap.add(Series.of(SparseCodes.of(codes)).common(), torch.ones(6, dtype=torch.bool), torch.arange(6))
    both = (codes[:-1] * codes[1:]).sum(2)
    assert overlap.flip_rate == pytest.approx(float((1 - both / k).mean()))


def test_a_clip_in_which_nothing_fires_is_a_clip_of_zeros() -> None:
    codes = torch.zeros(3, 2, 4)
    silent = Series.of(SparseCodes.of(codes)).by_feature()
    dense = FeatureProducts.of(codes.double())
    for name in ("sums_TF", "products_TTF", "active_TF"):
        torch.testing.assert_close(getattr(silent, name), getattr(dense, name))


def test_products_of_active_codes_are_those_of_the_dense_ones() -> None:
    codes = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)).relu()
    codes[..., 3] = 0
    codes[:, 2] = 0
    series, dense = Series.of(SparseCodes.of(codes)), codes.double()
    assert series.values_TM.shape[1] == int((codes != 0).any(0).sum())
    sparse, full = series.by_feature(), FeatureProducts.of(dense)
    torch.testing.assert_close(sparse.products_TTF, torch.einsum("tsf,usf->tuf", dense, dense))
    torch.testing.assert_close(full.products_TTF, sparse.products_TTF)
    torch.testing.assert_close(full.sums_TF, sparse.sums_TF)
    assert torch.equal(full.active_TF, sparse.active_TF)
    assert (full.patches, sparse.patches) == (6, 6)
    torch.testing.assert_close(series.by_patch(), torch.einsum("tsf,usf->tus", dense, dense))
    torch.testing.assert_close(patch_products(dense), series.by_patch())
    on = (dense != 0).double()
    torch.testing.assert_close(series.common(), torch.einsum("tsf,usf->tus", on, on))


def test_another_order_of_time_is_the_statistic_of_the_reordered_clip() -> None:
    """What the null reads from the products is what it would read from shuffled activations."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 6, 4)))
    valid, order = torch.tensor([True, True, True, True, False]), torch.tensor([1, 2, 0, 3, 4])
    chosen, moved = PooledAutocorrelation(4, 2, CPU), PooledAutocorrelation(4, 2, CPU)
    chosen.add(FeatureProducts.of(x), valid, pairs_at_lags(valid, order, 2))
    moved.add(FeatureProducts.of(x[order]), valid, pairs_at_lags(valid, torch.arange(5), 2))
    for lag in (1, 2):
        torch.testing.assert_close(chosen.per_feature(lag), moved.per_feature(lag))
    now, later = x[order][:3].flatten(0, 1), x[order][1:4].flatten(0, 1)
    expected = [np.corrcoef(now[:, f], later[:, f])[0, 1] for f in range(4)]
    np.testing.assert_allclose(chosen.per_feature(1).numpy(), expected, rtol=1e-10)


def test_a_grid_of_one_step_says_so_and_measures_the_rest(tmp_path: Path) -> None:
    store = signal_store(tmp_path / "s.zarr", np.random.default_rng(0).standard_normal((9, 1, 4, 3)))
    figures = figures_of(setting_of(store, 3), Identity(3))
    assert not any(name.startswith("coherence") for name in figures)
    assert figures["reconstruction.fvu"].value == 0


# --- repeated frames --------------------------------------------------------------------------------------------------


def padded_store(path: Path, indices: list[list[int]], padded: list[int], x: np.ndarray, kind: str = "dense") -> Store:
    steps, space, channels = x.shape[1:]
    plan = make_plan(clips=len(x), clips_per_shard=3, grid=(steps, 1, space), hooks={HOOK: channels}, dtype="float32")
    plan = plan.model_copy(update={"sampling": {"kind": kind}})
    writer = StoreWriter.begin(str(path), plan, planned_table(len(x)), {})
    for shard in writer.pending():
        with writer.shard(shard) as shard_writer:
            for clip in plan.shard_range(shard):
                outcome = ClipOutcome(
                    status="ok", frame_indices=tuple(indices[clip]), padded_frames=padded[clip], fps=10.0
                )
                shard_writer.append(outcome, {HOOK: x[clip].astype(np.float32)}, None)
            shard_writer.commit()
    writer.finish()
    return open_store(str(path))


def test_steps_with_a_repeated_frame_are_not_valid(tmp_path: Path) -> None:
    x = np.zeros((4, 4, 1, 2))
    indices = [list(range(8)), [0, 1, 2, 3, 4, 5, 5, 5], [0, 4, 8, 12, 16, 20, 24, 26], [0, 1, 1, 2, 3, 4, 5, 6]]
    store = padded_store(tmp_path / "s.zarr", indices, [0, 2, 1, 0], x)
    time = latent_time(store, np.arange(4))
    assert time.valid_CT.tolist() == [
        [True, True, True, True],
        [True, True, True, False],
        # Frame 26 is new, but not 4 frames after 24: the sampler calls it padded.
        [True, True, True, False],
        [True, False, True, True],
    ]


def test_the_step_is_the_tubelet_times_the_stride(tmp_path: Path) -> None:
    indices = [list(range(0, 32, 4))] * 3
    store = padded_store(tmp_path / "s.zarr", indices, [0] * 3, np.zeros((3, 4, 1, 2)))
    time = latent_time(store, np.arange(3))
    assert (time.step_frames, time.step_seconds) == (8.0, 0.8)


def test_repeated_frames_enter_no_figure_about_time(tmp_path: Path) -> None:
    """Whatever stands in padded steps, the figures about time do not move."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((6, 4, 3, 4))
    indices, padded = [[0, 1, 2, 3, 4, 5, 5, 5]] * 6, [2] * 6
    changed = x.copy()
    changed[:, 3] = changed[:, 2]
    figures = [
        figures_of(setting_of(padded_store(tmp_path / name, indices, padded, values), 4, lags=2), Rectified(4))
        for name, values in (("a.zarr", x), ("b.zarr", changed))
    ]
    for name, figure in figures[0].items():
        if name.startswith("coherence.") and figure.value is not None:
            assert figures[1][name].value == pytest.approx(figure.value, abs=1e-9), name
    assert figures[0]["coherence.cosine.sae"].n <= 6 * 3 * 2
    assert figures[0]["coherence.lag1.raw"].value == pytest.approx(pooled(x[:, :3]).value(1).mean, abs=1e-6)


# --- reconstruction and sparsity --------------------------------------------------------------------------------------


def test_the_identity_explains_everything_and_the_mean_nothing(tmp_path: Path) -> None:
    x = (np.random.default_rng(0).standard_normal((10, 4, 6, 5)) + 3).astype(np.float32)
    store = signal_store(tmp_path / "s.zarr", x)
    setting = setting_of(store, 5)
    perfect = figures_of(setting, Identity(5))
    assert perfect["reconstruction.fvu"].value == 0
    assert perfect["reconstruction.cosine"].value == pytest.approx(1, abs=1e-12)
    mean = torch.from_numpy(x.reshape(-1, 5).astype(np.float64).mean(0)).float()
    assert figures_of(setting, MeanPredictor(mean))["reconstruction.fvu"].value == pytest.approx(1, abs=1e-9)


def test_fvu_is_about_the_mean_of_the_evaluated_clips(tmp_path: Path) -> None:
    """Evaluated on one far-off part of the store, the mean predictor of that part scores 1; no digits are lost."""
    x = np.random.default_rng(0).standard_normal((8, 2, 6, 3)).astype(np.float32)
    x[4:] += 1000
    store = signal_store(tmp_path / "s.zarr", x)
    part = x[4:].reshape(-1, 3).astype(np.float64)
    figures = figures_of(setting_of(store, 3, np.arange(4, 8)), MeanPredictor(torch.from_numpy(part.mean(0)).float()))
    assert figures["reconstruction.fvu"].value == pytest.approx(1, abs=1e-6)


def test_l0_dead_and_density_of_a_hand_made_code(tmp_path: Path) -> None:
    # Four tokens over five latents: 1, 2, 2 and 3 active; latent 4 never fires, latent 0 always.
    x = np.zeros((1, 2, 2, 5))
    x[0, 0, 0, 0] = x[0, 0, 1, [0, 1]] = x[0, 1, 0, [0, 2]] = x[0, 1, 1, [0, 1, 3]] = 1
    store = signal_store(tmp_path / "s.zarr", x)
    sections = measure(setting_of(store, 5), Identity(5), clips_per_window=1)
    figures = {f.name: f for section in sections for f in section.figures}
    value = {name: figure.value for name, figure in figures.items()}
    assert value["sparsity.l0"] == 2
    assert (value["sparsity.l0_p05"], value["sparsity.l0_p50"], value["sparsity.l0_p95"]) == (1, 2, 3)
    assert (value["sparsity.dead"], value["sparsity.dead_fraction"]) == (1, 0.2)
    assert value["sparsity.always_on"] == 1
    assert value["sparsity.median_density"] == (0.25 + 0.5) / 2
    assert "4 evaluated tokens" in figures["sparsity.dead_fraction"].definition
    (histogram,) = (curve for section in sections for curve in section.curves if curve.kind == "bars")
    assert isinstance(histogram, Curve)
    assert sum(y for y in histogram.lines[0].y if y) == 4  # every alive latent is in a bar


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_any_window_gives_the_figures_of_one_shot(tmp_path: Path, window: int) -> None:
    store = signal_store(tmp_path / "s.zarr", np.random.default_rng(0).standard_normal((23, 4, 6, 8)), failed=(2, 9))
    setting = setting_of(store, 8)
    whole, cut = figures_of(setting, Rectified(8), window=23), figures_of(setting, Rectified(8), window=window)
    for name, figure in whole.items():
        assert (figure.value is None) == (cut[name].value is None), name
        if figure.value is not None:
            assert cut[name].value == pytest.approx(figure.value, abs=1e-10, rel=1e-10), name
        assert cut[name].n == figure.n


def test_failed_clips_never_enter(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((12, 4, 3, 4))
    store = signal_store(tmp_path / "s.zarr", x, failed=(0, 5, 11))
    figures = figures_of(setting_of(store, 4), Rectified(4))
    assert figures["reconstruction.fvu"].n == 9 * 12
    assert all(np.isfinite(figure.value) for figure in figures.values() if figure.value is not None)
    ok = np.delete(x, [0, 5, 11], axis=0)
    assert figures["coherence.lag1.raw"].value == pytest.approx(pooled(ok).value(1).mean, abs=1e-6)


def test_a_damaged_clip_is_named(tmp_path: Path) -> None:
    store = signal_store(tmp_path / "s.zarr", np.random.default_rng(0).standard_normal((4, 2, 3, 4)), failed=(2,))
    everything = np.arange(4)  # as if clip 2 were called ok
    time = LatentTime(np.ones((4, 2), dtype=bool), None, None)
    stream = windows(store, HOOK, Identity(4), everything, time.valid_CT, clips_per_window=4, device=CPU)
    with pytest.raises(TubeletError, match=r"clip 2 at blocks\.1"):
        list(stream)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_windows_hold_what_the_store_holds(tmp_path: Path, dtype: str) -> None:
    store = signal_store(tmp_path / "s.zarr", np.random.default_rng(0).standard_normal((9, 2, 3, 4)), dtype=dtype)
    clips = np.array([1, 4, 8])
    (window,) = windows(store, HOOK, Identity(4), clips, np.ones((9, 2), bool), clips_per_window=3, device=CPU)
    stored = np.concatenate([store.shard_map(HOOK, shard).astype(np.float32) for shard in range(2)])
    assert np.array_equal(window.x_CTSD.numpy(), stored[clips])
