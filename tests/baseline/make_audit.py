"""Makes `audit/`: codes, SAE, labels and figures of `tubelet demo`, for audits of later metrics. See its README.

They were made once, at commit 274ddd9, in the folder of the repository, and are not made again:

    git checkout 274ddd9
    python tests/baseline/make_audit.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tubelet_store.cli import main

from tubelet_store import open_store
from tubelet_trainer import load_sae

AUDIT = Path(__file__).parent / "audit"
DEMO = Path("demo")
# Three of each class: all 96 would not fit into 2 MB.
CLIPS = 48
# Of the first clip: enough to see that the SAE gives these codes.
RAW_STEPS = 2


def tubelet(*arguments: str) -> None:
    """Run a verb."""
    if status := main(list(arguments)):
        raise SystemExit(f"tubelet {' '.join(arguments)} ended with status {status}")


def rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16 whose last four bits are 0: 7 significant bits, which compress better than 11."""
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + 8) >> 4 << 4).astype(np.uint16).view(np.float16)


def main_() -> None:
    """Run the demo, evaluate it on the clips that are kept, write what is kept of them."""
    tubelet("demo", "--out", str(DEMO))
    tubelet("copy", str(DEMO / "validation.zarr"), str(DEMO / "audit.zarr"), "--where.first", str(CLIPS))
    settings = yaml.safe_load((DEMO / "evaluate.yaml").read_text())
    settings |= {"store": str(DEMO / "audit.zarr"), "out": str(DEMO / "audit")}
    (DEMO / "audit.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    tubelet("evaluate", str(DEMO / "audit.yaml"))

    AUDIT.mkdir(exist_ok=True)
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(DEMO / "run" / name, AUDIT)
    shutil.copy(DEMO / "audit" / "latents.parquet", AUDIT)
    figures = json.loads((DEMO / "audit" / "evaluation.json").read_text())
    (AUDIT / "evaluation.json").write_text(json.dumps(figures, separators=(",", ":"), ensure_ascii=False) + "\n")

    store, sae = open_store(str(DEMO / "audit.zarr")), load_sae(AUDIT)
    (hook,) = store.plan.hooks
    x_CTSD = np.asarray(store[hook.name][:], np.float32)
    mean_D = store.moments(hook.name).mean
    codes, error_C, square_C, sum_CD = [], [], [], []
    for x_TSD in x_CTSD:
        x_ND = torch.from_numpy(x_TSD).flatten(0, 1)
        code_NF = sae.encode(x_ND)
        centred_ND = x_ND.double() - torch.from_numpy(mean_D)
        error_C.append(float((x_ND.double() - sae.decode(code_NF).double()).square().sum()))
        square_C.append(float(centred_ND.square().sum()))
        sum_CD.append(centred_ND.sum(dim=0).numpy())
        codes.append(code_NF.numpy().reshape(*x_TSD.shape[:2], -1))
    # Neighbours in time beside each other, then in space: what compresses best.
    code_FCST = np.stack(codes).transpose(3, 0, 2, 1)
    np.savez_compressed(
        AUDIT / "codes.npz",
        fired=np.packbits(code_FCST > 0),
        shape=np.asarray(code_FCST.shape),
        values=rounded(code_FCST[code_FCST > 0]),
        squared_error=np.asarray(error_C),
        squared_norm=np.asarray(square_C),
        sum=np.asarray(sum_CD, np.float32),
        x=np.asarray(store[hook.name][0])[:RAW_STEPS],
    )
    clips = store.clips().select(["video_id", "label", "label_name", "caption"]).to_pylist()
    (AUDIT / "clips.json").write_text(json.dumps(clips, indent=0) + "\n")


if __name__ == "__main__":
    main_()
