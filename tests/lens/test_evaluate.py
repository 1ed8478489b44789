"""Laws of `tubelet evaluate`: a real trained SAE on a real store, its JSON and its page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from test_figure_tables import unlisted, unreported

from stores import make_plan, make_store
from tubelet.errors import TubeletError
from tubelet.formats import styled
from tubelet_lens.config import EvaluateConfig, Topic
from tubelet_lens.evaluate import BACKBONE_METRICS, CLIP_METRICS, METRICS, evaluate
from tubelet_lens.inputs.clip_selection import some_of
from tubelet_lens.report.evaluation_result import EvaluationResult
from tubelet_lens.report.html_report import count, why_undefined
from tubelet_lens.results.evaluation import Evaluation, read_evaluation
from tubelet_lens.results.latent_table import read_latents
from tubelet_lens.results.section import Figure
from tubelet_lens.verbs import EVALUATE
from tubelet_store.reader import open_store
from tubelet_trainer.config import HoldoutConfig, TrainConfig
from tubelet_trainer.data.holdout import held_out
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.sae_files import load_record, load_sae, save_sae

HOLDOUT = HoldoutConfig(fraction=0.4)
QUICK: dict[str, Any] = {
    "controls": False,
    "skip": tuple(topic for topic in get_args(Topic) if topic not in ("reconstruction", "sparsity")),
    "device": "cpu",
}
"""For what does not depend on what is measured."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store (`s.zarr`, two clips failed) and a run (`run`) trained on it."""
    root = tmp_path_factory.mktemp("lens")
    rng = np.random.default_rng(0)
    plan = make_plan(clips=30, grid=(4, 3, 4), hooks={"blocks.1": 8})
    clip = rng.standard_normal((30, 1, 12, 8))
    x = (clip + 0.5 * rng.standard_normal((30, 4, 12, 8))).astype(np.float32)
    store = make_store(root / "s.zarr", plan, {"blocks.1": x}, failed=(4, 5), clips_per_video=2)
    settings = {"steps": 60, "batch_tokens": 64, "log_every": 10, "eval_every": 20, "device": "cpu"}
    train(TrainConfig(store=store.url, out=root / "run", holdout=HOLDOUT, sae={"k": 3, "expansion": 2}, **settings))
    return root


@pytest.fixture(scope="module")
def found(trained: Path) -> EvaluationResult:
    return evaluate(EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), device="cpu"))


@pytest.fixture(scope="module")
def result(found: EvaluationResult) -> Evaluation:
    return found.evaluation


