"""Every option of a training run has a law, or changes no arithmetic: a new option fails here until it is listed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from test_option_laws import CASES, DEFAULTS, KINDS, NESTINGS

from tubelet.config import Config
from tubelet_store.cache import CacheConfig
from tubelet_trainer.config import (
    HoldoutConfig,
    MLflowConfig,
    NoTracker,
    OptimizerConfig,
    TensorBoardConfig,
    TrainConfig,
    WandbConfig,
)
from tubelet_trainer.sae.config import Flat, InitConfig, TopKConfig

Option = tuple[type[Config], str]

STREAM_OPTIONS = (
    "seed", "steps", "tokens", "epochs", "batch_tokens", "window_tokens", "block_patches", "resident_shards",
)  # fmt: skip
STREAM = "test_a_run_learns_from_the_configured_tokens"

# Laws beside the cases of `test_option_laws`: the test of each option.
LAWS: dict[Option, str] = {
    (OptimizerConfig, "resample_every"): "test_dead_latents_are_resampled_after_the_configured_steps",
    (InitConfig, "directions"): "test_initial_weights_are_tied_without_shared_storage",
    (InitConfig, "bias"): "test_initial_weights_are_tied_without_shared_storage",
    (InitConfig, "subspace"): "test_initial_weights_are_tied_without_shared_storage",
    (InitConfig, "tokens"): "test_initial_weights_look_at_the_first_tokens_of_the_order",
    (HoldoutConfig, "fraction"): "test_videos_are_held_out_by_a_hash_of_seed_and_name",
    (HoldoutConfig, "seed"): "test_videos_are_held_out_by_a_hash_of_seed_and_name",
    (TrainConfig, "hook"): "test_each_has_its_folder_and_its_own_hook",
    **{(TrainConfig, name): STREAM for name in STREAM_OPTIONS},
    (TrainConfig, "mix"): "test_a_mixed_store_has_its_share_of_every_batch",
    (TrainConfig, "eval_tokens"): "test_an_evaluation_sees_as_many_tokens_as_configured",
    (TrainConfig, "saes"): "test_trained_together_equals_trained_alone",
    (TrainConfig, "sweep"): "test_a_sweep_is_the_product_of_its_lists_and_of_the_list_of_saes",
    (TrainConfig, "parallel"): "test_ranks_that_split_the_dictionary_equal_train",
    (TrainConfig, "precision"): "test_gradients_of_a_whole_step_in_bfloat16_equal_the_dense_formulas",
    (TrainConfig, "compile"): "test_a_compiled_run_learns_the_same",
    (TrainConfig, "cuda_graphs"): "test_captured_steps_equal_the_others",
}

# Options and whole models that change no arithmetic, with what they change.
NO_ARITHMETIC: dict[Option, str] = {
    (TrainConfig, "store"): "where the activations lie",
    (TrainConfig, "out"): "where results lie",
    (TrainConfig, "log_every"): "how often metrics are written",
    (TrainConfig, "eval_every"): "how often the SAE is evaluated",
    (TrainConfig, "checkpoint_every"): "how often the state is written",
    (TrainConfig, "keep_checkpoints"): "how many states are kept",
    (TrainConfig, "resume"): "whether a run that is found is continued or refused",
    (TrainConfig, "device"): "where the same arithmetic is done",
}
NO_ARITHMETIC_MODELS: dict[type[Config], str] = {
    CacheConfig: "how shards are fetched and kept",
    NoTracker: "where metrics are shown",
    TensorBoardConfig: "where metrics are shown",
    WandbConfig: "where metrics are shown",
    MLflowConfig: "where metrics are shown",
}


def models_in(annotation: Any) -> Iterator[type[Config]]:
    """Configuration models that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def options(model: type[Config]) -> Iterator[Option]:
    """Every option below `model`, with the model that declares it."""
    for name, info in model.model_fields.items():
        nested = list(models_in(info.annotation))
        for part in nested:
            yield from options(part)
        if not nested:
            declared = [base for base in model.__mro__ if issubclass(base, Config) and name in base.model_fields]
            yield declared[-1], name


OPTIONS = [option for option in dict.fromkeys(options(TrainConfig)) if option[0] not in NO_ARITHMETIC_MODELS]


def shown(found: set[Option]) -> list[str]:
    return sorted(f"{model.__name__}.{name}" for model, name in found)


def test_every_option_has_a_law_or_changes_no_arithmetic() -> None:
    assert len(OPTIONS) > 60, "options of nested models are not found"
    listed = {case.option for case in CASES} | LAWS.keys() | NO_ARITHMETIC.keys()
    assert shown(set(OPTIONS) - listed) == [], "add a case to CASES, a law to LAWS, or a reason to NO_ARITHMETIC"
    assert shown(listed - set(OPTIONS)) == [], "listed, but no longer an option"
    assert shown(NO_ARITHMETIC.keys() & (LAWS.keys() | {case.option for case in CASES})) == []


def test_the_laws_that_are_named_exist() -> None:
    texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    defined = {name for text in texts for name in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)}
    assert set(LAWS.values()) - defined == set()


def test_defaults_are_those_that_the_laws_assume() -> None:
    with_law = {option for option in OPTIONS if option not in NO_ARITHMETIC and option[1] != "kind"}
    found = {option: option[0].model_fields[option[1]].get_default(call_default_factory=True) for option in with_law}
    expected = {(model, name): value for model, values in DEFAULTS.items() for name, value in values.items()}
    assert shown(expected.keys() ^ found.keys()) == []
    assert {option: (found[option], value) for option, value in expected.items() if found[option] != value} == {}
    config = TrainConfig(store="s.zarr", out=Path("run"))
    assert (type(config.sae), type(config.sae.nesting)) == (TopKConfig, Flat)


def test_every_kind_is_known_to_the_laws() -> None:
    fields = (TrainConfig.model_fields["sae"], TopKConfig.model_fields["nesting"])
    assert tuple(tuple(models_in(info.annotation)) for info in fields) == (KINDS, NESTINGS)
