"""Data card of a store in Markdown, and its Croissant file for search engines and hubs.

Both are generated from the store alone.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tubelet.formats import human_bytes
from tubelet_store.object_keys import CLIPS, MANIFEST
from tubelet_store.reader import Store
from tubelet_store.store_summary import failed_clips, summarize

CARD, CROISSANT = "README.md", "croissant.json"

_FAILURES_SHOWN = 10


def write_card(store: Store, folder: Path, license: str | None = None, name: str | None = None) -> list[Path]:
    """Write the data card and the Croissant file of `store` into `folder`; gives their paths.

    Args:
        store: A complete store.
        folder: Made if it does not exist.
        license: License of the activations.
        name: Title; default: the store's name.
    """
    title = name or store.url.rstrip("/").rpartition("/")[2].removesuffix(".zarr")
    folder.mkdir(parents=True, exist_ok=True)
    card, croissant = folder / CARD, folder / CROISSANT
    card.write_text(markdown(store, title, license))
    croissant.write_text(json.dumps(croissant_document(store, title, license), indent=2, ensure_ascii=False) + "\n")
    return [card, croissant]


def markdown(store: Store, title: str, license: str | None) -> str:
    """The data card."""
    summary, failures = summarize(store), failed_clips(store)
    clips, grid = summary["clips"], summary["grid"]
    hooks = "\n".join(
        f"| `{h['name']}` | {h['channels']} | {h['tokens']:,} | {h['norm_mean']:.4g} | {h['norm_99']:.4g} | "
        f"{h['absmax']:.4g} (channel {h['absmax_channel']}) | {h['nonfinite']} |"
        for h in summary["hooks"]
    )
    codes = Counter(failure["error"].partition(":")[0] for failure in failures)
    listed = "\n".join(f"- clip {f['clip']} (`{f['uri']}`): {f['error']}" for f in failures[:_FAILURES_SHOWN])
    more = f"\n- and {len(failures) - _FAILURES_SHOWN} more" if len(failures) > _FAILURES_SHOWN else ""
    known = (
        f"{len(failures)} {'clip' if len(failures) == 1 else 'clips'} failed "
        f"({', '.join(f'{n} {code}' for code, n in codes.most_common())}). Failed clips keep their place "
        f"and hold NaN.\n\n{listed}{more}"
        if failures
        else "None: every clip is stored."
    )
    first = summary["hooks"][0]["name"]
    made = {
        "backbone": summary["backbone"],
        "sampling": summary["sampling"],
        "preprocessing": summary["preprocessing"],
        "dataset": summary["dataset"],
    }
    return f"""# {title}

Activations of a frozen video backbone: {clips["ok"]:,} clips of {summary["videos"]:,} videos, one vector per token, in
a [Tubelet](https://pypi.org/project/tubelet/) store (Zarr v3, memory-mappable).

- Identity: `{summary["identity"]}`
- License: {license or "not stated; the licenses of the videos and of the backbone apply"}
- Size: {human_bytes(summary["size_bytes"])}, {summary["dtype"]}
- Token grid: {grid["time"]} time x {grid["height"]} height x {grid["width"]} width per clip

## Load it

```python
import tubelet
store = tubelet.open_store("{title}.zarr")   # a path, s3://..., or catalog.yaml#name
clips = store.clips()                             # pyarrow table, one row per clip
clip = store["{first}"][0]                        # [time, space, channel], memory-mapped
shard = store["{first}"].torch(0)                 # a whole shard as a torch tensor, without a copy
```

Without Tubelet: `zarr.open_group(path)["activations/{first}"]`, or `xarray`, `dask.array`, `tensorstore`.

## What it holds

| hook | channels | tokens | mean norm | 99 % norm | largest value | non-finite |
|---|---|---|---|---|---|---|
{hooks}

Means and covariances of every hook are in `moments/`.

## How it was made

```yaml
{yaml.safe_dump(made, sort_keys=False, allow_unicode=True).rstrip()}
```

## Known failures

{known}

## Check it

`tubelet verify` compares every byte with the manifest, whose digest is the identity above.
"""


def croissant_document(store: Store, title: str, license: str | None) -> dict[str, Any]:
    """Croissant 1.0 JSON-LD: the clip table as records, the activation arrays as files; digests from the manifest.

    Croissant has no N-dimensional arrays: the description and Zarr's metadata document how to read the shards.
    """
    manifest, plan = store.manifest(), store.plan
    table = manifest.get(CLIPS)
    summary = summarize(store)
    base = store.url if "://" in store.url else "."
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": (
            f"Activations of {plan.backbone.get('id')} on {summary['clips']['ok']} clips: one Zarr v3 array "
            f"[clip, time, space, channel] per hook, dtype {plan.dtype}. Identity {store.identity}."
        ),
        "version": "1.0.0",
        "identifier": store.identity,
        "url": base,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "clips",
                "name": CLIPS,
                "contentUrl": f"{base}/{CLIPS}",
                "encodingFormat": "application/x-parquet",
                "contentSize": f"{table.size_bytes if table else 0} B",
                "sha256": table.sha256 if table else "",
            },
            {
                "@type": "cr:FileObject",
                "@id": "store",
                "name": "store",
                "description": f"The store; {MANIFEST} has the digest of every object in it.",
                "contentUrl": base,
                "encodingFormat": "application/vnd.zarr; version=3",
                "sha256": store.identity.removeprefix("sha256:"),
            },
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": f"activations/{hook.name}",
                    "name": hook.name,
                    "description": f"Shape {[plan.clips, *plan.clip_shape(hook)]}, one shard object per file.",
                    "containedIn": {"@id": "store"},
                    "encodingFormat": "application/vnd.zarr; version=3",
                    "includes": f"activations/{hook.name}/c/*/0/0/0",
                }
                for hook in plan.hooks
            ),
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "clip",
                "name": "clip",
                "description": "One record per clip, in array order.",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"clip/{column}",
                        "name": column,
                        "dataType": kind,
                        "source": {"fileObject": {"@id": "clips"}, "extract": {"column": column}},
                    }
                    for column, kind in _COLUMNS.items()
                ],
            }
        ],
    }
    if license is not None:
        document["license"] = license
    if created := store.state.provenance.get("created_utc"):
        document["datePublished"] = created
    return document


_COLUMNS = {
    "clip": "sc:Integer",
    "video_id": "sc:Text",
    "uri": "sc:Text",
    "label": "sc:Integer",
    "label_name": "sc:Text",
    "caption": "sc:Text",
    "split": "sc:Text",
    "status": "sc:Text",
}

# As the specification prints it: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
