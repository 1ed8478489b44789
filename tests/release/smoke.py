"""Installs every extra from the wheel into an environment that holds nothing else, and uses it as a user would.

    python tests/release/smoke.py dist/tubelet-*.whl [EXTRA ...]

`make smoke` builds the wheel and runs this. Environments are layered, so that no package is installed twice: one that
builds on another sees its packages. An environment must hold exactly what the metadata of the wheel asks for; a package
that is missing, or one that belongs to another extra, is a failure. The checks run outside of the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

REPOSITORY = Path(__file__).parents[2]
# Three shards with two hooks, written by an earlier version.
STORE = REPOSITORY / "tests" / "baseline" / "stores" / "plain"
HOOK = "blocks.1"

# Prints what is installed beyond, and what is missing of, what tubelet with these extras asks for.
CLOSURE = """
import json, re, sys
from importlib.metadata import distributions
from packaging.requirements import Requirement

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

installed = {canonical(each.metadata["Name"]): each for each in distributions()}
asked, missing, queue = set(), set(), [("tubelet", extra) for extra in ["", *sys.argv[1:]]]
while queue:
    name, extra = queue.pop()
    if (name, extra) in asked:
        continue
    asked.add((name, extra))
    if name not in installed:
        missing.add(name)
        continue
    for line in installed[name].requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            queue += [(canonical(requirement.name), each) for each in ["", *requirement.extras]]
