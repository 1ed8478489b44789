"""Damaged videos through a whole extraction: is any job lost, is any file lost, and who notices the damage?

    python benchmarks/mutations.py FOLDER [MUTANTS] > benchmarks/results/mutations.txt

FOLDER/sound and FOLDER/broken are taken as they are. Mutants are made of the sound ones, from a seed: flipped bits,
cut tails, blocks in another order. All of them go through one `tubelet extract` with a tiny backbone. Then every stored
clip of a mutant is compared with the frames of the undamaged video at the same indices, and whatever differs without a
flag is given to the other decoders too.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import yaml
from av.video.stream import VideoStream
from numpy.typing import NDArray

from goals import Goal, goal_lines
from tubelet.errors import TubeletError
from tubelet_pipeline.backbones.tiny import write_tiny_videomae
from tubelet_pipeline.datasets.dataset_root import VIDEO_SUFFIXES
from tubelet_pipeline.decode.decoded_clip import DecodedClip, DecodeFailure
from tubelet_pipeline.decode.pool import DecodePool, DecodeRequest
from tubelet_pipeline.decode.process import DecodeConfig
from tubelet_pipeline.decode.pyav_backend import upright
from tubelet_pipeline.sampling import UniformSampling
from tubelet_store.reader import Store, open_store

KINDS = ("flipped bits", "cut short", "blocks shuffled")
BLOCK_BYTES = 4096
SAMPLING = UniformSampling(frames=8)
Other = Literal["decord", "torchcodec"]
OTHERS: tuple[Other, ...] = ("decord", "torchcodec")
SEED = 0


def mutate(content: bytes, kind: str, draw: random.Random) -> bytes:
    """`content`, damaged."""
    if kind == "cut short":
        return content[: int(len(content) * draw.uniform(0.05, 0.99))]
    damaged = bytearray(content)
    if kind == "flipped bits":
        for _ in range(draw.choice((1, 4, 16, 64))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    size = min(BLOCK_BYTES, max(1, len(content) // 8))
    for _ in range(draw.choice((1, 2, 8))):
        one, other = (draw.randrange(len(content) // size) * size for _ in range(2))
        block = damaged[one : one + size]
        damaged[one : one + size] = damaged[other : other + size]
        damaged[other : other + size] = block
    return bytes(damaged)


@dataclass(frozen=True)
class Mutant:
    """A damaged copy of `parent`."""

    path: Path
    parent: Path
    kind: str


def make_mutants(parents: Sequence[Path], count: int, folder: Path, seed: int = SEED) -> list[Mutant]:
    """`count` mutants in `folder`, each kind of each parent in turn. Copies that came out undamaged are made again."""
    draw, mutants = random.Random(seed), []
    for number in range(count):
        kind, parent = KINDS[number % len(KINDS)], parents[number // len(KINDS) % len(parents)]
        content = parent.read_bytes()
        damaged = content
        while damaged == content:
            damaged = mutate(content, kind, draw)
        path = folder / f"{number:03d}-{kind.replace(' ', '-')}-{parent.name}"
        path.write_bytes(damaged)
        mutants.append(Mutant(path, parent, kind))
    return mutants


def frame_digests(path: Path) -> list[bytes]:
    """A digest of every frame of a sequential decode."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        assert isinstance(stream, VideoStream)  # a sound video has one
        frames = container.decode(stream)
        return [
            _digest(upright(np.asarray(f.to_ndarray(format="rgb24"), np.uint8), f.side_data.get("DISPLAYMATRIX")))
            for f in frames
        ]


def _digest(frame: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(frame).data, digest_size=16).digest()


@dataclass
class Outcome:
    """The outcome of one file."""

    mutant: Mutant
    outcome: str
    """`right`, `differs`, or the failure's code."""
    flagged: bool
    elsewhere: dict[str, str] = field(default_factory=dict)
    """Of silent ones: what the other decoders do with them."""

    @property
    def is_silent(self) -> bool:
        """Different frames, without an error or a flag."""
        return self.outcome == "differs" and not self.flagged


