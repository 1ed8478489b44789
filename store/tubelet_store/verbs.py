"""Verbs that look at a store or fetch it: `tubelet info`, `verify`, `cache`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tubelet.cli.verb import Verb
from tubelet.config import Config

if TYPE_CHECKING:
    from tubelet_store.cache.fill import FillConfig

# The formula's text is for `--format json`.
_SAMPLING = ("kind", "frames", "stride", "clips")
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
    source: str | None = Field(default=None, alias="from")
    """Path or URL of another copy, from which damaged or missing objects are replaced, verified."""
    threads: int = Field(default=4, ge=1)
    """Objects checked at once."""
    fresh: bool = False
    """Ignore the progress of an interrupted run and check every object again."""


def _info(config: InfoConfig) -> int:
    from tubelet_store.reader import open_store
    from tubelet_store.store_summary import failed_clips, summarize

    store = open_store(config.store, allow_unfinished=True)
    summary = summarize(store)
    failures = failed_clips(store)
    if config.format == "json":
        print(json.dumps({**summary, "failures": failures}, indent=2, ensure_ascii=False))
        return 0
    for name, text in _lines(summary):
        print(f"{name:<14}{text}")
    # A video whose clips all failed for one reason takes one line.
    clips_by_cause: dict[tuple[str, str], list[int]] = {}
    for failure in failures:
        clips_by_cause.setdefault((failure["uri"], failure["error"]), []).append(failure["clip"])
    for (uri, error), clips in list(clips_by_cause.items())[:_FAILURES_SHOWN]:
        more = f" and {len(clips) - 1} more" if len(clips) > 1 else ""
        print(f"  failed      clip {clips[0]}{more}  {uri}  {error}")
    if len(clips_by_cause) > _FAILURES_SHOWN:
        print(f"  ... and {len(clips_by_cause) - _FAILURES_SHOWN} more: --format json lists them all")
    return 0


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    from tubelet.formats import human_bytes

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
        ("sampling", ", ".join(f"{k} {summary['sampling'][k]}" for k in _SAMPLING if k in summary["sampling"])),
        ("grid", f"{grid['time']} time x {grid['height']} height x {grid['width']} width, {summary['dtype']}"),
        ("tokens", _tokens_line(summary["tokens"], grid)),
        ("views", _views_line(summary["views"])),
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


def _tokens_line(tokens: dict[str, Any], stored: dict[str, int]) -> str:
    whole = tokens["backbone_grid"]
    if tokens["kind"] == "all":
        return f"all {tokens['stored']} of the backbone's grid"
    if tokens["kind"] == "patches":
        return (
            f"{stored['width']} of {whole['height'] * whole['width']} patches, drawn for each clip (seed"
            f" {tokens.get('seed')}), at every time step"
        )
    sizes = [f"{w // s}" for w, s in zip(whole.values(), stored.values(), strict=True)]
    return (
        f"averages over {' x '.join(sizes)} (time x height x width) of the backbone's grid"
        f" {' x '.join(map(str, whole.values()))}"
    )


def _views_line(views: dict[str, Any]) -> str:
    if views["number"] <= 1:
        return "one per video"
    counts = sorted(set(views["clips"].values()))
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{views['number']} per video, {each} clips each"


def _verify(config: VerifyConfig) -> int:
    from tubelet.errors import TubeletError
    from tubelet.formats import human_bytes
    from tubelet.progress import Progress
    from tubelet_store.orphans import orphan_keys
    from tubelet_store.reader import open_store
    from tubelet_store.verify import Repair, VerifiedObjects, expected_objects, verify

    store = open_store(config.store, allow_unfinished=True)
    repair = Repair(store, open_store(config.source)) if config.source is not None else None
    problems = 0
    try:
        expected_objects(store)
    except TubeletError as error:
        if repair is None or not store.complete:
            raise
        print(f"{error.problem}: replaced")
        problems += 1
        repair.manifest()
        store = open_store(config.store)
    total_bytes = sum(stored.size_bytes for stored in expected_objects(store))
    verified = VerifiedObjects(store, config.fresh)
    if len(verified):
        print(f"{len(verified)} objects were verified by a run that was interrupted {verified.age_s / 60:.0f} min ago.")
    with Progress("verifying", total_bytes, "bytes") as progress:
        for stored, findings in verify(store, config.threads, verified.__contains__):
            progress.advance(stored.size_bytes)
            if not findings and stored not in verified:
                verified.add(stored)
            for finding in findings:
                problems += 1
                if repair is not None:
                    repair.replace(finding, stored)
                done = "" if repair is None else ": replaced"
                print(f"{finding.key}: {finding.problem}{done}")
    verified.clear()
    for key in orphan_keys(store):
        print(f"{key}: orphan (left by a killed job, or written by another program); see `tubelet gc`")
    if not store.complete:
        print(
            f"{config.store} is unfinished: {len(store.committed)} of {store.plan.shards} shards committed and checked"
        )
    if problems and repair is None:
        print(f"{problems} damaged objects. Repair them with `--from ANOTHER_COPY`, or extract into a new store.")
        return 1
    result = f"{problems} objects replaced from {config.source}" if problems else "nothing damaged"
    print(f"{human_bytes(total_bytes)} verified, {result}. Identity {store.identity}")
    return 0


def _fill_config() -> type[FillConfig]:
    from tubelet_store.cache.fill import FillConfig

    return FillConfig


def _cache(config: FillConfig) -> int:
    from tubelet.formats import human_bytes
    from tubelet.progress import Progress
    from tubelet_store.cache import CacheConfig
    from tubelet_store.cache.fill import fill, wanted_shards
    from tubelet_store.reader import open_store

    settings = {name: getattr(config, name) for name in CacheConfig.model_fields}
    store = open_store(config.store, allow_unfinished=True, cache=CacheConfig.model_validate(settings))
    wanted = wanted_shards(store, config.hooks)
    count = size_bytes = 0
    with Progress("fetching", sum(each.stored.size_bytes for each in wanted), "bytes") as progress:
        for each in fill(store, wanted):
            count, size_bytes = count + 1, size_bytes + each.stored.size_bytes
            progress.advance(each.stored.size_bytes)
    print(f"{count} of {len(wanted)} shard objects, {human_bytes(size_bytes)}, verified in {config.folder}")
    if count < len(wanted):
        missing = sum(each.stored.size_bytes for each in wanted) - size_bytes
        print(f"The budget of {human_bytes(config.budget)} is reached: {human_bytes(missing)} more are wanted.")
    return 0


INFO = Verb("info", "Show what a store holds and which clips failed.", lambda: InfoConfig, _info, ("store",))
VERIFY = Verb(
    "verify", "Check every byte of a store; name damaged objects and clips.", lambda: VerifyConfig, _verify, ("store",)
)
CACHE = Verb("cache", "Fetch a remote store's shards to this machine ahead of a job.", _fill_config, _cache, ("store",))
