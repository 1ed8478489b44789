"""Verbs of the store: `tubelet info`, `tubelet verify`."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from tubelet_store.cli import Verb
from tubelet_store.config import Config

# Beyond this many, failures are for `--format json`.
_FAILURES_SHOWN = 20


class InfoConfig(Config):
    """What `tubelet info` shows."""

    store: str
    """Path or URL of the store; an unfinished one shows its committed shards."""
    format: Literal["text", "json"] = "text"
    """`json` prints everything, machine-readable."""


class VerifyConfig(Config):
    """What `tubelet verify` checks."""

    store: str
    """Path or URL of the store; of an unfinished one the committed shards are checked."""
    threads: int = Field(default=4, ge=1)
    """Objects checked at once."""


def _info(config: InfoConfig) -> int:
    from tubelet_store.reader import open_store
    from tubelet_store.summary import failed_clips, summarise

    store = open_store(config.store, allow_unfinished=True)
    summary = summarise(store)
    failures = failed_clips(store)
    if config.format == "json":
        print(json.dumps({**summary, "failures": failures}, indent=2, ensure_ascii=False))
        return 0
    for name, text in _lines(summary):
        print(f"{name:<14}{text}")
    for failure in failures[:_FAILURES_SHOWN]:
        print(f"  failed      clip {failure['clip']}  {failure['uri']}  {failure['error']}")
    if len(failures) > _FAILURES_SHOWN:
        print(f"  ... and {len(failures) - _FAILURES_SHOWN} more: --format json lists them all")
    return 0


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    from tubelet_store.summary import human_bytes

    clips, shards, grid = summary["clips"], summary["shards"], summary["grid"]
    backbone = summary["backbone"]
    lines = [
        ("store", summary["url"]),
        ("state", f"{summary['state']}, {shards['committed']} of {shards['total']} shards committed"),
        ("identity", summary["identity"] or "none before the store is complete"),
        ("data set", ", ".join(f"{k} {v}" for k, v in summary["dataset"].items() if v is not None)),
        ("clips", f"{clips['ok']} stored, {clips['failed']} failed, of {clips['planned']}; {summary['videos']} videos"),
        (
            "backbone",
            ", ".join(f"{k} {backbone[k]}" for k in ("family", "id", "revision", "precision") if backbone.get(k)),
        ),
        ("sampling", ", ".join(f"{k} {v}" for k, v in summary["sampling"].items())),
        ("grid", f"{grid['time']} time x {grid['height']} height x {grid['width']} width, {summary['dtype']}"),
        ("size", human_bytes(summary["size_bytes"])),
    ]
    return lines + [
        (
            "hook",
            f"{hook['name']}: {hook['channels']} channels, {hook['tokens']} tokens, norm {hook['norm_mean']:.3g} "
            f"(99 %: {hook['norm_99']:.3g}), largest {hook['absmax']:.3g} in channel {hook['absmax_channel']}",
        )
        for hook in summary["hooks"]
    ]


def _verify(config: VerifyConfig) -> int:
    from rich.progress import Progress

    from tubelet_store.reader import open_store
    from tubelet_store.summary import human_bytes
    from tubelet_store.verify import expected_objects, orphans, verify

    store = open_store(config.store, allow_unfinished=True)
    total_bytes = sum(stored.size_bytes for stored in expected_objects(store))
    problems = 0
    with Progress(transient=True) as progress:
        bar = progress.add_task("verifying", total=total_bytes)
        for stored, findings in verify(store, config.threads):
            progress.advance(bar, stored.size_bytes)
            for finding in findings:
                problems += 1
                progress.console.print(f"{finding.key}: {finding.problem}", soft_wrap=True, highlight=False)
    left_over = orphans(store)
    for key in left_over:
        print(f"{key}: belongs to nothing (left by a killed job, or not ours)")
    if not store.complete:
        print(
            f"{config.store} is unfinished: {len(store.committed)} of {store.plan.shards} shards committed and checked"
        )
    if problems:
        print(f"{problems} damaged objects. Copy them again from the store's source, or extract into a new store.")
        return 1
    print(f"{human_bytes(total_bytes)} verified, nothing damaged. Identity {store.identity}")
    return 0


INFO = Verb("info", "Show what a store holds and which clips failed.", lambda: InfoConfig, _info, ("store",))
VERIFY = Verb(
    "verify", "Check every byte of a store; name damaged objects and clips.", lambda: VerifyConfig, _verify, ("store",)
)