def inspect(store: Store, mutants: Sequence[Mutant], others: Sequence[Other] = OTHERS) -> list[Outcome]:
    """Compare what was stored of each mutant with its parent.

    Raises:
        KeyError: a mutant has no row.
        AssertionError: activations are not those of the frames.
        TubeletError: a mutant decodes otherwise than in the extraction.
    """
    rows = {row["video_id"]: row for row in store.clips().to_pylist()}
    truth = {parent: frame_digests(parent) for parent in {mutant.parent for mutant in mutants}}
    (hook,) = (hook.name for hook in store.plan.hooks)
    results = []
    stored = (m for m in mutants if rows[f"mutants/{m.path.name}"]["status"] == "ok")
    clips = _decode((m.path for m in stored), "auto")
    for mutant in mutants:
        row = rows[f"mutants/{mutant.path.name}"]
        flagged = bool(row["truncated"] or row["corrupt_frames"])
        if row["status"] != "ok":
            results.append(Outcome(mutant, row["error"].partition(":")[0], flagged))
            continue
        clip = next(clips)
        if isinstance(clip, DecodeFailure) or clip.frame_indices.tolist() != row["frame_indices"]:
            raise TubeletError(f"{mutant.path.name} decodes otherwise than in the extraction", "Run it again")
        right = _is_right(clip, truth[mutant.parent])
        parent = rows[f"sound/{mutant.parent.name}"]
        if right and parent["frame_indices"] == row["frame_indices"]:
            # The same frames: the same activations, up to the rounding of another batch.
            np.testing.assert_allclose(
                _activations(store, hook, row), _activations(store, hook, parent), rtol=1e-2, atol=1e-2
            )
        results.append(Outcome(mutant, "right" if right else "differs", flagged))
    silent = [entry for entry in results if entry.is_silent]
    for name in others:
        for entry, verdict in zip(silent, _verdicts([entry.mutant for entry in silent], name), strict=True):
            entry.elsewhere[name] = verdict
    return results


def _activations(store: Store, hook: str, row: dict[str, Any]) -> NDArray[np.float32]:
    place = row["clip"] - store.shard_range(row["shard"]).start
    return np.asarray(store.shard_map(hook, row["shard"])[place], np.float32)


def _is_right(clip: DecodedClip, truth: list[bytes]) -> bool:
    return all(
        index < len(truth) and _digest(frame) == truth[index]
        for index, frame in zip(clip.frame_indices.tolist(), clip.frames, strict=True)
    )


def _decode(paths: Iterable[Path], backend: Literal["auto"] | Other) -> Iterator[DecodedClip | DecodeFailure]:
    with DecodePool(DecodeConfig(backend=backend)) as pool:
        yield from pool.map_ordered((DecodeRequest(str(path), SAMPLING) for path in paths), 4)


def _verdicts(mutants: Sequence[Mutant], other: Other) -> Iterator[str]:
    """`silent`, `notices`, or `not for this file` where that decoder does not read the undamaged one either."""
    results = _decode((path for m in mutants for path in (m.path, m.parent)), other)
    for damaged in results:
        sound = next(results)
        if isinstance(sound, DecodeFailure) or not sound.decoder.startswith(other):
            yield "not for this file"
        elif isinstance(damaged, DecodedClip) and damaged.decoder.startswith(other):
            yield "silent"
        else:
            yield "notices"


def job(root: Path, backbone: Path, store: Path) -> dict[str, Any]:
    """The extraction of every video below `root`."""
    return {
        "dataset": {"kind": "folder", "root": str(root)},
        "sampling": SAMPLING.model_dump(mode="json"),
        "backbone": {"id": str(backbone)},
        "hooks": ["blocks.-1"],
        "store": str(store),
        "clips_per_shard": 32,
        "decode": {"processes": 1, "timeout_s": 20},
        "cluster": {"workers": 2, "threads": 1},
    }


def run_campaign(
    sound: Sequence[Path], broken: Sequence[Path], count: int, folder: Path, extract: Callable[[dict[str, Any]], None]
) -> tuple[Store, list[Mutant]]:
    """Make `count` mutants, extract them with their parents; the store and the mutants."""
    videos = folder / "videos"
    for name, files in (("sound", sound), ("broken", broken), ("mutants", ())):
        (videos / name).mkdir(parents=True)
        for path in files:
            shutil.copy(path, videos / name / path.name)
    parents = [videos / "sound" / path.name for path in sound]
    mutants = make_mutants(parents, count, videos / "mutants")
    backbone = write_tiny_videomae(folder / "tiny", image_size=32, patch_size=8, frames=8, hidden=32, layers=2)
    extract(job(videos, backbone, folder / "store.zarr"))
    return open_store(str(folder / "store.zarr")), mutants


