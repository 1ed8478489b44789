"""Training from object storage is training: the same weights, from a cache that holds a fifth of the store."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from faulty_proxy import faulty_proxy
from object_server import create_bucket, s3_environment, s3_server
from stores import make_plan, make_store
from tubelet.cli.main import main
from tubelet.config import dump_yaml
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.driver import extract
from tubelet_pipeline.extract_config import ExtractConfig
from tubelet_pipeline.synthetic.render_dataset import VideosConfig, make_dataset
from tubelet_store.cache import CacheConfig
from tubelet_store.cache.local_cache import LocalCache
from tubelet_store.reader import open_store
from tubelet_store.storage import open_root
from tubelet_store.storage.local import LocalRoot
from tubelet_trainer.config import TrainConfig
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.mixture import Mixture
from tubelet_trainer.data.order import EpochOrder
from tubelet_trainer.data.shard_prefetch import ShardPrefetch, fitting_shards
from tubelet_trainer.data.source import Source
from tubelet_trainer.run.loop import train
from tubelet_trainer.sae.sae_files import load_sae

PLAN = make_plan(clips=80, clips_per_shard=4, grid=(4, 3, 5), hooks={"h": 16})
STORE_BYTES = 80 * 60 * 16 * 2
SHARD_BYTES = STORE_BYTES // 20 + 68
BUDGET = 20 * SHARD_BYTES // 5


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("local") / "s.zarr", PLAN, failed=(3, 20, 21), clips_per_video=2)


@pytest.fixture(scope="module")
def url(local):
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(endpoint).items():
            patch.setenv(name, value)
        create_bucket(endpoint, "bucket")
        root = open_root("s3://bucket/s.zarr")
        for key in LocalRoot(local.root.directory).list_keys():
            root.replace(key, local.root.read(key))
        yield root.url


def configure(store: str, out: Path, **fields) -> TrainConfig:
    tree = {
        "store": store,
        "out": out,
        "epochs": 2,
        "batch_tokens": 256,
        "window_tokens": 512,
        "sae": {"k": 4},
        "log_every": 10,
        "eval_every": 10,
        "eval_tokens": 256,
        "checkpoint_every": 7,
        "holdout": {"fraction": 0.2},
        "device": "cpu",
    }
    return TrainConfig.model_validate({**tree, **fields})


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(out / "sae.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_are_those_of_a_local_copy_bit_for_bit(local, url, tmp_path):
    cache = {"directory": tmp_path / "cache", "budget": BUDGET}
    remote = train(configure(url, tmp_path / "remote", cache=cache)).out
    recorded = (remote / "config.yaml").read_text()
    assert "resident_shards: 2" in recorded
    assert same(remote, train(configure(local.url, tmp_path / "local", resident_shards=2)))
    assert not same(remote, train(configure(local.url, tmp_path / "all")))
    assert LocalCache(url, CacheConfig(directory=tmp_path / "cache")).held_bytes() <= BUDGET


def test_a_cache_that_holds_all_gives_the_order_of_a_local_store(local, url, tmp_path):
    remote = train(configure(url, tmp_path / "remote", epochs=1, cache={"directory": tmp_path / "cache"})).out
    assert same(remote, train(configure(local.url, tmp_path / "local", epochs=1)))


def test_a_run_continues_with_its_own_order_whatever_the_budget_is_now(local, url, tmp_path):
    out = tmp_path / "run"
    train(configure(url, out, cache={"directory": tmp_path / "m", "budget": BUDGET}))
    (out / "sae.json").unlink()
    train(configure(url, out, cache={"directory": tmp_path / "m", "budget": 2 * BUDGET}))
    train(configure(local.url, out))
    with pytest.raises(TubeletError, match="resident_shards: 2 -> 3"):
        train(configure(local.url, out, resident_shards=3))


def test_a_budget_below_one_shard_is_refused_with_the_figure(url, tmp_path):
    with pytest.raises(TubeletError, match=f"at least {SHARD_BYTES} bytes"):
        train(configure(url, tmp_path / "run", cache={"directory": tmp_path / "m", "budget": 1000}))


@pytest.mark.parametrize("together", [None, 1, 3, 7, 19, 20, 50])
def test_every_block_is_seen_once_an_epoch_and_few_shards_at_a_time(together):
    sizes = np.random.default_rng(0).integers(1, 9, 20)
    first_block = np.concatenate([[0], np.cumsum(sizes)])
    orders = [EpochOrder(first_block, together, (0, epoch)) for epoch in (0, 1)]
    whole = orders[0].slice(0, int(first_block[-1]))
    assert sorted(whole) == list(range(first_block[-1]))
    assert np.array_equal(np.concatenate([orders[0].slice(i, i + 1) for i in range(len(whole))]), whole)
    assert not np.array_equal(orders[1].slice(0, len(whole)), whole)
    if together is not None and together < 20:
        shards = np.searchsorted(first_block, whole, side="right") - 1
        groups = np.array([orders[0].group(i) for i in range(len(whole))])
        for group in range(groups[-1] + 1):
            present = set(shards[groups == group])
            assert len(present) <= together
            assert set(orders[0].groups_from(group)[0]) == present


def test_all_shards_together_is_the_order_there_always_was(local):
    source = Source(local, "h")
    clips = np.flatnonzero(local.ok())
    streams = [
        ActivationLoader(source, clips, batch_tokens=256, window_tokens=512, resident_shards=resident)
        for resident in (None, 20, 1000)
    ]
    assert len({stream.digest for stream in streams}) == 1
    assert (
        streams[0].digest
        != ActivationLoader(source, clips, batch_tokens=256, window_tokens=512, resident_shards=3).digest
    )


TRAIN = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from tubelet_trainer.config import TrainConfig
from tubelet.config import load_config
from tubelet_trainer.run.loop import train
train(load_config(TrainConfig, Path(sys.argv[1]), {"out": sys.argv[2], "seed": sys.argv[3]}))
"""


