"""The words after a verb: a YAML file, positionals, and `--field value` overrides.

Why not a library: pydantic-settings' `CliApp` (2.16) was tried on `TrainConfig`. It adds 0.17 s to every start and does
not read `--resume false` or `--sweep '{sae.k: [16, 32]}'` (flags and JSON only); positionals need its types inside the
packages' models; and the nearest names, the error of one line and the help by kinds would still be own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tubelet.cli.verb import Verb
from tubelet.errors import TubeletError


def parse_arguments(verb: Verb[Any], arguments: list[str]) -> tuple[Path | None, dict[str, str]]:
    """Split `arguments` into the YAML file (if any) and the overriding texts by dotted field name.

    Raises:
        TubeletError: too many positionals, or an option without a value.
    """
    from tubelet.cli.fields import fields_of

    path: Path | None = None
    overrides: dict[str, str] = {}
    free = list(verb.positionals)
    queue = list(arguments)
    rest: list[str] = []
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            field, equals, text = word[2:].partition("=")
            field = field.replace("-", "_")
            if not equals and queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            elif not equals:
                if any(each.path == field and not each.is_switch for each in fields_of(verb.config())):
                    raise TubeletError(f"--{field} needs a value", f"Write --{field} VALUE")
                # A bare option is a switch: `--json` means `--json true`.
                text = "true"
            overrides[field] = text
        elif verb.settings_file and word.endswith((".yaml", ".yml", ".json")) and path is None and "#" not in word:
            path = Path(word)
        elif free and free[0].endswith("..."):
            rest.append(word)
        elif free:
            overrides[free.pop(0)] = word
        else:
            raise TubeletError(f"`tubelet {verb.name}` does not take '{word}'", f"See `tubelet {verb.name} --help`")
    if rest:
        overrides[free[0].removesuffix("...")] = json.dumps(rest, ensure_ascii=False)
    return path, overrides
