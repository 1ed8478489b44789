"""`tubelet export` and `tubelet import`: SAEs to and from other libraries.

In a run an SAE is stored next to its normalization; an exported one has it folded into the weights, and takes
raw tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from tubelet.config import Config, misfit
from tubelet.errors import TubeletError


class ExportConfig(Config):
    """Write a trained SAE for another library."""

    run: Path
    """Folder of the run, with sae.safetensors and sae.json."""
    out: Path
    """Folder to write; it must not hold an SAE yet."""
    format: Literal["saelens", "safetensors"] = "saelens"
    """saelens: cfg.json and sae_weights.safetensors, for sae_lens.SAE.load_from_disk; safetensors: Tubelet's own two
    files, with the normalization folded into the weights."""


class ImportConfig(Config):
    """Read an SAE of another library."""

    path: Path
    """saelens: the folder with cfg.json; saev: its file, often sae.pt."""
    out: Path
    """Folder to write; it must not hold an SAE yet."""
    format: Literal["saelens", "saev"] = "saelens"
    """Which library wrote it."""
    hook: str | None = None
    """Hook it was trained on, as the store names it; recorded in sae.json."""
    input_bias: Literal["auto", "subtracted", "kept"] = "auto"
    """saev: whether the encoder takes x - b_dec (subtracted) or x (kept). auto: by the file's schema number."""
    mean: Path | None = None
    """saev: file with the mean vector that its loader subtracted from the tokens (scale_mean): .npy or a torch file.
    Default: none."""
    scale: float | None = Field(default=None, gt=0)
    """saev: the number that its loader then divided tokens by (scale_norm): mean norm / sqrt(channels). Default: 1."""

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
    """Write the SAE at `config.path` in Tubelet's format; the folder.

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
        # No local path in a file that is shared.
        given["mean"] = {"file": config.mean.name, "sha256": hashlib.sha256(config.mean.read_bytes()).hexdigest()}
    # A file exported by Tubelet records what it was trained on.
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
