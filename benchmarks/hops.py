"""How many product functions lie between a verb and what it is there for, and how large the product is.

    python benchmarks/hops.py --title after [--out benchmarks/results/hops.txt]

Five tiny runs in this process (videos are rendered, their activations extracted with the demo's backbone, an SAE is
trained on them, evaluated, and used for an edit), each through the installed command's own function. At each event
below the call stack is read. A hop is a frame of a product function: its file is in a package of this repository
whose name starts with `tubelet`. Comprehensions, lambdas and frames of other libraries in between do not count; a
generator does. Of the stacks of a way the deepest one counts, the first of these if several are as deep. A way ends in

    evaluate    a metric's update: a method METRIC_UPDATES of the lens (of one inside another: the inner one)
    edit        the innermost function of the lens below a forward hook of the running backbone
    train       the function that has an optimizer's kernel (OPTIMIZER_KERNELS), or a torch.optim class, change weights
    extract     the function that gives a shard object its name in the store. A function handed to another thread, or to
                a Dask worker, continues the stack of the function that handed it over; the worker is a thread here
    open        two calls, added up: `open_store(path)` to the innermost opening of a document of the store, and
                `store[hook][0]` to the opening of the first shard object

Ways of a verb begin at the verb's own function. Frames of the command line before it are counted separately.
Sizes are of the Python files of the product packages; code lines are without docstrings, comments and blank lines.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import contextvars
import functools
import io
import os
import pkgutil
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
import yaml
from distributed import Client, LocalCluster
from torch.optim.optimizer import register_optimizer_step_pre_hook

from goals import Goal, goal_lines

# What a restructured product may name differently, apart from the verbs' fields in the settings below.
COMMAND = "tubelet"
COMMAND_LINE = re.compile(r"\.cli(\.|$)")
OPEN_STORE = ("tubelet:open_store", "tubelet_store:open_store")
LENS = re.compile(r"^tubelet_lens\b")
METRIC_UPDATES = ("add", "update")
OPTIMIZER_KERNELS = ("_fused_adam_", "_fused_adamw_")
SHARD_OBJECT = re.compile(r"/c/\d+(/\d+)+$")
HOOK = "blocks.2"
BACKBONE = "videomae-tiny"
SIZES = {"videos": 32, "steps": 8, "clips_per_shard": 8}

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "hops.txt"
NOT_COUNTED = ("<lambda>", "<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<module>")
NOT_PYTHON = (".html", ".css", ".js")
SHORT_FILE = 60
# Title of the section that has the hops before the restructuring, and the ways that it was to cut by half.
BEFORE = "before"
HALVED = ("train", "evaluate", "edit")
TASK = "in a Dask task"
WRITING = ("w", "x", "a", "+")


def product_packages() -> list[Path]:
    """Folders of the import packages of this repository, top level first."""
    folders = [
        init.parent for pattern in ("tubelet*/__init__.py", "*/tubelet*/__init__.py") for init in ROOT.glob(pattern)
    ]
    return sorted(folder for folder in folders if not any(other in folder.parents for other in folders))


@dataclass(frozen=True)
class Hop:
    """A product function on the stack."""

    module: str
    function: str
    across: str = ""
    """Where it runs, if not directly under the hop before: another thread, a Dask task, the user's next call."""

    def __str__(self) -> str:
        return f"{self.module}:{self.function}" + (f"   ({self.across})" if self.across else "")


Chain = tuple[Hop, ...]

_PACKAGES = tuple(f"{folder}/" for folder in product_packages())
_inherited: contextvars.ContextVar[Chain] = contextvars.ContextVar("inherited", default=())
"""The stack of the code that handed this thread its work."""
_dask_tasks: dict[CodeType, Chain] = {}
"""The stack of the code that handed this function to Dask."""


@functools.cache
def counts(code: CodeType) -> bool:
    """Whether a frame of `code` is a hop."""
    file = code.co_filename
    return file.startswith(_PACKAGES) and file.endswith(".py") and code.co_name not in NOT_COUNTED


def stack(frame: FrameType | None) -> Chain:
    """Product functions from the outermost to the one that runs in `frame` or called it, over threads and tasks."""
    frames = []
    while frame is not None:
        if counts(frame.f_code):
            frames.append(frame)
        frame = frame.f_back
    own = tuple(Hop(f.f_globals["__name__"], f.f_code.co_qualname) for f in reversed(frames))
    if not own:
        return _inherited.get()
    before, across = _inherited.get(), "on another thread"
    if not before:
        before, across = _dask_tasks.get(frames[-1].f_code, ()), TASK
    return (*before, replace(own[0], across=across), *own[1:]) if before else own


