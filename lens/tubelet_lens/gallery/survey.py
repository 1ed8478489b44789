"""One pass over the clips: where each latent fires most, where it fires at all, and how hard.

windows ─▶ Survey ─▶ Surveyed: strongest clips, a sample of the others, counts by label, histogram of sizes

Exemplars are (clip, peak), unique by video (Stevens et al. 2025, arXiv 2502.06755, keep unique images; a clip's own
peaks are shown by its heat-map). An activation's size is its absolute value, so that latents that go negative (AbsTopK)
are ranked too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet_lens.gallery.strongest import Kept
from tubelet_lens.inputs.clip_stream import Window

# Videos sampled per latent: enough for every fifth of them to be met with near certainty.
_SAMPLE = 40

# Bins of the histogram of sizes: four to the octave, from 2^-20 up to 2^20.
_PER_OCTAVE = 4
_OCTAVES = 20
HISTOGRAM_EDGES = 2.0 ** np.linspace(-_OCTAVES, _OCTAVES, 2 * _OCTAVES * _PER_OCTAVE + 1)
"""float64 [161]; sizes beyond either end count to the last bin."""


@dataclass(frozen=True, eq=False)
class Surveyed:
    """What is known of F latents over N clips of V videos with L labels.

    Attributes:
        clips, videos, tokens: How many were seen.
        top_clip_FK, top_peak_FK: int32, float32 Strongest clips, strongest first; -1 where there are fewer.
        sample_clip_FR, sample_peak_FR: A uniform sample of the videos on which the latent fires, weakest first and -1
            last; all of them where there are at most R.
        tokens_F: int64 Tokens on which it fires.
        clips_F: int64 Clips on which it fires.
        videos_F: int64 Videos on which it fires.
        sum_F: float64 Sum of the sizes.
        clips_by_label_FL: int32 Clips of each label on which it fires.
        clips_of_label_L: int64 Clips of each label.
        histogram_FB: int32 Tokens by size, see `HISTOGRAM_EDGES`.
        signed_F: bool Whether it goes negative.
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


class Survey:
    """Takes windows of clips, the clips of a video one after the other.

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
        self._top = Kept(latents, top_clips, device)
        self._sample = Kept(latents, _SAMPLE, device)
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
        """Take in one window."""
        for clip, codes_TSF in zip(window.clips.tolist(), window.codes_CTSF, strict=True):
            if self._video_of_clip[clip] != self._video:
                self._end_video()
                self._video = int(self._video_of_clip[clip])
            self._add_clip(clip, codes_TSF.flatten(0, 1))

    def _add_clip(self, clip: int, codes_NF: torch.Tensor) -> None:
        # Everything below works on the few codes that are not 0.
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

    def result(self) -> Surveyed:
        """What was found in everything added."""
        self._end_video()
        top_peak, top_clip = self._top.result()
        sample_peak, sample_clip = self._sample.result()
        order = sample_peak.abs().masked_fill(sample_clip < 0, torch.inf).argsort(dim=1, stable=True)
        return Surveyed(
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
    """One clip of one latent's page.

    Attributes:
        clip: Its number in the store.
        peak: The latent's activation of largest size there.
        part: None: one of the strongest. Otherwise (lower, upper), shares of the videos on which the latent fires, in
            order of their peaks, between which this one lies.
    """

    clip: int
    peak: float
    part: tuple[float, float] | None = None


def exemplars(found: Surveyed, latent: int, lower_clips: int) -> tuple[Exemplar, ...]:
    """The strongest clips of `latent`, then one from the middle of each of `lower_clips` equal parts, strongest first.

    A part in which every sampled video is among the strongest anyway has no exemplar.
    """
    strongest = [
        Exemplar(int(clip), float(peak))
        for clip, peak in zip(found.top_clip_FK[latent], found.top_peak_FK[latent], strict=True)
        if clip >= 0
    ]
    shown = {each.clip for each in strongest}
    sampled = np.flatnonzero(found.sample_clip_FR[latent] >= 0)
    weaker = []
    for part in reversed(range(lower_clips)):
        low, high = part / lower_clips, (part + 1) / lower_clips
        inside = sampled[math.ceil(low * len(sampled)) : math.ceil(high * len(sampled))]
        free = [place for place in inside if int(found.sample_clip_FR[latent, place]) not in shown]
        if free:
            place = free[len(free) // 2]
            weaker.append(
                Exemplar(
                    int(found.sample_clip_FR[latent, place]), float(found.sample_peak_FR[latent, place]), (low, high)
                )
            )
    return (*strongest, *weaker)
