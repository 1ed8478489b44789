"""Effects of editing each latent.

    probe on pooled codes ─▶ exact change of each class's logit when the latent is set to 0 in the code
    effects.parquet       ─▶ what `tubelet evaluate --in_backbone {}` (or another tool) measured in the backbone

The first is about the code, not about the backbone; the page states this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_lens.config import ActionConfig
from tubelet_lens.inputs.clip_selection import partition
from tubelet_lens.inputs.clip_stream import Window
from tubelet_lens.results.latent_table import SCHEMA
from tubelet_lens.stats.linear_models import choose_penalty, fit_probe

# As in the action probe of the evaluation.
_PENALTIES = ActionConfig().penalties
_VALIDATION = 0.2
_FEWEST_CLIPS = 20


@dataclass(frozen=True)
class Effects:
    """Effects of one kind on one latent's page.

    Attributes:
        definition: What is measured.
        by_target: (target, effect), by decreasing size.
    """

    definition: str
    by_target: tuple[tuple[str, float], ...]


def read_effects(path: Path) -> dict[int, tuple[Effects, ...]]:
    """Effects by latent from the table at `path`, see `results.latent_table`.

    Raises:
        TubeletError: it is missing, is not Parquet, or lacks a column.
    """
    if not path.is_file():
        raise TubeletError(f"No table of effects at {path}", "Check the path")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TubeletError(f"{path} cannot be read: {error}", "Write it again") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise TubeletError(f"{path} lacks {', '.join(missing)}", f"It needs columns {', '.join(SCHEMA.names)}")
    pairs_of: dict[int, dict[str, list[tuple[str, float]]]] = {}
    for row in table.select(SCHEMA.names).to_pylist():
        if row["effect"] is not None:
            pairs = pairs_of.setdefault(row["latent"], {}).setdefault(row["definition"], [])
            pairs.append((str(row["target"]), float(row["effect"])))
    return {
        latent: tuple(Effects(definition, _largest_first(pairs)) for definition, pairs in groups.items())
        for latent, groups in pairs_of.items()
    }


class MeanCodes:
    """Collects the mean code over tokens of chosen clips from windows."""

    def __init__(self, clips: NDArray[np.int64]) -> None:
        self._wanted = set(clips.tolist())
        self._clips: list[int] = []
        self._rows: list[NDArray[np.float32]] = []

    def add(self, window: Window) -> None:
        """Add one window."""
        for clip, codes_TSF in zip(window.clips.tolist(), window.codes_CTSF, strict=True):
            if clip in self._wanted:
                self._clips.append(clip)
                self._rows.append(codes_TSF.mean((0, 1)).cpu().numpy())

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Clips int64 [N] and their mean codes float32 [N, F]."""
        return np.array(self._clips, dtype=np.int64), np.stack(self._rows)


def probe_effects(
    codes_NF: NDArray[np.float32],
    class_N: NDArray[np.int64],
    video_N: Sequence[str],
    test_N: NDArray[np.bool_],
    names: Sequence[str],
    seed: int,
) -> dict[int, tuple[Effects, ...]]:
    """Change of the logits of a linear action probe when a latent is set to 0 in the code; {} if none can be fitted.

    The logit of class c is sum_j w_cj zbar_j + b_c, so z_j = 0 changes it by -w_cj zbar_j, exactly. The mean over the
    clips on which the latent fires is given.

    Args:
        codes_NF: Mean codes of N labeled clips.
        class_N: int64 Classes 0 ... C - 1.
        video_N: Their videos.
        test_N: bool Clips to measure the probe on, which are not fitted; all False: its accuracy is unknown.
        names: [C]
        seed: Seed of the videos on which the penalty is chosen.
    """
    fit_N = ~test_N
    if len(np.unique(class_N[fit_N])) < 2 or fit_N.sum() < _FEWEST_CLIPS:
        return {}
    videos = [video for video, taken in zip(video_N, fit_N, strict=True) if taken]
    held = partition(videos, validation=_VALIDATION, ranking=0.0, seed=seed).validation
    rows_NF, classes = codes_NF[fit_N], len(names)
    penalty = choose_penalty(rows_NF, class_N[fit_N], held, classes, _PENALTIES)
    probe = fit_probe(rows_NF, class_N[fit_N], classes, penalty)
    worth = "its accuracy on other clips is unknown"
    if test_N.any():
        named = probe.logits(codes_NF[test_N]).argmax(1)
        right = float((named == class_N[test_N]).mean())
        most = float(np.bincount(class_N[test_N]).max() / test_N.sum())
        worth = (
            f"its accuracy on {int(test_N.sum()):,} other clips is {right:.0%} (always the most frequent label: "
            f"{most:.0%})"
        )
    definition = (
        "Set to 0 in the code, not in the backbone: exact mean change of the label's logit in a linear probe of the "
        f"clip's mean code, over the clips on which the latent fires. The probe was fitted on {int(fit_N.sum()):,} "
        f"clips (L2 penalty {penalty:g}); {worth}."
    )
    fires_F = (codes_NF != 0).sum(0)
    mean_where_F = codes_NF.sum(0, dtype=np.float64) / np.maximum(fires_F, 1)
    change_CF = -probe.weights_CF * mean_where_F
    # A latent that is silent on the fitted clips has no weight, so its effect is unknown.
    known = np.flatnonzero((codes_NF[fit_N] != 0).any(0))
    return {
        latent: (Effects(definition, _largest_first(list(zip(names, change_CF[:, latent].tolist(), strict=True)))),)
        for latent in known.tolist()
    }


def _largest_first(pairs: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -abs(pair[1])))
