"""Laws of a training step: it never synchronizes with the device, and is the same sequence of operations each time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from steps import take_step
from stores import make_plan, make_store
from tubelet_trainer.config import OptimizerConfig, TrainConfig
from tubelet_trainer.losses.objective import Objective
from tubelet_trainer.losses.sparsity import sae_terms
from tubelet_trainer.optim.cuda_graph import held_batch, inputs_of, signature
from tubelet_trainer.optim.sae_trainer import SAETrainer
from tubelet_trainer.run.training_run import Run
from tubelet_trainer.sae.config import RandomPrefixes, TopKConfig
from tubelet_trainer.sae.model import SAE
from tubelet_trainer.sae.normalization import Normalization

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

# Every kind, every nesting, every objective, everything of the optimizer that is there in a step.
RECIPES = {
    "topk": {"sae": {"k": 4}},
    "batchtopk, groups": {"sae": {"kind": "batchtopk", "k": 4, "nesting": {"kind": "groups"}}},
    "abstopk, over k": {"sae": {"kind": "abstopk", "k": 4, "nesting": {"kind": "hierarchical"}}},
    "topk, random prefixes": {"sae": {"k": 4, "nesting": {"kind": "random", "prefixes": 4}}},
    "batchtopk, random prefixes": {"sae": {"kind": "batchtopk", "k": 4, "nesting": {"kind": "random", "prefixes": 4}}},
    "relu, controlled": {"sae": {"kind": "relu", "target_l0": 4, "auxk": 8}},
    "jumprelu": {"sae": {"kind": "jumprelu"}},
    "gated": {"sae": {"kind": "gated"}},
    "coherent": {
        "sae": {"kind": "batchtopk", "k": 4},
        "objective": {"lambda_t": 0.3, "lambda_s": 0.1, "codes": "post"},
    },
    "slow": {"sae": {"k": 4}, "objective": {"lambda_smooth": 0.1, "lambda_slow": 0.5, "codes": "prefix"}},
    "averaged": {"sae": {"k": 4}, "optimizer": {"ema": 0.9, "resample_every": 13}},
    "together": {"saes": [{"sae": {"seed": seed, "k": 4}} for seed in range(3)]},
    "batchtopk together": {"sae": {"kind": "batchtopk", "k": 4}, "sweep": {"sae.seed": [0, 1]}},
}

READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal")


class Waits(AssertionError):
    """The step asked the device for a number."""


class NoWaiting(TorchDispatchMode):
    """Refuses what has to wait for the device: reading a number, or a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and isinstance(args[0], torch.Tensor) and len(args) < 3
        if name in READS or by_mask or counted:
            raise Waits(name)
        return func(*args, **(kwargs or {}))