@pytest.fixture(scope="module")
def written(found: EvaluationResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its report, JSON and table."""
    return found.write(tmp_path_factory.mktemp("written")).parent


def evaluation(config: EvaluateConfig) -> Evaluation:
    return evaluate(config).evaluation


def test_only_held_out_clips_that_hold_activations_are_evaluated(trained: Path, result: Evaluation) -> None:
    store = open_store(str(trained / "s.zarr"))
    held = held_out(store.clips()["video_id"].to_pylist(), HOLDOUT) & store.ok()
    assert 0 < held.sum() < store.ok().sum()
    assert result.coverage.clips == held.sum()
    assert result.coverage.failed_clips == 2
    assert result.figure("reconstruction.fvu").n == held.sum() * 48


def test_fvu_and_l0_agree_with_the_trainers_own(trained: Path, result: Evaluation) -> None:
    last = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "eval"
    assert result.figure("reconstruction.fvu").value == pytest.approx(last["fvu"], rel=1e-5)
    assert result.figure("sparsity.l0").value == pytest.approx(last["l0"], rel=1e-6)
    assert result.figure("sparsity.dead_fraction").value == pytest.approx(last["dead"])


@pytest.mark.parametrize("split", ["train", "all"])
def test_the_other_splits_are_the_other_clips(trained: Path, result: Evaluation, split: str) -> None:
    there = evaluation(EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), split=split, **QUICK))
    held = result.coverage.clips
    assert there.coverage.clips == (28 if split == "all" else 28 - held)


def test_an_sae_of_another_library_is_evaluated_where_one_says_that_it_fits(trained: Path, tmp_path: Path) -> None:
    sae = load_sae(trained / "run")
    save_sae(tmp_path / "foreign", sae, {"hook": load_record(trained / "run").provenance["hook"]})
    options = {"run": tmp_path / "foreign", "store": str(trained / "s.zarr"), "split": "all", **QUICK}
    with pytest.raises(TubeletError, match=r"does not record its backbone.*--other_store true"):
        evaluation(EvaluateConfig(**options))
    there = evaluation(EvaluateConfig(**options, other_store=True))
    own = evaluation(EvaluateConfig(**{**options, "run": trained / "run"}))
    assert there.figure("reconstruction.fvu").value == own.figure("reconstruction.fvu").value
    save_sae(tmp_path / "nowhere", sae, {})
    with pytest.raises(TubeletError, match="does not record its hook"):
        evaluation(EvaluateConfig(**{**options, "run": tmp_path / "nowhere"}))


def test_a_limit_takes_clips_of_every_class_however_the_store_lists_them() -> None:
    for label_N in (np.arange(960) % 16, np.arange(960) // 60):
        assert len(set(label_N[some_of(np.arange(960), 96)])) == 16
    assert (some_of(np.arange(5), 5) == np.arange(5)).all()


def test_a_limit_is_kept(trained: Path) -> None:
    there = evaluation(EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), limit_clips=3, **QUICK))
    assert there.coverage.clips == 3


def test_every_topic_that_may_be_skipped_is_measured_and_none_other() -> None:
    assert set(get_args(Topic)) == set(METRICS) | set(CLIP_METRICS) | set(BACKBONE_METRICS)


def test_every_figure_is_in_its_metrics_table_and_every_row_is_reported(result: Evaluation) -> None:
    assert unlisted(result) == []
    assert unreported(result) == []


def test_what_cannot_be_measured_is_named_with_what_it_lacks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A quick job shows no progress; how quick this one is depends on the machine.
    monkeypatch.setattr("tubelet.progress._QUICK_S", 0.0)
    url = str(trained / "s.zarr")
    settings = {**QUICK, "skip": ("coherence",), "split": "all", "out": tmp_path}
    result = evaluate(EvaluateConfig(run=trained / "run", store=url, **settings))
    reasons = result.evaluation.not_measured
    assert set(reasons) == {"action", "ablation", "retrieval", "scope", "labels"}
    for topic in ("action", "ablation", "retrieval"):
        assert "no clips to fit on" in reasons[topic]
        assert "--fit_store" in reasons[topic]
    assert "shifted views" in reasons["scope"]
    page = result.write(tmp_path).read_text()
    assert EVALUATE.run(EvaluateConfig(run=trained / "run", store=url, **settings)) == 0
    printed, progress = capsys.readouterr()
    for text in (page, printed, repr(result)):
        assert "Not measured: action, ablation, retrieval" in text
    assert printed.lstrip() == printed
    assert printed.splitlines()[-1].endswith("report.html")
    assert "evaluating: 28 of 28 clips" in progress


def test_too_few_videos_are_called_too_few_and_figures_have_counts(trained: Path) -> None:
    url = str(trained / "s.zarr")
    few = evaluate(EvaluateConfig(run=trained / "run", store=url, limit_clips=2, **QUICK))
    assert any(line.startswith("Too few videos") for line in few.evaluation.cautions)
    assert all(", from " in line for line in list(few.lines())[: -len(few.evaluation.cautions)])
    fields = {"name": "a.b", "title": "t", "value": 0.5, "definition": "d"}
    assert count(Figure(n=5, n_of="test videos", **fields)).startswith("5 test videos: too few")
    assert count(Figure(n=1200, n_of="test videos", **fields)) == "1,200 test videos"
    assert count(Figure(n=5, n_of="tokens", **fields)) == "5 tokens"


def test_an_undefined_figure_says_when_it_is() -> None:
    fields = {"name": "a.b", "title": "t", "n": 5, "n_of": "latents"}
    definition = "Smallest m that costs half; undefined if none does. Sets are drawn."
    assert why_undefined(Figure(value=None, definition=definition, **fields)) == " (undefined if none does)"
    assert why_undefined(Figure(value=3, definition=definition, **fields)) == ""


def test_the_result_is_a_table_of_headlines_and_one_of_latents(found: EvaluationResult) -> None:
    headlines = [figure for figure in found.evaluation.figures() if figure.headline]
    frame = found.to_pandas()
    assert list(frame["name"]) == [figure.name for figure in headlines]
    assert frame["value"][0] == headlines[0].value
    assert "<table>" in found._repr_html_()
    order = found.latents.sort_by("frequency", descending=True)["frequency"]
    assert list(order) == sorted(found.latents["frequency"], reverse=True)


def test_a_topic_that_is_skipped_is_not_there(trained: Path) -> None:
    skipped = tuple(topic for topic in get_args(Topic) if topic != "sparsity")
    there = evaluation(
        EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), skip=skipped, controls=False, device="cpu")
    )
    assert [section.name for section in there.sections] == ["sparsity", "training"]
    assert there.not_measured == {}


def test_no_video_is_both_fitted_on_and_evaluated(trained: Path) -> None:
    url = str(trained / "s.zarr")
    with pytest.raises(TubeletError, match="shows a video that is evaluated"):
        evaluate(EvaluateConfig(run=trained / "run", store=url, split="all", fit_store=url, device="cpu"))
    there = EvaluateConfig(run=trained / "run", store=url, fit_store=url, skip=("action", "ablation"), device="cpu")
    here = there.model_copy(update={"fit_store": None})
    name = "retrieval.text_to_video_r1.sae"
    assert evaluation(there).figure(name).value == evaluation(here).figure(name).value


def test_probes_and_maps_have_controls(result: Evaluation) -> None:
    for name in ("action.top1", "retrieval.text_to_video_r1"):
        for subject in ("sae", "raw", "untrained", "random_topk", "pca"):
            assert result.figure(f"{name}.{subject}").value is not None
    assert result.figure("action.top1.permuted").value is not None
    # Of the four labels three are on videos that the SAE was trained on: nothing can guess the fourth.
    assert result.figure("action.chance").value == 1 / 3


def test_the_json_is_versioned_and_defines_every_figure(trained: Path, result: Evaluation, written: Path) -> None:
    tree = json.loads((written / "evaluation.json").read_text())
    assert (tree["format"], tree["schema_version"]) == ("tubelet-evaluation", 1)
    figures = [figure for section in tree["sections"] for figure in section["figures"]]
    assert len({figure["name"] for figure in figures}) == len(figures) > 30
    for figure in figures:
        assert len(figure["definition"]) > 20, figure["name"]
        assert figure["n"] >= 0
        assert figure["n_of"]
    assert tree["store"]["identity"] == open_store(str(trained / "s.zarr")).identity
    assert read_evaluation(written / "evaluation.json") == result


def test_every_headline_about_time_is_compared_with_raw_and_null(result: Evaluation) -> None:
    for quantity in ("lag1", "lag1_median", "lag1_weighted", "within", "cosine"):
        for subject in ("sae", "raw", "sae_shuffled", "raw_shuffled"):
            assert result.figure(f"coherence.{quantity}.{subject}").value is not None


def test_the_same_evaluation_twice_is_the_same(trained: Path, result: Evaluation) -> None:
    again = evaluation(EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), device="cpu"))
    assert again == result


def test_the_report_is_self_contained(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "://" not in page
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


def test_the_report_shows_every_figure_and_its_definition(result: Evaluation, written: Path) -> None:
    page = (written / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links <= set(ids)
    for figure in result.figures():
        assert f"def-{figure.name.replace('.', '-')}" in ids
        assert styled(figure.value, figure.style) in page
    for name in (
        "Training",
        "FVU during training",
        "Autocorrelation against distance in time",
        "How often latents fire",
    ):
        assert name in page
    assert page.count("<svg") == sum(len(section.curves) for section in result.sections)


def test_every_latent_has_a_row_that_agrees_with_the_figures(result: Evaluation, written: Path) -> None:
    table = read_latents(written)
    assert table["latent"].to_pylist() == list(range(16))
    frequency = table["frequency"].to_numpy()
    assert frequency.sum() == pytest.approx(result.figure("sparsity.l0").value)
    assert (frequency == 0).sum() == result.figure("sparsity.dead").value
    coherence = np.array([value for value in table["coherence"].to_pylist() if value is not None])
    assert coherence.mean() == pytest.approx(result.figure("coherence.lag1.sae").value)
    assert all(field.metadata[b"definition"] for field in table.schema if field.name != "latent")


def test_names_from_a_store_cannot_break_the_page(found: EvaluationResult, result: Evaluation, tmp_path: Path) -> None:
    plotless = tuple(section.model_copy(update={"curves": ()}) for section in result.sections)
    store = {**result.store, "name": "<script>alert(1)</script>"}
    hostile = result.model_copy(update={"store": store, "sections": plotless})
    page = EvaluationResult(hostile, found.latent_columns).write(tmp_path).read_text()
    assert "<script" not in page


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (None, "number", "—"),
        (0.0973, "number", "0.0973"),
        (-5e-17, "number", "0"),
        (-1e-9, "percent", "0.0 %"),
        (float("nan"), "number", "—"),
        (-0.5, "number", "\N{MINUS SIGN}0.500"),
        (12.345, "number", "12.35"),
        (5.0, "number", "5"),
        (0.263, "percent", "26.3 %"),
        (1234.0, "count", "1,234"),
    ],
)
def test_figures_are_shown_with_the_digits_that_matter(value: float | None, style: str, text: str) -> None:
    assert styled(value, style) == text


def test_a_store_without_the_saes_hook_is_refused(trained: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "o.zarr", make_plan(hooks={"blocks.2": 8}))
    with pytest.raises(TubeletError, match=r"trained on hook 'blocks\.1'.*it holds blocks\.2"):
        evaluate(EvaluateConfig(run=trained / "run", store=other.url))


def test_a_store_of_another_plan_is_refused_by_default(trained: Path, tmp_path: Path) -> None:
    plan = make_plan(hooks={"blocks.1": 8}).model_copy(update={"dataset": {"kind": "folder", "name": "other"}})
    other = make_store(tmp_path / "o.zarr", plan)
    with pytest.raises(TubeletError, match=r"another plan.*dataset"):
        evaluate(EvaluateConfig(run=trained / "run", store=other.url))
    asked = EvaluateConfig(run=trained / "run", store=other.url, other_store=True, split="all", **QUICK)
    assert evaluation(asked).coverage.clips == 10


def test_a_store_of_another_backbone_or_width_is_always_refused(trained: Path, tmp_path: Path) -> None:
    plan = make_plan(hooks={"blocks.1": 8}).model_copy(update={"backbone": {"family": "another"}})
    other = make_store(tmp_path / "o.zarr", plan)
    with pytest.raises(TubeletError, match="another backbone"):
        evaluate(EvaluateConfig(run=trained / "run", store=other.url, other_store=True))
    wide = make_store(tmp_path / "w.zarr", make_plan(hooks={"blocks.1": 9}))
    with pytest.raises(TubeletError, match=r"takes 8 channels.*has 9"):
        evaluate(EvaluateConfig(run=trained / "run", store=wide.url, other_store=True))


def test_a_run_without_held_out_videos_says_so(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    record = json.loads((run / "sae.json").read_text())
    record["provenance"]["holdout"]["fraction"] = 0
    (run / "sae.json").write_text(json.dumps(record))
    with pytest.raises(TubeletError, match=r"no clip to evaluate.*held-out share 0"):
        evaluate(EvaluateConfig(run=run, store=str(trained / "s.zarr")))


def test_a_folder_without_an_sae_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TubeletError, match="No SAE in"):
        evaluate(EvaluateConfig(run=tmp_path, store=str(trained / "s.zarr")))


def test_the_verb_writes_its_files_into_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EvaluateConfig(run=trained / "run", store=str(trained / "s.zarr"), limit_clips=2, **QUICK)
    assert EVALUATE.run(config) == 0
    out = trained / "run" / "evaluation"
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "latents.parquet", "report.html"]
    assert "FVU" in capsys.readouterr().out


def test_the_verb_is_described_without_torch_or_matplotlib() -> None:
    code = (
        "import sys; from tubelet_lens.verbs import EVALUATE; EVALUATE.config();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
