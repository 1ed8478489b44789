"""`tubelet export` and `tubelet import`: SAEs to and from other libraries.

Inside a run an SAE is kept with its normalization beside it; what leaves has it folded into the weights, and takes raw
tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config, misfit
from tubelet.errors import TubeletError


class ExportConfig(Config):
    """An SAE of ours for others."""

    run: Path
    """Folder of the run, with sae.safetensors and sae.json."""
    out: Path
    """Folder to write; it must not hold an SAE yet."""
    format: Literal["saelens", "safetensors"] = "saelens"
    """saelens: cfg.json and sae_weights.safetensors, for sae_lens.SAE.load_from_disk; safetensors: our own two files,
    normalization folded in."""


class ImportConfig(Config):
    """An SAE of others for us."""

    path: Path
    """saelens: the folder with cfg.json; saev: its file, often sae.pt."""
    out: Path
    """Folder to write; it must not hold an SAE yet."""
    format: Literal["saelens", "saev"] = "saelens"
    """Which library wrote it."""
    hook: str | None = None
    """Of which hook's tokens it is, as the store names it; kept in sae.json."""
    input_bias: Literal["auto", "subtracted", "kept"] = "auto"
    """saev: whether the encoder sees x - b_dec or x. auto: by the file's schema number."""
    mean: Path | None = None
    """saev: file with the mean that its loader subtracted from the tokens (scale_mean), a vector: .npy or a torch file.
    None: none was."""
    scale: float | None = Field(default=None, gt=0)
    """saev: the number that its loader then divided them by (scale_norm): their mean norm / sqrt(channels). None: 1."""

    @model_validator(mode="after")
    def _of_saev(self) -> ImportConfig:
        for name, given in (("mean", self.mean), ("scale", self.scale)):
            if given is not None and self.format != "saev":
                raise misfit(name, f"it goes with --format saev; {self.format} files hold their own")
        return self


def export_sae(config: ExportConfig) -> Path:
    """Write what `config` describes; the folder.

    Raises:
        TubeletError: there is no SAE to export, or one where it should go.
    """
    from tubelet_trainer.sae.interop.saelens import save_saelens
    from tubelet_trainer.sae.sae_files import load_record, load_sae, save_sae

    record, sae = load_record(config.run), load_sae(config.run)
    _refuse_taken(config.out)
    if config.format == "saelens":
        save_saelens(config.out, sae, dict(record.provenance))
    else:
        save_sae(config.out, sae.fold(), dict(record.provenance))
    return config.out


def import_sae(config: ImportConfig) -> Path:
    """Write the SAE at `config.path` as one of ours; the folder.

    Raises:
        TubeletError: it cannot be read or has no counterpart here, or there is one where it should go.
    """
    from tubelet_trainer.sae.interop.saelens import load_saelens
    from tubelet_trainer.sae.interop.saev import load_saev
    from tubelet_trainer.sae.sae_files import save_sae

    _refuse_taken(config.out)
    if config.format == "saelens":
        sae, described = load_saelens(config.path)
    else:
        sae, described = load_saev(config.path, config.input_bias, config.mean, config.scale or 1.0)
    given = config.model_dump(
        mode="json", include={"input_bias", "mean", "scale"} if config.format == "saev" else set()
    )
    if config.mean is not None and "mean" in given:
        # What leaves this machine names no folder of it.
        given["mean"] = {"file": config.mean.name, "sha256": hashlib.sha256(config.mean.read_bytes()).hexdigest()}
    # What was exported from here says itself what it was trained on.
    known: JsonValue = described
    for level in ("metadata", "tubelet", "provenance"):
        known = known.get(level) if isinstance(known, dict) else None
    provenance: dict[str, JsonValue] = (known if isinstance(known, dict) else {}) | {
        "imported": {"format": config.format, **given, "described": described}
    }
    if config.hook is not None:
        provenance["hook"] = config.hook
    save_sae(config.out, sae, provenance)
    return config.out


def _refuse_taken(out: Path) -> None:
    for name in ("sae.json", "cfg.json"):
        if (out / name).exists():
            raise TubeletError(f"{out} already holds an SAE ({name})", "Choose another --out")
