"""The verb `tubelet edit`. Heavy imports wait until it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tubelet.cli.verb import Verb

if TYPE_CHECKING:
    from tubelet_lens.steering.config import EditConfig
    from tubelet_lens.steering.edit_report import ClipEffect

_CLASSES_PRINTED = 3


def _config() -> type[EditConfig]:
    from tubelet_lens.steering.config import EditConfig

    return EditConfig


def _run(config: EditConfig) -> int:
    from tubelet_lens.steering.edit import edit

    report = edit(config)
    for clip in report.clips:
        print("\n".join(_lines(clip)))
    print(report.write(config.report_folder))
    return 0


def _lines(clip: ClipEffect) -> list[str]:
    lines = [f"{clip.name}: {clip.changed_tokens} of {clip.tokens} tokens changed, by {clip.step:.1%} of their length"]
    if clip.top_before is not None:
        lines.append(f"  most probable class: {clip.top_before} -> {clip.top_after}")
    rows = [("logit of " + each.name, each.logit_change) for each in clip.classes[:_CLASSES_PRINTED]]
    rows += [("change at " + each.hook, each.change) for each in clip.hooks]
    width = max(len(name) for name, _ in rows)
    lines.append(f"  {'':<{width}}{'edit':>10}{'other latents':>26}{'random directions':>26}")
    for name, compared in rows:
        controls = (
            "—" if each is None else f"{each.mean:.3f} ({each.low:.3f} … {each.high:.3f})"
            for each in (compared.matched, compared.random)
        )
        lines.append(f"  {name:<{width}}{compared.edit:>10.3f}" + "".join(f"{text:>26}" for text in controls))
    return lines


EDIT = Verb(
    "edit",
    "Change latents in the running backbone on some clips; see what changes after them.",
    _config,
    _run,
    positionals=("run", "store", "videos..."),
)
