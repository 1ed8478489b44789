"""The command line: one line per mistake, exit status 2, and nothing offered that cannot run here."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from importlib.metadata import EntryPoint, PackageNotFoundError

import pytest
import scripted

from stores import make_store
from tubelet import extras
from tubelet.cli import verb as registry
from tubelet.cli.arguments import parse_arguments
from tubelet.cli.main import main
from tubelet.cli.verb import Verb
from tubelet.config import Config
from tubelet.errors import TubeletError
from tubelet_store.store_writer import StoreWriter
from tubelet_store.verbs import INFO, VERIFY


class FillConfig(Config):
    """What `fill` fills."""

    store: str
    """Where to write."""
    fast: bool = False
    """Skip nothing."""


def _fill(config: FillConfig) -> int:
    scripted.write_all(config.store)
    return 0


FILL = Verb("fill", "Write the scripted store.", lambda: FillConfig, _fill, ("store",))

VERBS = (
    EntryPoint("info", "tubelet_store.verbs:INFO", "tubelet.verbs"),
    EntryPoint("fill", "test_store_cli:FILL", "tubelet.verbs"),
    EntryPoint("train", "no_such_module:TRAIN [trainer]", "tubelet.verbs"),
    EntryPoint("demo", "no_such_module:DEMO [all]", "tubelet.verbs"),
)


@pytest.fixture
def verbs(monkeypatch):
    """A machine with the store's verbs, whose trainer extra is not installed."""
    found = extras.version

    def version(name: str) -> str:
        if name == "torch":
            raise PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(registry, "entry_points", lambda group: VERBS)
    monkeypatch.setattr(extras, "version", version)


def error(capsys, *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tubelet: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "path", "overrides"),
    [
        (["s.zarr"], None, {"store": "s.zarr"}),
        (["s.zarr", "job.yaml"], "job.yaml", {"store": "s.zarr"}),
        (["--store", "s.zarr", "--threads", "2"], None, {"store": "s.zarr", "threads": "2"}),
        (["--store=s.zarr"], None, {"store": "s.zarr"}),
        (["--a.b=3", "--a.c.d=[1, 2]"], None, {"a.b": "3", "a.c.d": "[1, 2]"}),
        (["--a.b", "{x: 1}"], None, {"a.b": "{x: 1}"}),
        (["--switch"], None, {"switch": "true"}),
        (["--switch", "--other=false"], None, {"switch": "true", "other": "false"}),
        (["--two-words", "1.5"], None, {"two_words": "1.5"}),
        (["--offset", "-3"], None, {"offset": "-3"}),
        (["--text=a=b"], None, {"text": "a=b"}),
        (["--empty=null"], None, {"empty": "null"}),
        (["--odd=[1"], None, {"odd": "[1"}),
    ],
)
def test_arguments_become_overrides(arguments, path, overrides):
    found_path, found = parse_arguments(VERIFY, arguments)
    assert (str(found_path) if found_path else None, found) == (path, overrides)


@pytest.mark.parametrize("arguments", [["--threads"], ["--from", "--fresh"], ["s.zarr", "--fresh", "--from"]])
def test_an_option_that_is_no_switch_needs_its_value(arguments):
    with pytest.raises(TubeletError, match=r"--(threads|from) needs a value"):
        parse_arguments(VERIFY, arguments)


def test_an_unknown_positional_is_refused():
    with pytest.raises(TubeletError, match=r"`tubelet verify` does not take 'more'.*--help"):
        parse_arguments(VERIFY, ["s.zarr", "more"])


def test_mistakes_are_one_line(verbs, capsys):
    assert "Unknown verb 'inf'. Did you mean 'info'?" in error(capsys, "inf")
    assert "does not take 'b'" in error(capsys, "info", "a", "b")
    assert "Unknown field 'formt' in the command line. Did you mean 'format'?" in error(
        capsys, "info", "--formt", "json"
    )
    assert "Field 'store' is missing" in error(capsys, "info")
    assert "'text' or 'json'" in error(capsys, "info", "x", "--format", "xml")
    assert "No store at nowhere" in error(capsys, "info", "nowhere")


def test_a_verb_whose_extra_is_missing_is_hidden_and_named(verbs, capsys):
    assert main([]) == 0
    shown, hidden = capsys.readouterr().out.split("Not installed here:")
    assert "  info " in shown
    assert "  train" not in shown
    assert "  demo" not in shown
    lines = [line.split(maxsplit=1) for line in hidden.splitlines() if "pip" in line]
    assert ["train", "pip install 'tubelet[trainer]'"] in lines
    assert ["demo", "pip install 'tubelet[all]'"] in lines
    assert "needs torch, not installed here. Run: pip install 'tubelet[trainer]'" in error(capsys, "train")
    assert "torch" in error(capsys, "demo")


def test_help_lists_every_field_with_its_meaning(verbs, capsys):
    assert main(["info", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: tubelet info STORE" in out
    for name, field in INFO.config().model_fields.items():
        assert f"--{name}" in out
        assert field.description
        assert " ".join(field.description.split()) in " ".join(out.split())


def test_print_config_runs_nothing_and_reads_back(verbs, capsys, tmp_path):
    assert main(["fill", str(tmp_path / "s.zarr"), "--fast", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "fast: true" in printed
    assert not (tmp_path / "s.zarr").exists()
    (tmp_path / "job.yaml").write_text(printed)
    assert main(["fill", str(tmp_path / "job.yaml")]) == 0
    assert (tmp_path / "s.zarr").exists()


def test_info_as_json_is_json(verbs, capsys, tmp_path):
    store = make_store(tmp_path / "s.zarr", failed=[2])
    assert main(["info", store.url, "--format", "json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["identity"] == store.identity
    assert summary["clips"] == {"planned": 10, "ok": 9, "failed": 1}
    assert [failure["clip"] for failure in summary["failures"]] == [2]
    assert main(["info", store.url]) == 0
    assert "open_failed: broken on purpose" in capsys.readouterr().out


def test_info_of_a_store_just_begun(verbs, capsys, tmp_path):
    scripted.begin(str(tmp_path / "s.zarr"))
    assert main(["info", str(tmp_path / "s.zarr")]) == 0
    assert "0 of 3 shards committed" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line_that_names_the_file(verbs, capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert f"{tmp_path / 'file' / 's.zarr'}" in (said := error(capsys, "fill", str(tmp_path / "file" / "s.zarr")))
    assert "Check the path, its permissions" in said


def test_interruption_is_no_traceback(verbs, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "begin", interrupted)
    assert main(["fill", "s.zarr"]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for part of the scripted store; its size can be raised."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tubelet-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_work(verbs, capsys, small_disk, tmp_path):
    url = str(small_disk / "s.zarr")
    assert "No space left on the device" in error(capsys, "fill", url)
    done = set(range(3)) - set(scripted.begin(url).pending())
    assert done
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    kept = {shard: (small_disk / f"s.zarr/commits/{shard:06d}.json").stat().st_mtime_ns for shard in done}
    assert main(["fill", url]) == 0
    for shard, written in kept.items():
        assert (small_disk / f"s.zarr/commits/{shard:06d}.json").stat().st_mtime_ns == written
    scripted.write_all(str(tmp_path / "whole"))
    assert scripted.fingerprint(small_disk / "s.zarr") == scripted.fingerprint(tmp_path / "whole")


def test_any_other_failure_of_the_machine_is_not_hidden(verbs, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is dying")

    monkeypatch.setattr(StoreWriter, "begin", failing)
    with pytest.raises(OSError, match="dying"):
        main(["fill", "s.zarr"])
