"""What a store holds, in figures: for `tubelet info`, for reports, for other programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.compute as pc

from tubelet_store.format import array_kinds, clip_bytes, index_bytes
from tubelet_store.reader import Store


def summarize(store: Store) -> dict[str, Any]:
    """JSON-able description of `store`."""
    plan, table = store.plan, store.clips()
    failures = failed_clips(store)
    return {
        "url": store.url,
        "state": store.state.state,
        "identity": store.state.identity,
        "plan_digest": store.state.plan_digest,
        "shards": {"total": plan.shards, "committed": len(store.committed), "clips_each": plan.clips_per_shard},
        "clips": {"planned": plan.clips, "ok": table.num_rows - len(failures), "failed": len(failures)},
        "videos": pc.count_distinct(table["video_id"]).as_py(),
        "failures_by_code": dict(Counter(failure["error"].partition(":")[0] for failure in failures).most_common()),
        "size_bytes": sum(
            table.num_rows * clip_bytes(plan, kind, hook) + len(store.committed) * index_bytes(plan)
            for kind in array_kinds(plan)
            for hook in plan.hooks
        ),
        "dtype": plan.dtype,
        "grid": plan.grid.model_dump(),
        "tokens": _tokens(store),
        "views": _views(store),
        "special_tokens": list(plan.special_tokens),
        "hooks": [_hook(store, hook.name) for hook in plan.hooks],
        "dataset": plan.dataset,
        "sampling": plan.sampling,
        "preprocessing": plan.preprocessing,
        "backbone": plan.backbone,
        "provenance": store.state.provenance,
    }


def failed_clips(store: Store) -> list[dict[str, Any]]:
    """Clip number, video id, uri and error of every failed clip, in array order."""
    names = ["clip", "video_id", "uri", "status", "error"]
    table = store.clips().select(names)
    rows = table.filter(pc.equal(table["status"], "failed")).to_pylist()
    return [{k: row[k] for k in names if k != "status"} for row in rows]


def _tokens(store: Store) -> dict[str, Any]:
    """Which of the backbone's tokens are stored."""
    plan = store.plan
    if plan.tokens is None:
        return {"kind": "all", "backbone_grid": plan.grid.model_dump(), "stored": plan.grid.tokens}
    selection = plan.tokens.model_dump(exclude={"grid"}, exclude_none=True)
    whole = plan.tokens.grid
    return {**selection, "backbone_grid": whole.model_dump(), "stored": plan.grid.tokens, "of": whole.tokens}


def _views(store: Store) -> dict[str, Any]:
    """How many clips show each view of a video; a view is a stretch of time and a crop."""
    views = pc.value_counts(store.clips()["view"])
    counts = dict(zip(views.field("values").to_pylist(), views.field("counts").to_pylist(), strict=True))
    return {"number": len(counts), "clips": {str(view): count for view, count in sorted(counts.items())}}


def _hook(store: Store, name: str) -> dict[str, Any]:
    moments = store.moments(name)
    return {
        "name": name,
        "channels": store.plan.hook(name).channels,
        "tokens": moments.count,
        "norm_mean": moments.norm_mean,
        "norm_median": moments.norm_quantile(0.5),
        "norm_99": moments.norm_quantile(0.99),
        "absmax": float(moments.absmax.max(initial=0.0)),
        "absmax_channel": int(moments.absmax.argmax()),
        "nonfinite": moments.nonfinite,
    }