def print_table(store: Store, results: Sequence[Outcome]) -> None:
    """Everything there is to say."""
    rows = store.clips().to_pylist()
    stored = sum(row["status"] == "ok" for row in rows)
    print(f"{len(rows)} files, one row each: {stored} stored, {len(rows) - stored} listed with their reason")
    for name in ("sound", "broken"):
        own = [row for row in rows if row["video_id"].startswith(f"{name}/")]
        codes = Counter("stored" if r["status"] == "ok" else r["error"].partition(":")[0] for r in own)
        flagged = sum(r["status"] == "ok" and bool(r["truncated"] or r["corrupt_frames"]) for r in own)
        listed = ", ".join(f"{number} {code}" for code, number in codes.most_common())
        print(f"{name:<8}{len(own):>4}: {listed}; {flagged} of the stored flagged")
    print()
    columns = ("files", "refused", "right", "right+flag", "differs+flag", "differs, no flag")
    print(f"{'mutants':<18}" + "".join(f"{column:>18}" for column in columns))
    for kind in (*KINDS, "all"):
        of_kind = [f for f in results if kind in (f.mutant.kind, "all")]
        counts = [
            len(of_kind),
            sum(f.outcome not in ("right", "differs") for f in of_kind),
            *(
                sum(f.outcome == outcome and f.flagged == flagged for f in of_kind)
                for outcome, flagged in (("right", False), ("right", True), ("differs", True), ("differs", False))
            ),
        ]
        print(f"{kind:<18}" + "".join(f"{count:>18}" for count in counts))
    refused = Counter(f.outcome for f in results if f.outcome not in ("right", "differs"))
    print("reasons of the refused: " + ", ".join(f"{n} {code}" for code, n in refused.most_common()))
    silent = [f for f in results if f.is_silent]
    print(f"\n{len(silent)} mutants decode to other pictures and no flag is raised (PyAV). Other decoders on these:")
    for name in sorted({name for f in silent for name in f.elsewhere}):
        verdicts = Counter(f.elsewhere[name] for f in silent)
        print(f"  {name:<12}" + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    everywhere = [f.mutant for f in silent if "notices" not in f.elsewhere.values()]
    print(f"Silent in every decoder that reads the undamaged file: {len(everywhere)}. Of these, by codec and damage:")
    for (codec, kind), number in sorted(Counter((_codec(m.parent), m.kind) for m in everywhere).items()):
        print(f"  {codec:<10}{kind:<18}{number:>4}")


def _codec(path: Path) -> str:
    with av.open(str(path)) as container:
        return str(container.streams.video[0].codec_context.codec.canonical_name)


def _extract_by_command(settings: dict[str, Any]) -> None:
    path = Path(settings["store"]).with_name("job.yaml")
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", "import sys; from tubelet.cli.main import main; sys.exit(main())", "extract"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise TubeletError(f"The job was lost: {done.stderr[-500:]}", "See its error")


def main() -> None:
    """Run the campaign and print its table."""
    folder = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    sound, broken = (
        [p for p in sorted((folder / name).iterdir()) if p.suffix in VIDEO_SUFFIXES] for name in ("sound", "broken")
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        store, mutants = run_campaign(sound, broken, count, Path(scratch), _extract_by_command)
        extracted_s = time.perf_counter() - began
        print_table(store, inspect(store, mutants))
        rows = store.clips().to_pylist()
    lost = len(sound) + len(broken) + count - len(rows)
    refused = sum(row["status"] != "ok" for row in rows if row["video_id"].startswith("sound/"))
    print(f"\nseed {SEED}; extraction {extracted_s:.0f} s, with the comparison {time.perf_counter() - began:.0f} s")
    goals = [
        Goal("mutations/files-without-a-row", lost, at_most=0),
        Goal("mutations/sound-files-refused", refused, at_most=0),
    ]
    print("\n".join(goal_lines(goals)))


if __name__ == "__main__":
    main()
