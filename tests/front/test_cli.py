"""Help, examples and completion of the command line."""

from __future__ import annotations

import subprocess
from importlib.resources import files

import pytest
import yaml

from tubelet.cli.fields import fields_of
from tubelet.cli.main import main
from tubelet.cli.verb import example_of, load_verb, registered
from tubelet.config import Config, load_config, validate
from tubelet.errors import TubeletError

VERBS = sorted(registered())
WITH_EXAMPLES = ("edit", "evaluate", "extract", "gallery", "study", "train")


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_at_most_a_screen_and_names_only_fields_that_exist(capsys, verb) -> None:
    fields = fields_of(load_verb(verb).config())
    common = load_verb(verb).config().COMMON
    assert set(common) <= {field.path for field in fields}
    assert len(common) <= 14
    said = out(capsys, verb, "--help")
    assert said == out(capsys, "help", verb)
    shown = [line.split()[0] for line in said.splitlines() if line.startswith("  --") and ".…" not in line]
    assert len(set(shown)) <= 16
    for field in fields:
        if field.is_required and "." not in field.path and not field.is_section:
            assert f"--{field.path}" in shown, "a required field is not shown"


@pytest.mark.parametrize("verb", VERBS)
def test_all_options_are_listed_on_request(capsys, verb) -> None:
    said = out(capsys, verb, "--help-all").split()
    assert {f"--{field.path}" for field in fields_of(load_verb(verb).config()) if not field.is_section} <= set(said)


@pytest.mark.parametrize("columns", [50, 80, 100])
@pytest.mark.parametrize("verb", ["", "train", "extract"])
def test_help_wraps_to_the_terminal(capsys, monkeypatch, verb, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in out(capsys, *([verb, "--help-all"] if verb else [])).splitlines():
        # One word that is longer stays whole.
        assert len(line) <= columns or len(line.split()) <= 2 or line.startswith("usage:"), line


def test_every_verb_is_in_the_overview_once(capsys) -> None:
    said = out(capsys)
    assert said == out(capsys, "help") == out(capsys, "--help")
    first = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and line[2] not in " t-"]
    assert sorted(first + [v for v in VERBS if v.startswith("t")]) == VERBS


def test_help_of_no_verb_names_the_nearest(capsys) -> None:
    assert main(["help", "trian"]) == 2
    assert capsys.readouterr().err == "tubelet: error: Unknown verb 'trian'. Did you mean 'train'?\n"


@pytest.mark.parametrize("verb", WITH_EXAMPLES)
def test_examples_are_valid_configurations_with_comments(capsys, verb, tmp_path) -> None:
    text = out(capsys, verb, "--example")
    assert text == example_of(verb)
    assert text.count("#") >= 3
    path = tmp_path / "example.yaml"
    path.write_text(text)
    config = load_config(load_verb(verb).config(), path, {})
    assert config == validate(load_verb(verb).config(), yaml.safe_load(text), "example")
    assert "demo/" in text


def test_there_are_no_examples_of_other_verbs() -> None:
    for package in {entry.module.partition(".")[0] for entry in registered().values()}:
        folder = files(package) / "examples"
        names = [each.name.removesuffix(".yaml") for each in folder.iterdir()] if folder.is_dir() else []
        assert set(names) <= set(WITH_EXAMPLES)
    with pytest.raises(TubeletError, match=r"`tubelet verify` has no example"):
        example_of("verify")


def test_the_example_of_train_trains(tmp_path, monkeypatch, capsys) -> None:
    from stores import make_plan, make_store

    make_store(tmp_path / "demo/train.zarr", make_plan(clips=12, hooks={"blocks.2": 8}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text(example_of("train"))
    assert main(["train", "train.yaml", "--steps", "4", "--epochs", "null", "--device", "cpu", "--sae.k", "2"]) == 0


def test_a_list_written_with_commas_is_refused_with_its_right_form() -> None:
    class Hooks(Config):
        """Some."""

        hooks: tuple[str, ...]
        """Names."""

    with pytest.raises(TubeletError, match=r"--hooks takes a list.*Write --hooks '\[a, b\]'"):
        load_config(Hooks, None, {"hooks": "a,b"})
    assert load_config(Hooks, None, {"hooks": "[a, b]"}).hooks == ("a", "b")
    assert load_config(Hooks, None, {"hooks": "a"}).hooks == ("a",)


def test_bash_completes_verbs_options_and_values(capsys, tmp_path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(out(capsys, "completion", "bash"))
    for words, wanted in (
        (["tra"], "train"),
        (["train", "--sae.exp"], "--sae.expansion"),
        (["info", "--format", "j"], "json"),
    ):
        code = (
            f"source {script}; COMP_WORDS=(tubelet {' '.join(words)}); COMP_CWORD={len(words)}; "
            'COMP_LINE="${COMP_WORDS[*]}"; COMP_POINT=${#COMP_LINE}; '
            "$(complete -p tubelet | sed 's/.*-F \\([^ ]*\\).*/\\1/') tubelet; echo \"${COMPREPLY[*]}\""
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert wanted in done.stdout.split(), (words, done.stdout, done.stderr)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_verb(capsys, shell) -> None:
    said = out(capsys, "completion", shell)
    assert all(verb in said for verb in VERBS)
    assert "batch_tokens" in said