class Script(TorchDispatchMode):
    """Writes down each operation with its numbers and shapes, but not the contents of tensors."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.lines.append((str(func), self._plain(args), self._plain(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _plain(self, value):
        if isinstance(value, torch.Tensor):
            return ("tensor", tuple(value.shape), str(value.dtype))
        if isinstance(value, list | tuple):
            return tuple(self._plain(part) for part in value)
        if isinstance(value, Mapping):
            return tuple((key, self._plain(part)) for key, part in value.items())
        return str(value)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = make_plan(clips=30, clips_per_shard=8, grid=(4, 3, 4), hooks={"h": 16})
    return make_store(tmp_path_factory.mktemp("step") / "s.zarr", plan)


def begin(store, out, fields):
    """A run, and its first batches."""
    tree = {
        "store": store.url, "out": out, "steps": 60, "batch_tokens": 64, "window_tokens": 500, "device": DEVICE.type,
        "holdout": {"fraction": 0}, "pairs": {"anchors": 32}, "optimizer": {"lr": 3e-3, "warmup_steps": 3},
    }  # fmt: skip
    for name in ("sae", "optimizer"):
        fields = {**fields, name: {**tree.get(name, {}), **fields.get(name, {})}}
    fields["sae"] = {"dead_after_tokens": 128, "latents": 96, **fields["sae"]}
    run = Run(TrainConfig.model_validate({**tree, **fields}), [store], DEVICE)
    for sae_run in run.sae_runs:
        # Latents that never fire, so that the terms of dead ones are part of the step.
        sae_run.sae_trainer.sae.b_enc.data[:10] = -100
    return run, iter(run.loader)


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_no_step_waits_for_the_device(store, tmp_path, fields):
    run, batches = begin(store, tmp_path, fields)
    for step in range(14):
        if CUDA and step > 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with NoWaiting():
                run.sae_group.learn(next(batches), step)
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    assert all(sae_run.sae_trainer.dead_latents.dead_count >= 10 for sae_run in run.sae_runs), (
        "no latent died: AuxK went untested"
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.unique(x),
        lambda x: x.repeat_interleave((x > 0).long()),
    ],
)
def test_what_would_wait_is_noticed(operation):
    x = torch.randn(9)
    with pytest.raises(Waits), NoWaiting():
        operation(x)


@pytest.mark.parametrize("fields", RECIPES.values(), ids=RECIPES)
def test_a_step_is_the_same_operations_each_time(store, tmp_path, fields):
    """What a CUDA graph relies on. The tensors are the same too: all that lasts is changed in place."""
    run, batches = begin(store, tmp_path, fields)
    scripts: dict[object, list[list[object]]] = {}
    places = set()
    for step in range(20):
        batch = next(batches)
        for stacked in run.sae_group.stacks:
            x = stacked.saes[0].normalization(batch.hooks[stacked.hook])
            stacked.begin(step, batch)
            key = (id(stacked), signature(stacked, batch, x))
            held = held_batch(batch)
            with Script() as script:
                forwards, _ = stacked.compute(held, inputs_of(held, x)[0], step)
            stacked.finish(forwards)
            # The first step makes what is made once.
            if step:
                scripts.setdefault(key, []).append(script.lines)
        if step:
            state = [sae_trainer.state() for sae_trainer in run.sae_group.sae_trainers]
            found = [(n, t.data_ptr()) for s in state for n, t in s.items() if not n.endswith("dead_counts")]
            places.add(tuple(found))
    assert len(places) == 1
    repeated = [lines for lines in scripts.values() if len(lines) > 1]
    assert sum(len(lines) for lines in repeated) > 8
    for lines in repeated:
        assert all(line == lines[0] for line in lines[1:])


def test_one_look_at_the_dead_is_several_steps_old_and_repeats():
    sae = SAE(TopKConfig(latents=64, k=2), Normalization.identity(8))
    terms = sae_terms(sae.config, 8, 8.0, 100, torch.device("cpu"))
    sae_trainer = SAETrainer(sae, Objective(terms), OptimizerConfig(), 100, 200)
    counts, known = [], []
    for step in range(24):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        take_step(sae_trainer, x, step)
        counts.append(int(sae_trainer.dead_latents.dead_F.sum()))
        known.append(sae_trainer.dead_latents.dead_count)
    assert max(counts) > 0
    # Sent out after steps 3, 7, 11, ..., read 4 steps later.
    assert known[7:11] == [counts[3]] * 4
    assert known[11:15] == [counts[7]] * 4
    assert known[19:23] == [counts[15]] * 4


def sorted_learner(sort_every, device="cpu"):
    nesting = RandomPrefixes(prefixes=1, sort_every=sort_every)
    sae = SAE(TopKConfig(latents=64, k=3, nesting=nesting), Normalization.identity(8))
    terms = sae_terms(sae.config, 8, 8.0, 100, torch.device(device))
    return SAETrainer(sae, Objective(terms), OptimizerConfig(lr=3e-3, ema=0.9), 100, 200)


def test_sorted_latents_take_along_everything_that_is_known_of_them():
    """With the whole code as only prefix the order is nothing to the loss: a sorted run is the unsorted one, reordered.

    It is not where the optimizer's moments stay behind, the fault of Abeshima's code.
    """
    plain, sorting = sorted_learner(None), sorted_learner(10)
    for step in range(40):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step)) * torch.arange(1, 9)
        for sae_trainer in (plain, sorting):
            take_step(sae_trainer, x, step)
    energy = sorting.energy_F
    assert (energy.diff() <= 1e-6).all()
    assert not torch.equal(plain.sae.b_enc, sorting.sae.b_enc)
    # Each latent of the sorted run is the one of the plain run whose decoder row it has.
    order = (sorting.sae.W_dec.detach() @ plain.sae.W_dec.detach().T).argmax(dim=1)
    assert len(order.unique()) == 64
    ours, theirs = sorting.state(), plain.state()
    for name in theirs:
        expected = theirs[name]
        if expected.ndim and expected.shape[0] == 64:
            expected = expected[order]
        if not name.endswith("dead_counts"):
            torch.testing.assert_close(ours[name], expected, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert (theirs["dead_latents/silent_tokens"] > 0).any()


@pytest.mark.skipif(not CUDA, reason="no CUDA device here: a graph can only be recorded on one")
def test_captured_steps_equal_the_others(store, tmp_path):
    weights = []
    for captured in (False, True):
        run, batches = begin(store, tmp_path / str(captured), {**RECIPES["together"], "cuda_graphs": captured})
        for step in range(20):
            run.sae_group.learn(next(batches), step)
        weights.append([p.detach().clone() for m in run.sae_runs for p in m.sae_trainer.sae.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
