"""One pass over the clips: where each latent fires most, how often, and how strongly.

windows ─▶ Survey ─▶ SurveyResult: strongest clips, a sample of the others, counts by label, histogram of activations

Exemplars are (clip, peak), at most one per video (Stevens et al. 2025, arXiv 2502.06755, keep unique images); the heat-
map of a clip shows its other peaks. Latents are ranked by the absolute value of their activation, because those of
AbsTopK SAEs can be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tubelet_lens.inputs.clip_stream import Window

# Videos collected before a merge, which sorts K + this many entries per latent.
_MERGE_EVERY = 32

# Videos sampled per latent: enough to have one from each fifth of them with near certainty.
_SAMPLE = 40

# Bins of the histogram of sizes: four to the octave, from 2^-20 up to 2^20.
_PER_OCTAVE = 4
_OCTAVES = 20
HISTOGRAM_EDGES = 2.0 ** np.linspace(-_OCTAVES, _OCTAVES, 2 * _OCTAVES * _PER_OCTAVE + 1)
"""float64 [161] Bin edges; sizes beyond either end count in the outermost bin."""


@dataclass(frozen=True, eq=False)
class SurveyResult:
    """How F latents fire on N clips of V videos with L labels.

    Attributes:
        clips, videos, tokens: Number seen.
        top_clip_FK, top_peak_FK: int32, float32 Strongest clips, strongest first; -1 if there are fewer.
        sample_clip_FR, sample_peak_FR: A uniform sample of the videos on which the latent fires, weakest first and -1
            last; all of them where there are at most R.
        tokens_F: int64 Tokens on which it fires.
        clips_F: int64 Clips on which it fires.
        videos_F: int64 Videos on which it fires.
        sum_F: float64 Sum of the sizes.
        clips_by_label_FL: int32 Clips of each label on which it fires.
        clips_of_label_L: int64 Clips of each label.
        histogram_FB: int32 Tokens by size, see `HISTOGRAM_EDGES`.
        signed_F: bool Whether it is ever negative.
    """

    clips: int
    videos: int
    tokens: int
    top_clip_FK: NDArray[np.int32]
    top_peak_FK: NDArray[np.float32]
    sample_clip_FR: NDArray[np.int32]
    sample_peak_FR: NDArray[np.float32]
    tokens_F: NDArray[np.int64]
    clips_F: NDArray[np.int64]
    videos_F: NDArray[np.int64]
    sum_F: NDArray[np.float64]
    clips_by_label_FL: NDArray[np.int32]
    clips_of_label_L: NDArray[np.int64]
    histogram_FB: NDArray[np.int32]
    signed_F: NDArray[np.bool_]


class TopVideos:
    """For each of F latents the K videos with the largest keys, largest first; ties go to the video seen first.

    The key is the size of the activation (strongest clips), or one random number per video for all latents: that gives
    a uniform sample of the videos on which a latent fires (bottom-k sampling, Cohen & Kaplan 2007). Memory is O(F K).
    """

    def __init__(self, latents: int, keep: int, device: torch.device) -> None:
        self._key_FK = torch.full((latents, keep), -torch.inf, device=device)
        self._peak_FK = torch.zeros((latents, keep), device=device)
        self._clip_FK = torch.full((latents, keep), -1, dtype=torch.int32, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, key_F: Tensor, peak_F: Tensor, clip_F: Tensor) -> None:
        """Add one video.

        Args:
            key_F: float32 Rank; -inf: leave it out.
            peak_F: float32 Its activation of the largest size.
            clip_F: int32 The clip of the video with that activation.
        """
        self._waiting.append((key_F, peak_F, clip_F))
        if len(self._waiting) == _MERGE_EVERY:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, peaks, clips = zip(*self._waiting, strict=True)
        self._waiting = []
        # Kept entries come first and the sort is stable, so the result does not depend on when entries are merged.
        key_FN = torch.cat([self._key_FK, torch.stack(keys, 1)], 1)
        order_FK = key_FN.argsort(dim=1, descending=True, stable=True)[:, : self._key_FK.shape[1]]
        self._key_FK = key_FN.gather(1, order_FK)
        self._peak_FK = torch.cat([self._peak_FK, torch.stack(peaks, 1)], 1).gather(1, order_FK)
        self._clip_FK = torch.cat([self._clip_FK, torch.stack(clips, 1)], 1).gather(1, order_FK)

    def result(self) -> tuple[Tensor, Tensor]:
        """Peaks float32 [F, K] and clips int32 [F, K], -1 where there are fewer; on the CPU."""
        self._merge()
        missing_FK = self._key_FK.isneginf()
        return self._peak_FK.masked_fill(missing_FK, 0.0).cpu(), self._clip_FK.masked_fill(missing_FK, -1).cpu()


class Survey:
    """Collects statistics from windows of clips, in which the clips of a video follow each other.

    Args:
        latents: Width F of the code.
        video_of_clip: [clips of the store] Number of each clip's video.
        label_of_clip: [clips of the store] Number of each clip's label, -1 where it has none.
        labels: L.
        top_clips: Strongest clips to keep.
        seed: Chooses the sample.
        device: Where the codes are.
    """

    def __init__(
        self,
        latents: int,
        video_of_clip: NDArray[np.int64],
        label_of_clip: NDArray[np.int64],
        labels: int,
        *,
        top_clips: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._latents, self._device = latents, device
        self._video_of_clip, self._label_of_clip = video_of_clip, label_of_clip
        self._priority = np.random.default_rng(seed).random(int(video_of_clip.max()) + 1, dtype=np.float32)
        self._top = TopVideos(latents, top_clips, device)
        self._sample = TopVideos(latents, _SAMPLE, device)
        self._video: int | None = None
        self._peak_F = torch.zeros(latents, device=device)
        self._clip_F = torch.full((latents,), -1, dtype=torch.int32, device=device)
        self._clips = self._videos = self._tokens = 0
        self._tokens_F = torch.zeros(latents, dtype=torch.int64, device=device)
        self._clips_F = torch.zeros_like(self._tokens_F)
        self._videos_F = torch.zeros_like(self._tokens_F)
        self._sum_F = torch.zeros(latents, dtype=torch.float64, device=device)
        self._by_label_FL = torch.zeros((latents, labels), dtype=torch.int32, device=device)
        self._of_label = np.zeros(labels, dtype=np.int64)
        self._histogram_FB = torch.zeros((latents, len(HISTOGRAM_EDGES) - 1), dtype=torch.int32, device=device)
        self._signed_F = torch.zeros(latents, dtype=torch.bool, device=device)

    def add(self, window: Window) -> None:
        """Add one window."""
        for clip, codes_TSF in zip(window.clips.tolist(), window.codes_CTSF, strict=True):
            if self._video_of_clip[clip] != self._video:
                self._end_video()
                self._video = int(self._video_of_clip[clip])
            self._add_clip(clip, codes_TSF.flatten(0, 1))

    def _add_clip(self, clip: int, codes_NF: torch.Tensor) -> None:
        # Everything below works on the nonzero codes only.
        token, latent = codes_NF.nonzero(as_tuple=True)
        values = codes_NF[token, latent]
        highest_F = torch.zeros(self._latents, device=self._device).scatter_reduce_(0, latent, values, "amax")
        lowest_F = torch.zeros(self._latents, device=self._device).scatter_reduce_(0, latent, values, "amin")
        peak_F = torch.where(highest_F >= -lowest_F, highest_F, lowest_F)
        stronger_F = peak_F.abs() > self._peak_F.abs()
        self._peak_F = torch.where(stronger_F, peak_F, self._peak_F)
        self._clip_F = torch.where(stronger_F, clip, self._clip_F)
        fired_F = peak_F != 0
        self._clips += 1
        self._tokens += len(codes_NF)
        self._tokens_F += latent.bincount(minlength=self._latents)
        self._clips_F += fired_F
        self._sum_F.index_add_(0, latent, values.abs().double())
        self._signed_F |= lowest_F < 0
        label = int(self._label_of_clip[clip])
        if label >= 0:
            self._by_label_FL[:, label] += fired_F
            self._of_label[label] += 1
        bins = self._histogram_FB.shape[1]
        place = ((values.abs().log2() + _OCTAVES) * _PER_OCTAVE).floor().long().clamp_(0, bins - 1)
        self._histogram_FB.view(-1).index_add_(0, latent * bins + place, torch.ones_like(latent, dtype=torch.int32))

    def _end_video(self) -> None:
        if self._video is None:
            return
        fires_F = self._peak_F != 0
        never = torch.tensor(-torch.inf, device=self._device)
        priority = torch.tensor(self._priority[self._video], device=self._device)
        self._top.add(torch.where(fires_F, self._peak_F.abs(), never), self._peak_F, self._clip_F)
        self._sample.add(torch.where(fires_F, priority, never), self._peak_F, self._clip_F)
        self._videos += 1
        self._videos_F += fires_F
        self._video = None
        self._peak_F, self._clip_F = torch.zeros_like(self._peak_F), torch.full_like(self._clip_F, -1)

    def result(self) -> SurveyResult:
        """Statistics of everything added."""
        self._end_video()
        top_peak, top_clip = self._top.result()
        sample_peak, sample_clip = self._sample.result()
        order = sample_peak.abs().masked_fill(sample_clip < 0, torch.inf).argsort(dim=1, stable=True)
        return SurveyResult(
            clips=self._clips,
            videos=self._videos,
            tokens=self._tokens,
            top_clip_FK=top_clip.numpy(),
            top_peak_FK=top_peak.numpy(),
            sample_clip_FR=sample_clip.gather(1, order).numpy(),
            sample_peak_FR=sample_peak.gather(1, order).numpy(),
            tokens_F=self._tokens_F.cpu().numpy(),
            clips_F=self._clips_F.cpu().numpy(),
            videos_F=self._videos_F.cpu().numpy(),
            sum_F=self._sum_F.cpu().numpy(),
            clips_by_label_FL=self._by_label_FL.cpu().numpy(),
            clips_of_label_L=self._of_label,
            histogram_FB=self._histogram_FB.cpu().numpy(),
            signed_F=self._signed_F.cpu().numpy(),
        )


@dataclass(frozen=True)
class Exemplar:
    """A clip on the page of a latent.

    Attributes:
        clip: Its number in the store.
        peak: The latent's activation of the largest size in it.
        part: None: one of the strongest. Otherwise the quantile range (lower, upper) of its peak among the videos on
            which the latent fires.
    """

    clip: int
    peak: float
    part: tuple[float, float] | None = None


def exemplars(survey: SurveyResult, latent: int, lower_clips: int) -> tuple[Exemplar, ...]:
    """The strongest clips of `latent`, then one from the middle of each of `lower_clips` quantile ranges, in order.

    A range whose sampled videos are all among the strongest has no exemplar.
    """
    strongest = [
        Exemplar(int(clip), float(peak))
        for clip, peak in zip(survey.top_clip_FK[latent], survey.top_peak_FK[latent], strict=True)
        if clip >= 0
    ]
    shown = {each.clip for each in strongest}
    sampled = np.flatnonzero(survey.sample_clip_FR[latent] >= 0)
    weaker = []
    for part in reversed(range(lower_clips)):
        low, high = part / lower_clips, (part + 1) / lower_clips
        inside = sampled[math.ceil(low * len(sampled)) : math.ceil(high * len(sampled))]
        free = [place for place in inside if int(survey.sample_clip_FR[latent, place]) not in shown]
        if free:
            place = free[len(free) // 2]
            weaker.append(
                Exemplar(
                    int(survey.sample_clip_FR[latent, place]), float(survey.sample_peak_FR[latent, place]), (low, high)
                )
            )
    return (*strongest, *weaker)