print(json.dumps({"missing": sorted(missing), "beyond": sorted(set(installed) - {name for name, _ in asked})}))
"""


@dataclass
class Environment:
    """A virtual environment with the wheel, some of its extras, and nothing else."""

    name: str
    extras: tuple[str, ...]
    """Installed from the wheel's metadata."""
    on: tuple[str, ...]
    """Environments whose packages this one sees. They hold no package that `extras` does not ask for."""
    check: Callable[[Environment], None]
    root: Path = field(default_factory=Path)

    @property
    def folder(self) -> Path:
        """The environment's own folder."""
        return self.root / self.name

    @property
    def work(self) -> Path:
        """Folder in which the checks run."""
        folder = self.root / f"work-{self.name}"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def python(self) -> str:
        """Path of the interpreter."""
        return str(self.folder / "bin" / "python")

    def create(self, root: Path, wheel: Path) -> None:
        """Make the environment and install the wheel with its extras."""
        self.root = root
        venv.create(self.folder, symlinks=True)
        (packages,) = self.folder.glob("lib/python*/site-packages")
        below = [str(path) for name in self.on for path in (root / name).glob("lib/python*/site-packages")]
        (packages / "layers.pth").write_text("".join(f"{path}\n" for path in below))
        # First the wheel itself, which an environment below has too: the command `tubelet` belongs here.
        self._install("--no-deps", "--ignore-installed", str(wheel))
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        self._install(f"tubelet{extras} @ {wheel.as_uri()}")

    def _install(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-compile"]
        constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
        options = ["--no-warn-script-location", "--disable-pip-version-check", "--root-user-action=ignore"]
        self._succeed([*pip, *options, *constraints, *arguments], status=0, timeout_s=900)

    def run(self, *command: str, status: int = 0) -> str:
        """Output of `command` run in `work`, standard error included; its exit status must be `status`."""
        return self._succeed(command, status, timeout_s=300)

    def _succeed(self, command: Sequence[str], status: int, timeout_s: float) -> str:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(
            command, cwd=self.work, env=_clean_environment(), text=True, timeout=timeout_s, check=False, **pipes
        )
        if done.returncode != status:
            raise AssertionError(f"exit status {done.returncode}, not {status}: {' '.join(command)}\n{done.stdout}")
        return done.stdout

    def tubelet(self, *arguments: str, status: int = 0) -> str:
        """Output of the command `tubelet`."""
        return self.run(str(self.folder / "bin" / "tubelet"), *arguments, status=status)

    def execute(self, code: str, *arguments: str) -> str:
        """Output of Python code. `-I`: neither the current folder nor the user's packages are seen."""
        return self.run(self.python, "-I", "-c", code, *arguments)

    def check_packages(self) -> None:
        """What is installed is what the extras ask for."""
        difference = json.loads(self.execute(CLOSURE, *self.extras))
        assert not difference["missing"], f"{self.name}: not installed: {difference['missing']}"
        assert not difference["beyond"], f"{self.name}: installed, but required by nothing: {difference['beyond']}"

    def verbs(self) -> set[str]:
        """Verbs that the overview shows as usable."""
        return set(re.findall(r"^  ([a-z]+) ", self.tubelet().partition("Not installed here")[0], re.MULTILINE))


def _clean_environment() -> dict[str, str]:
    """The environment's variables, without what points Python or a cache at other packages or data."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TUBELET_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HF_HUB_OFFLINE": "1", "MLFLOW_ALLOW_FILE_STORE": "true", "OMP_NUM_THREADS": "1"}


def check_store(env: Environment) -> None:
    """Stores are opened, read, verified, copied; verbs of other extras say how to get them."""
    assert env.tubelet("--version").split() == ["tubelet", _version()]
    assert {"info", "verify", "catalog", "copy"} <= env.verbs()
    assert not env.verbs() & {"train", "extract", "evaluate", "demo"}
    assert "tubelet[trainer]" in env.tubelet("train", str(STORE), status=2)
    assert "24 stored, 2 failed, of 26" in env.tubelet("info", str(STORE))
    env.tubelet("copy", str(STORE), "copied.zarr")
    env.tubelet("verify", "copied.zarr")
    code = """
import sys, tubelet
assert not {"torch", "dask", "numpy"} & set(sys.modules), sorted(sys.modules)
assert "open_store" in dir(tubelet)
print(tubelet.open_store(sys.argv[1])["%s"][0].shape)
"""
    # Time, space, channels.
    shape = env.execute(code % HOOK, "copied.zarr").strip()
    assert shape == "(3, 12, 8)", shape


def check_trainer(env: Environment, *options: str) -> None:
    """An SAE is trained, loaded and used."""
    assert "train" in env.verbs()
    assert not env.verbs() & {"extract", "evaluate", "demo"}
    train = ("--steps", "6", "--sae.latents", "32", "--sae.k", "2", "--batch_tokens", "48")
    env.tubelet("train", str(STORE), "--hook", HOOK, "--out", "run", *train, "--device", "cpu", *options)
    code = """
import numpy as np, tubelet
sae = tubelet.load_sae("run")
print(tuple(sae.encode(np.zeros((2, 3, 8), np.float32)).shape))
"""
    assert env.execute(code).strip() == "(2, 3, 32)"


def check_tensorboard(env: Environment) -> None:
    """A training is tracked."""
    check_trainer(env, "--tracker.kind", "tensorboard")
    assert list(env.work.glob("run/tensorboard/events*"))


def check_wandb(env: Environment) -> None:
    """A training is tracked, without an account."""
    check_trainer(env, "--tracker.kind", "wandb", "--tracker.mode", "offline")


def check_mlflow(env: Environment) -> None:
    """A training is tracked, in a local folder (see `_clean_environment`: MLflow prefers a server)."""
    check_trainer(env, "--tracker.kind", "mlflow", "--tracker.uri", f"file:{env.work}/mlruns")


def check_lens(env: Environment) -> None:
    """A trained SAE is evaluated. Figures that need the backbone are not asked for."""
    assert {"train", "evaluate", "gallery"} <= env.verbs()
    assert not env.verbs() & {"extract", "edit", "demo"}
    train = ("--steps", "6", "--sae.latents", "32", "--sae.k", "2", "--batch_tokens", "48", "--device", "cpu")
    env.tubelet("train", str(STORE), "--hook", HOOK, "--out", "run", *train)
    env.tubelet("evaluate", "run", str(STORE), "--out", "report")
    assert list(env.work.glob("report/*.json"))
    assert list(env.work.glob("report/*.html"))


def check_pipeline(env: Environment) -> None:
    """Videos are rendered and extracted with a backbone from the wheel."""
    assert {"videos", "estimate", "extract", "train"} <= env.verbs()
    assert not env.verbs() & {"evaluate", "edit", "demo"}
    env.tubelet("videos", "videos", "--videos", "8")
    dataset = ("--dataset.kind", "ssv2", "--dataset.root", "videos", "--dataset.split", "train")
    sampling = ("--sampling.kind", "dense", "--sampling.frames", "16", "--sampling.stride", "3")
    backbone = ("--backbone.id", "videomae-tiny", "--hooks", '["blocks.2"]', "--cluster.workers", "1")
    env.tubelet("extract", *dataset, *sampling, *backbone, "--store", "extracted.zarr", "--clips_per_shard", "4")
    assert "complete" in env.tubelet("info", "extracted.zarr")


def check_all(env: Environment) -> None:
    """The whole way, from rendered videos to a gallery."""
    assert {"info", "extract", "train", "evaluate", "gallery", "study", "edit", "demo"} <= env.verbs()
    assert "Not installed here" not in env.tubelet()
    env.tubelet("demo", "--out", "demo", "--videos", "32", "--epochs", "1")
    assert list(env.work.glob("demo/**/*.html"))


def imports(*names: str) -> Callable[[Environment], None]:
    """A check that modules can be imported."""

    def check(env: Environment) -> None:
        env.execute("import " + ", ".join(names))

    return check


TORCH = ("store", "trainer")
PIPELINE = ("store", "s3", "trainer", "pipeline")
# In the order of installation.
ENVIRONMENTS = (
    Environment("store", (), (), check_store),
    Environment("s3", ("s3",), ("store",), imports("s3fs", "tubelet_store.storage.s3")),
    Environment("obstore", ("obstore",), ("store", "s3"), imports("tubelet_store.storage.obstore_client")),
    Environment("trainer", ("trainer",), ("store",), check_trainer),
    Environment("tensorboard", ("trainer", "tensorboard"), TORCH, check_tensorboard),
    Environment("wandb", ("trainer", "wandb"), TORCH, check_wandb),
    Environment("mlflow", ("trainer", "mlflow"), TORCH, check_mlflow),
    Environment("lens", ("lens",), TORCH, check_lens),
    Environment("pipeline", ("pipeline",), ("store", "s3", "trainer"), check_pipeline),
    Environment("torchcodec", ("pipeline", "torchcodec"), PIPELINE, imports("torch")),
    Environment("jobqueue", ("jobqueue",), PIPELINE, imports("dask_jobqueue", "tubelet_pipeline.cluster")),
    Environment("kubernetes", ("kubernetes",), PIPELINE, imports("dask_kubernetes", "tubelet_pipeline.cluster")),
    # Not on the lens, whose packages were chosen without those of the pipeline.
    Environment("all", ("all",), (*PIPELINE, "obstore"), check_all),
)


def _version() -> str:
    (version,) = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    return version


def check_wheel(wheel: Path) -> None:
    """The wheel holds the packages with all their data, and nothing that is not the product."""
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set(_product_files())
    info = f"tubelet-{_version()}.dist-info/"
    extra = {name for name in names - expected if not name.startswith(info)}
    assert not expected - names, f"not in the wheel: {sorted(expected - names)}"
    assert not extra, f"in the wheel, but no file of a product package: {sorted(extra)}"


def _product_files() -> Iterator[str]:
    """Files that git tracks below the five packages, as the wheel names them."""
    roots = ("", "store/", "pipeline/", "trainer/", "lens/")
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for path in tracked.splitlines():
        for root in roots:
            if path.startswith(f"{root}tubelet") and (REPOSITORY / path).is_file():
                yield path.removeprefix(root)


def main() -> int:
    """Check the wheel, then each environment; the exit status is 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("names", nargs="*", metavar="EXTRA", help="environments to check; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the environments here and keep them")
    options = parser.parse_args()
    check_wheel(options.wheel)
    wanted = set(options.names or [env.name for env in ENVIRONMENTS])
    needed = wanted | {name for env in ENVIRONMENTS if env.name in wanted for name in env.on}
    environments = [env for env in ENVIRONMENTS if env.name in needed]
    with tempfile.TemporaryDirectory(prefix="tubelet-smoke-") as folder, ThreadPoolExecutor(2) as threads:
        root = (options.keep or Path(folder)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        created = {env.name: Event() for env in environments}

        def smoke(env: Environment) -> bool:
            # Environments below come earlier in the list: a thread is at work on each of them, or was.
            for name in env.on:
                created[name].wait()
            started = installed = time.monotonic()
            try:
                env.create(root, options.wheel.resolve())
                installed = time.monotonic()
                created[env.name].set()
                if env.name in wanted:
                    env.check_packages()
                    env.check(env)
                outcome = "ok"
            except Exception:
                outcome = "FAILED\n" + traceback.format_exc(limit=-2)
            finally:
                created[env.name].set()
            seconds = f"installed in {installed - started:5.1f} s, checked in {time.monotonic() - installed:5.1f} s"
            print(f"{env.name:<12} {seconds}  {outcome}", flush=True)
            return outcome == "ok"

        passed = list(threads.map(smoke, environments))
    print(f"{sum(passed)} of {len(passed)} environments passed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