@dataclass
class Recorder:
    """The deepest stack at the events of a way."""

    chain: Chain = ()

    def take(self, chain: Chain) -> None:
        """Keep `chain` if none was as deep."""
        if len(chain) > len(self.chain):
            self.chain = chain


@contextlib.contextmanager
def handing_over() -> Iterator[None]:
    """Within the block, work given to threads and to Dask remembers the stack of who gave it."""
    submit, start, to_dask = ThreadPoolExecutor.submit, threading.Thread.start, Client.submit

    def carried(function: Callable[..., Any]) -> Callable[..., Any]:
        chain = stack(sys._getframe(2))

        def run(*args: Any, **kwargs: Any) -> Any:
            token = _inherited.set(chain)
            try:
                return function(*args, **kwargs)
            finally:
                _inherited.reset(token)

        return run

    def pool_submit(pool: ThreadPoolExecutor, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(pool, carried(function), *args, **kwargs)

    def thread_start(thread: threading.Thread) -> None:
        thread.run = carried(thread.run)  # type: ignore[method-assign]
        start(thread)

    def dask_submit(client: Client, function: Any, *args: Any, **kwargs: Any) -> Any:
        if (code := getattr(getattr(function, "func", function), "__code__", None)) is not None:
            _dask_tasks[code] = stack(sys._getframe(1))
        return to_dask(client, function, *args, **kwargs)

    with (
        mock.patch.object(ThreadPoolExecutor, "submit", pool_submit),
        mock.patch.object(threading.Thread, "start", thread_start),
        mock.patch.object(Client, "submit", dask_submit),
    ):
        yield


@contextlib.contextmanager
def profiling(called: Callable[[FrameType], None]) -> Iterator[None]:
    """Within the block, `called` sees the frame of every product function that is called, in any thread."""

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and counts(frame.f_code):
            called(frame)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


_on_file: list[Callable[[str, bool, FrameType], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _on_file or event not in ("open", "os.rename", "os.link"):
        return
    renamed = event != "open"
    path = arguments[1] if renamed else arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return
    written = renamed or any(letter in WRITING for letter in arguments[1] or "")
    for taken in _on_file:
        taken(os.fsdecode(path), written, sys._getframe(1))


sys.addaudithook(_audit)


@contextlib.contextmanager
def watching_files(taken: Callable[[str, bool, FrameType], None]) -> Iterator[None]:
    """Within the block, `taken` sees each file that is opened or renamed: path, whether written, frame."""
    _on_file.append(taken)
    try:
        yield
    finally:
        _on_file.remove(taken)


def named(names: Sequence[str]) -> Any:
    """The first of `names` ("module:object") that there is.

    Raises:
        RuntimeError: there is none.
    """
    for name in names:
        with contextlib.suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(name)
    raise RuntimeError(f"none of {', '.join(names)} is there: look at the names at the top of this script")


def command(*arguments: str) -> None:
    """Run the installed command in this process, silently.

    Raises:
        RuntimeError: it failed.
    """
    (script,) = entry_points(group="console_scripts", name=COMMAND)
    output, argv = io.StringIO(), sys.argv
    sys.argv = [COMMAND, *arguments]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = script.load()()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    if status:
        raise RuntimeError(f"`tubelet {' '.join(arguments)}` ended with status {status}:\n{output.getvalue()}")


def verb(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Run a verb with `settings` as its YAML file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    command(name, str(path))


def extract(folder: Path) -> Chain:
    """Make `folder`/s.zarr; the way to a shard's name."""
    recorder = Recorder()

    def taken(path: str, written: bool, frame: FrameType) -> None:
        if written and SHARD_OBJECT.search(path):
            recorder.take(stack(frame))

    command("videos", str(folder / "videos"), "--videos", str(SIZES["videos"]), "--frames", "16", "--workers", "1")
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with LocalCluster(dashboard_address=None, **options) as cluster, handing_over(), watching_files(taken):
        settings = {
            "dataset": {"kind": "ssv2", "root": str(folder / "videos"), "split": "train"},
            "sampling": {"kind": "dense", "frames": 16, "stride": 1},
            "backbone": {"id": BACKBONE},
            "hooks": [HOOK],
            "store": str(folder / "s.zarr"),
            "clips_per_shard": SIZES["clips_per_shard"],
            "decode": {"processes": 1},
            "scheduler": cluster.scheduler_address,
        }
        verb(folder, "extract", settings)
    if not any(hop.across == TASK for hop in recorder.chain):
        raise RuntimeError("no shard was written by a task that came through Client.submit: look at `handing_over`")
    return recorder.chain


def open_a_store(folder: Path) -> Chain:
    """The way to the first array of `folder`/s.zarr."""
    documents, shards = Recorder(), Recorder()

    def taken(path: str, written: bool, frame: FrameType) -> None:
        if not written and "s.zarr" in path:
            (shards if SHARD_OBJECT.search(path) else documents).take(stack(frame))

    with watching_files(taken):
        store = named(OPEN_STORE)(str(folder / "s.zarr"))
        opening = documents.chain
        store[HOOK][0]
    return (*opening, replace(shards.chain[0], across="in the next call"), *shards.chain[1:])


def train(folder: Path) -> Chain:
    """Train `folder`/run; the way to the optimizer."""
    recorder = Recorder()

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            recorder.take(stack(sys._getframe(1)))
            return function(*args, **kwargs)

        return call

    settings = {
        "store": str(folder / "s.zarr"),
        "out": str(folder / "run"),
        "steps": SIZES["steps"],
        "batch_tokens": 512,
        "holdout": {"fraction": 0.5},
        "sae": {"kind": "topk", "latents": 256, "k": 8},
        "device": "cpu",
    }
    with contextlib.ExitStack() as patched:
        for name in OPTIMIZER_KERNELS:
            patched.enter_context(mock.patch.object(torch, name, noted(getattr(torch, name))))
        handle = register_optimizer_step_pre_hook(lambda *_: recorder.take(stack(sys._getframe(1))))
        patched.callback(handle.remove)
        verb(folder, "train", settings)
    return recorder.chain


def evaluate(folder: Path) -> Chain:
    """Evaluate `folder`/run; the way to a metric's update."""
    recorder = Recorder()

    def called(frame: FrameType) -> None:
        if frame.f_code.co_name in METRIC_UPDATES and LENS.match(frame.f_globals["__name__"]):
            recorder.take(stack(frame))

    with profiling(called):
        verb(folder, "evaluate", {"run": str(folder / "run"), "store": str(folder / "s.zarr"), "device": "cpu"})
    return recorder.chain


def below_a_forward_hook(frame: FrameType | None) -> bool:
    """Whether torch called one of the product functions on the stack after or before a module's forward pass."""
    torch_modules = torch.nn.modules.module.__file__
    while frame is not None:
        calling = frame.f_back
        called_by_torch = calling is not None and calling.f_code.co_filename == torch_modules
        if called_by_torch and counts(frame.f_code) and frame.f_code.co_name != "forward":
            return True
        frame = calling
    return False


def edit(folder: Path) -> Chain:
    """Edit a clip with `folder`/run; the way to the changed activations."""
    recorder = Recorder()

    def called(frame: FrameType) -> None:
        if LENS.match(frame.f_globals["__name__"]) and below_a_forward_hook(frame):
            recorder.take(stack(frame))

    settings = {
        "run": str(folder / "run"),
        "store": str(folder / "s.zarr"),
        "clips": [0],
        "latent": 0,
        "operation": {"kind": "set", "value": 1.0},
        "controls": 1,
        "device": "cpu",
    }
    with profiling(called):
        verb(folder, "edit", settings)
    return recorder.chain


WAYS: dict[str, Callable[[Path], Chain]] = {
    "extract": extract,
    "open a store": open_a_store,
    "train": train,
    "evaluate": evaluate,
    "edit": edit,
}
"""In this order: each leaves what the next ones need."""


def run_ways() -> dict[str, Chain]:
    """The deepest stack of each way."""
    with tempfile.TemporaryDirectory() as name:
        return {way: run(Path(name)) for way, run in WAYS.items()}


def ways(chains: dict[str, Chain]) -> Iterator[str]:
    """Lines of the table of hops, then each way."""
    yield f"{'way':<14}{'hops':>6}{'files':>7}{'with the command line':>23}"
    parts = {}
    for way, chain in chains.items():
        if not chain:
            raise RuntimeError(f"'{way}' never came to its end: look at the names at the top of this script")
        first = next(place for place, hop in enumerate(chain) if not COMMAND_LINE.search(hop.module))
        parts[way] = chain[first:]
        yield f"{way:<14}{len(chain) - first:>6}{len({hop.module for hop in chain[first:]}):>7}{len(chain):>23}"
    for way, chain in parts.items():
        yield ""
        yield f"{way}:"
        yield from (f"{number:>4}  {hop}" for number, hop in enumerate(chain, 1))


def goals(chains: dict[str, Chain]) -> Iterator[Goal]:
    """Half of the hops that RESULTS has under the title BEFORE, for the ways HALVED."""
    before = RESULTS.read_text().partition(f"## {BEFORE} (")[2].partition("\n## ")[0]
    for way in HALVED:
        hops = sum(not COMMAND_LINE.search(hop.module) for hop in chains[way])
        matched = re.search(rf"^{way} +(\d+)", before, re.MULTILINE)
        if matched is not None:
            yield Goal(f"hops/{way}", hops, at_most=int(matched[1]) / 2)


@dataclass
class Size:
    """Of some Python files."""

    lines: list[int] = field(default_factory=list)
    code: int = 0

    def add(self, path: Path) -> None:
        """Count a file."""
        source = path.read_text(encoding="utf-8")
        self.lines.append(len(source.splitlines()))
        self.code += code_lines(source)

    def __str__(self) -> str:
        short = sum(n < SHORT_FILE for n in self.lines)
        median = statistics.median(self.lines)
        return f"{len(self.lines):>7}{sum(self.lines):>9,}{self.code:>12,}{median:>16g}{short:>10}"


def code_lines(source: str) -> int:
    """Lines that hold something other than a docstring, a comment or nothing."""
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in empty
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        # A docstring, or the text below an attribute that documents it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(code)


def sizes() -> Iterator[str]:
    """Lines of the table of sizes, and the file names that recur."""
    everything, names = Size(), Counter[str]()
    short = f"under {SHORT_FILE}"
    yield f"{'package':<20}{'files':>7}{'lines':>9}{'code lines':>12}{'median length':>16}{short:>10}"
    for package in product_packages():
        size, files = Size(), sorted(package.rglob("*.py"))
        for path in files:
            size.add(path)
            everything.add(path)
        names.update(path.name for path in files if path.name != "__init__.py")
        yield f"{package.name:<20}{size}"
    yield f"{'all':<20}{everything}"
    other = [path for package in product_packages() for path in package.rglob("*") if path.suffix in NOT_PYTHON]
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in other)
    yield f"{'HTML, CSS, JS':<20}{len(other):>7}{lines:>9,}"
    recurring = {name: count for name, count in names.most_common() if count > 1}
    listed = ", ".join(
        f"{name} {count}" for name, count in sorted(recurring.items(), key=lambda each: (-each[1], each[0]))
    )
    yield f"file names that recur (without __init__.py): {len(recurring)}" + (f": {listed}" if listed else "")


def commit() -> str:
    """The commit that is measured."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", *map(str, product_packages()))
    return git("rev-parse", "--short=12", "HEAD") + (" with uncommitted changes" if changed else "")


def write(out: Path, title: str, lines: Iterable[str]) -> None:
    """Put the section `title` at the end of `out`, or in the place of an earlier one of that title."""
    before = out.read_text().split("\n## ") if out.exists() else []
    sections = [text.removeprefix("## ").rstrip("\n") for text in before if text.strip()]
    new = "\n".join([title, *lines])
    places = [place for place, text in enumerate(sections) if text.partition(" (")[0] == title.partition(" (")[0]]
    if places:
        sections[places[0]] = new
    else:
        sections.append(new)
    out.write_text("\n\n".join(f"## {text}" for text in sections) + "\n")


def main() -> None:
    """Print both tables, and keep them under a title."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--title", help="heading under which the tables are added to the file; none: print only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chains = run_ways()
    lines = [*sizes(), "", *ways(chains)]
    print("\n".join([*lines, *goal_lines(goals(chains))]))
    if arguments.title:
        write(arguments.out, f"{arguments.title} (commit {commit()})", lines)


if __name__ == "__main__":
    main()
