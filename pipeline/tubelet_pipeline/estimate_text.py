"""An estimate as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from tubelet_pipeline.estimate import Estimate
from tubelet_store.store_summary import human_bytes


def estimate_lines(found: Estimate) -> Iterator[str]:
    """Lines of text."""
    timing = found.calibration
    yield f"clips       {found.clips} in {found.shards} shards of {found.clips_per_shard}"
    for hook, size in found.bytes_per_hook.items():
        yield f"            {hook}: {human_bytes(size)}"
    yield f"store       {human_bytes(found.total_bytes)} in {found.objects} objects"
    yield f"requests    {found.requests['put']} PUT, {found.requests['get']} GET (on object storage, without faults)"
    failed = f", {timing.failed} failed" if timing.failed else ""
    yield f"measured    on {timing.clips} clips{failed}, seconds per clip, each stage by itself on this machine:"
    yield f"            decode {timing.decode_s:.3f} (one process), write {timing.write_s:.3f} (one thread),"
    yield f"            forward {timing.forward_s:.3f} (one worker, {timing.forward_on})"
    workers = f"{found.workers} worker{'s' if found.workers > 1 else ''}"
    limit = "the cores they share" if found.limited_by == "cores" else f"the {found.limited_by} stage"
    yield f"time        {human_seconds(found.seconds)} with {workers} like this machine, limited by {limit}"
    yield "instead"
    for choice, size in found.alternatives.items():
        change = 100 * (size / found.total_bytes - 1)
        yield f"            {choice}: {human_bytes(size)} ({change:+.0f} %)"


def human_seconds(seconds: float) -> str:
    """`90 s`, `12 min`, `3.4 h`, `5.6 days`: the unit that keeps the figure short."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:.1f} days"