def read_all(source):
    clips = np.arange(80, dtype=np.int64)
    out = np.empty((80 * source.groups, source.grid.time, source.block_patches, 16), source.bits)
    source.copy_blocks(np.repeat(clips, source.groups), np.tile(np.arange(source.groups), 80), out)
    return out


def test_sources_of_one_cache_hold_nothing_once_they_have_read(local, url, tmp_path):
    # Two hooks of a job, say: with a map kept by each, this room would be too small, and two such jobs could wait for
    # each other.
    cache = CacheConfig(directory=tmp_path, budget=SHARD_BYTES)
    sources = [Source(open_store(url, cache=cache), "h") for _ in range(2)]
    for source in [*sources, *sources]:
        assert np.array_equal(read_all(source), read_all(Source(local, "h")))
    assert sources[0].store.cache.held_bytes() == SHARD_BYTES


def test_jobs_of_a_node_train_through_one_small_cache_over_a_bad_network(local, url, tmp_path, monkeypatch):
    # Each job holds one shard at a time; less than one for each could not do.
    jobs, budget = 3, 4 * SHARD_BYTES
    # A stall ends before the client's patience does: how long that is, is another test's matter.
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], stall_s=0.3) as (proxy, spoilt):
        monkeypatch.setenv("AWS_ENDPOINT_URL", spoilt)
        proxy.only, proxy.share = lambda path: "/activations/" in path, 0.3
        cache = {"directory": tmp_path / "m", "budget": budget}
        settings = configure(url, tmp_path, cache=cache, resident_shards=2, epochs=1)
        (tmp_path / "run.yaml").write_text(dump_yaml(settings))
        running = [
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, str(tmp_path / "run.yaml"), str(tmp_path / f"job-{seed}"), str(seed)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in range(jobs)
        ]
        watch, most = LocalCache(url, CacheConfig(directory=tmp_path / "m")), 0
        while any(job.poll() is None for job in running):
            most = max(most, watch.held_bytes())
            time.sleep(0.01)
        for job in running:
            errors = job.communicate()[1]
            assert job.returncode == 0, errors
        assert proxy.faults.total() >= 10
    assert 0 < most <= budget
    for seed in range(jobs):
        alone = train(configure(local.url, tmp_path / f"alone-{seed}", resident_shards=2, epochs=1, seed=seed)).out
        assert same(tmp_path / f"job-{seed}", alone)


