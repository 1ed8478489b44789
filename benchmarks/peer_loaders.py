"""The loaders of other projects, each run by an interpreter of its own: started by `loader.py --peer`.

    NAME/bin/python benchmarks/peer_loaders.py NAME tokens.npy folder

`tokens.npy` is [clips, tokens, channels] float16, channel 0 being the clip's number, so that the clips of a batch can
be counted. It is first written the way the peer keeps activations, in `folder`; only what follows is timed. Prints one
JSON list of rows: name, ratio to one thread's memcpy of the tokens' bytes as float16, distinct clips, entropy. Needs
NumPy, torch and the peer.

overcomplete and saev import torchvision for pictures, which their activations do not need, and torchvision's wheels
need a torch built for CUDA: of overcomplete only the module with the loader is run, and for saev an empty torchvision
stands in.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BATCH, REPEATS = 4096, 3
# As many tokens as the windows that they are compared with.
BUFFER = 65_536


def memcpy_seconds(size_bytes: int) -> float:
    """Seconds one thread needs to copy `size_bytes` between warm buffers of at most 256 MiB."""
    block = min(size_bytes, 1 << 28)
    source, target = np.ones(block, np.uint8), np.ones(block, np.uint8)
    start = time.perf_counter()
    np.copyto(target, source)
    return (time.perf_counter() - start) * size_bytes / block


def clip_entropy(clips: NDArray[np.int64]) -> float:
    """Entropy in nats of the clips of a batch."""
    shares = np.unique(clips, return_counts=True)[1] / len(clips)
    return float(-(shares * np.log(shares)).sum())


def measure(name: str, clips: int, most: int, batches: Callable[[], Iterator[Any]]) -> dict[str, Any]:
    """A row: speed over the first `most` batches of a fresh iteration, mixing of the last iteration's."""
    ratios: list[float] = []
    seen: list[NDArray[np.int64]] = []
    for _ in range(REPEATS):
        seen, spent, size_bytes = [], 0.0, 0
        stream = batches()
        for _ in range(most):
            start = time.perf_counter()
            batch = next(stream, None)
            spent += time.perf_counter() - start
            if batch is None:
                break
            size_bytes += 2 * batch.numel()
            seen.append(batch[..., 0].flatten().round().long().numpy())
        ratios.append(memcpy_seconds(size_bytes) / spent)
        del stream
    rng = np.random.default_rng(0)
    independent = statistics.mean(clip_entropy(rng.integers(0, clips, BATCH)) for _ in range(50))
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "clips": statistics.mean(len(np.unique(each)) for each in seen),
        "entropy": statistics.mean(clip_entropy(each) for each in seen) / independent,
    }


def sae_lens(tokens: NDArray[np.float16], folder: Path) -> list[dict[str, Any]]:
    """SAELens' ActivationsStore over cached activations: an Arrow data set, one row per context (here: clip)."""
    import datasets  # type: ignore[import-not-found]
    from sae_lens.training.activations_store import ActivationsStore  # type: ignore[import-not-found]

    clips, context, channels = tokens.shape
    features = datasets.Features({"hook": datasets.Array2D((context, channels), "float16")})
    # As its own cache runner makes them.
    parts = [datasets.Dataset.from_dict({"hook": part}, features=features) for part in np.array_split(tokens, 8)]
    datasets.concatenate_datasets(parts).save_to_disk(str(folder / "arrow"))

    def store() -> Any:
        return ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name="hook",
            hook_head_index=None,
            context_size=context,
            d_in=channels,
            n_batches_in_buffer=BUFFER // context,
            total_training_tokens=clips * context,
            store_batch_size_prompts=4,
            train_batch_size_tokens=BATCH,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder / "arrow"),
        ).get_data_loader()

    plain = datasets.load_from_disk(str(folder / "arrow")).with_format("torch")
    rng = np.random.default_rng(0)

    def rows_of() -> Iterator[Any]:
        return (plain[int(rng.integers(clips))]["hook"] for _ in range(16))

    return [
        measure(
            f"SAELens {version('sae-lens')}, cached activations, buffer {BUFFER // 1024}k tokens", clips, 24, store
        ),
        measure(f"datasets {datasets.__version__}, random Arrow rows of one clip, no shuffle", clips, 16, rows_of),
    ]


def overcomplete(tokens: NDArray[np.float16], folder: Path) -> list[dict[str, Any]]:
    """overcomplete's AsyncTensorDataset: .pt files in random order, shuffled inside, read by four threads."""
    package = importlib.util.find_spec("overcomplete")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("overcomplete")
    spec = importlib.util.spec_from_file_location("overcomplete_data", Path(package.origin).with_name("data.py"))
    data = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(data)  # type: ignore[union-attr]
    clips, _, channels = tokens.shape
    for number, part in enumerate(np.array_split(tokens, 8)):
        torch.save(torch.from_numpy(part.reshape(-1, channels).copy()), folder / f"{number}.pt")
    name = f"overcomplete {version('overcomplete')}, .pt files of {clips // 8} clips, float16"
    return [measure(name, clips, 10_000, lambda: iter(data.AsyncTensorDataset(str(folder), batch_size=BATCH)))]


def saev(tokens: NDArray[np.float16], folder: Path) -> list[dict[str, Any]]:
    """saev's Dataset of recorded patches, in the shuffled DataLoader that its training puts around it."""
    stand_in = types.ModuleType("torchvision")
    stand_in.datasets = types.ModuleType("torchvision.datasets")  # type: ignore[attr-defined]
    stand_in.datasets.ImageFolder = object
    sys.modules |= {"torchvision": stand_in, "torchvision.datasets": stand_in.datasets}
    from saev import activations, config  # type: ignore[import-not-found]

    clips, patches, channels = tokens.shape
    in_shard = clips // 8
    for number, part in enumerate(np.array_split(tokens, 8)):
        # A [CLS] token comes first in every image.
        padded = np.zeros((in_shard, 1, patches + 1, channels), np.float32)
        padded[:, 0, 1:] = part
        padded.tofile(folder / f"acts{number:06}.bin")
    metadata = activations.Metadata(
        "none", "none", (0,), patches, True, channels, 0, clips, in_shard * (patches + 1), "none"
    )
    metadata.dump(str(folder / "metadata.json"))
    config_ = config.DataLoad(shard_root=str(folder), patches="patches", layer=0, scale_mean=False, scale_norm=False)
    dataset = activations.Dataset(config_)

    def batches() -> Iterator[Any]:
        loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True)
        return (batch["act"] for batch in loader)

    return [measure(f"saev {version('saev')}, float32 rows from memory maps, 0 workers", clips, 2, batches)]


def run() -> None:
    """Prepare, measure, print."""
    name, tokens, folder = sys.argv[1:]
    torch.set_num_threads(1)
    peers = {"sae_lens": sae_lens, "overcomplete": overcomplete, "saev": saev}
    print(json.dumps(peers[name](np.load(tokens, mmap_mode="r"), Path(folder))))


if __name__ == "__main__":
    run()