def test_videos_extracted_straight_to_object_storage_train_as_from_a_local_copy(url, tmp_path):
    videos, backbone = tmp_path / "ssv2", tmp_path / "tiny-videomae"
    make_dataset(VideosConfig(out=videos, videos=20, frames=20, height=64, width=64, validation_share=0.0, workers=1))
    write_tiny_videomae(backbone, image_size=32, patch_size=8, frames=8, hidden=32, layers=2)
    remote = "s3://bucket/extracted.zarr"
    job = {
        "store": remote,
        "dataset": {"kind": "ssv2", "root": str(videos), "split": "train"},
        "sampling": {"kind": "dense", "frames": 8, "stride": 2},
        "backbone": {"id": str(backbone)},
        "hooks": ["blocks.-1"],
        "clips_per_shard": 1,
        "decode": {"processes": 1},
        "cluster": {"workers": 1, "threads": 1},
        "upload": {"spool_dir": str(tmp_path / "spool")},
    }
    identity = extract(ExtractConfig.model_validate(job)).identity
    assert main(["pull", remote, str(tmp_path / "copy.zarr")]) == 0
    copy = open_store(str(tmp_path / "copy.zarr"))
    assert copy.identity == identity
    hook = copy.plan.hooks[0].name
    store_bytes = sum(copy.shard_object(hook, shard).stored.size_bytes for shard in range(copy.plan.shards))
    cache = {"directory": tmp_path / "cache", "budget": store_bytes // 5}
    fields = {"hook": hook, "window_tokens": 256, "batch_tokens": 128}
    from_remote = train(configure(remote, tmp_path / "remote", cache=cache, **fields)).out
    together = yaml.safe_load((from_remote / "config.yaml").read_text())["resident_shards"]
    assert 1 <= together < copy.plan.shards
    assert same(from_remote, train(configure(copy.url, tmp_path / "local", resident_shards=together, **fields)))
    assert 0 < LocalCache(remote, CacheConfig(directory=tmp_path / "cache")).held_bytes() <= store_bytes // 5


def test_a_newcomer_needs_a_catalog_and_what_it_says(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUBELET_CACHE", str(tmp_path / "cache"))
    assert main(["catalog", "add", "shared", url, "--license", "CC-BY-4.0"]) == 0
    capsys.readouterr()
    assert main(["catalog", "list", "--dataset", "test", "--hook", "h"]) == 0
    assert "shared" in capsys.readouterr().out
    assert main(["catalog", "show", "shared"]) == 0
    said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":  " in line)

    array = open_store("catalog.yaml#shared")["h"]
    assert 'tubelet.open_store("catalog.yaml#shared")' in said["Open it"]
    assert array.torch(0).flatten(0, 2).shape == (4 * 60, 16)

    program, *arguments = shlex.split(said["Train on it"])
    assert program == "tubelet"
    assert main([*arguments, "--batch-tokens", "256", "--device", "cpu"]) == 0
    values, latents = load_sae(tmp_path / "runs/shared").encode_sparse(array.torch(0).flatten(0, 2).float())
    assert values.shape == latents.shape == (4 * 60, 32)

    part = f"{url.removesuffix('s.zarr')}part.zarr"
    assert main(["push", "catalog.yaml#shared", part, "--hooks", "h", "--where.first", "8"]) == 0
    assert main(["catalog", "add", "part", part, "--owner", "team-b"]) == 0
    assert main(["catalog", "check"]) == 0
    assert len(open_store("catalog.yaml#part").clips()) == 8


class Listening(LocalCache):
    """A cache that notes what it is told."""

    def __init__(self, cache: LocalCache) -> None:
        super().__init__(cache.url, cache.config)
        self.told: list[list[str]] = []

    def prefetch(self, coming) -> None:
        coming = list(coming)
        self.told.append([wanted.stored.key.split("/c/")[1].split("/")[0] for wanted in coming])
        super().prefetch(coming)


def listened(url, folder, budget):
    store = open_store(url, cache=CacheConfig(directory=folder, budget=budget))
    store.cache = Listening(store.cache)
    return store


def test_streams_of_one_cache_share_one_list_first_groups_first(url, tmp_path):
    store = listened(url, tmp_path, 20 * SHARD_BYTES)
    source, shared = Source(store, "h"), ShardPrefetch()

    def groups(*numbers):
        return [[(source, shard) for shard in group] for group in numbers]

    shared.announce("training", groups([0, 1], [2, 3], [4]))
    assert store.cache.told[-1] == ["0", "1", "2", "3", "4"]
    shared.announce("held out", groups([3, 7], [8]))
    assert store.cache.told[-1] == ["3", "7", "0", "1", "8", "2", "4"]
    shared.announce("training", groups([2, 3], [4]))
    assert store.cache.told[-1] == ["2", "3", "7", "4", "8"]
    shared.withdraw("held out")
    assert store.cache.told[-1] == ["2", "3", "4"]
    shared.withdraw("training")
    assert store.cache.told[-1] == []
    # It was told that nothing comes, and is not told again when others read.
    times = len(store.cache.told)
    other = listened(url, tmp_path, 20 * SHARD_BYTES)
    shared.announce("other", [[(Source(other, "h"), 0)]])
    assert (other.cache.told[-1], len(store.cache.told)) == (["0"], times)


def test_caches_of_one_directory_share_its_budget(url, tmp_path):
    stores = [listened(url, tmp_path, 4 * SHARD_BYTES) for _ in range(2)]
    shared = ShardPrefetch()
    for number, store in enumerate(stores):
        shared.announce(number, [[(Source(store, "h"), 5 * number + shard)] for shard in range(5)])
    # The newest stream's first group, the other's first group, and so on: four shards in all.
    assert [store.cache.told[-1] for store in stores] == [["0", "1"], ["5", "6"]]


def test_a_held_out_pass_amid_training_keeps_what_training_expects(url, tmp_path):
    store = listened(url, tmp_path, 8 * SHARD_BYTES)
    # A group of shards is many windows: training's does not change meanwhile.
    options = {"batch_tokens": 32, "window_tokens": 60, "resident_shards": 4}
    stream = iter(ActivationLoader(Source(store, "h"), np.arange(0, 80, 2), **options))
    next(stream)
    alone = store.cache.told[-1]
    list(ActivationLoader(Source(store, "h"), np.arange(1, 80, 2), total_tokens=256, **options))
    amid, after = store.cache.told[-2:]
    assert set(alone[:4]) < set(amid)
    assert after == alone
    stream.close()
    assert store.cache.told[-1] == []


def test_a_budget_below_what_is_shuffled_together_is_refused_at_the_start_with_the_figures(url, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=3 * SHARD_BYTES))
    options = {"batch_tokens": 256, "window_tokens": 512}
    one = ActivationLoader(Source(store, "h"), np.arange(80), resident_shards=3, **options)
    needed = f"at least {4 * SHARD_BYTES} bytes.*resident_shards to at most 3"
    with pytest.raises(TubeletError, match=needed):
        ActivationLoader(Source(store, "h"), np.arange(80), resident_shards=4, **options)
    # Two sources of one cache, be they hooks or stores, need the sum.
    with pytest.raises(TubeletError, match=f"at least {4 * SHARD_BYTES} bytes.*resident_shards to at most 1"):
        ActivationLoader([Source(store, "h"), Source(store, "h")], np.arange(80), resident_shards=2, **options)
    with pytest.raises(TubeletError, match=f"at least {6 * SHARD_BYTES} bytes"):
        Mixture([one, one])


def test_shards_of_all_hooks_and_stores_are_counted_when_choosing_how_many_fit(local, url, tmp_path):
    store = open_store(url, cache=CacheConfig(directory=tmp_path, budget=12 * SHARD_BYTES))
    one = Source(store, "h")
    assert fitting_shards([one]) == 6
    assert fitting_shards([one, one]) == 3
    assert fitting_shards([one, Source(local, "h")]) == 6
    assert fitting_shards([Source(local, "h")]) is None
    roomy = open_store(url, cache=CacheConfig(directory=tmp_path, budget=40 * SHARD_BYTES))
    assert fitting_shards([Source(roomy, "h")] * 2) is None
    assert fitting_shards([Source(roomy, "h")] * 3) == 6
