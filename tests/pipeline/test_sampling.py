from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tubelet_pipeline.frame_indices import FrameChoice, chosen_frames
from tubelet_pipeline.sampling import DenseSampling, Sampling, UniformSampling, describe

samplings = st.one_of(
    st.builds(DenseSampling, frames=st.integers(1, 64), stride=st.integers(1, 16), clips=st.integers(1, 7)),
    st.builds(UniformSampling, frames=st.integers(1, 64), clips=st.integers(1, 7)),
)


def choose(sampling: Sampling, video_frames: int, view: int) -> FrameChoice:
    """As a decode process does, which is told the rule as JSON."""
    return chosen_frames(sampling.model_dump(mode="json"), video_frames, view, first=0, more=0)


def test_uniform_takes_bin_centers():
    indices = choose(UniformSampling(frames=16), 300, 0).indices
    assert indices.tolist() == [9, 28, 46, 65, 84, 103, 121, 140, 159, 178, 196, 215, 234, 253, 271, 290]


def test_dense_takes_the_middle_as_videomae_does():
    indices = choose(DenseSampling(frames=16, stride=4), 300, 0).indices
    assert indices.tolist() == list(range(118, 179, 4))


def test_dense_views_reach_from_the_first_frame_to_the_last():
    sampling = DenseSampling(frames=16, stride=4, clips=5)
    starts = [choose(sampling, 300, view).indices[0] for view in range(5)]
    assert starts == [0, 59, 118, 177, 236]


def test_dense_repeats_the_last_frame_of_a_short_video():
    choice = choose(DenseSampling(frames=8, stride=2), 7, 0)
    assert choice.indices.tolist() == [0, 2, 4, 6, 6, 6, 6, 6]
    assert choice.padded == 4


def test_uniform_repeats_frames_of_a_short_video():
    choice = choose(UniformSampling(frames=8), 5, 0)
    assert choice.indices.tolist() == [0, 0, 1, 2, 2, 3, 4, 4]
    assert choice.padded == 3


@given(samplings, st.integers(1, 100_000))
def test_every_choice_is_in_range_and_never_goes_back(sampling, video_frames):
    previous = None
    for view in range(sampling.clips):
        choice = choose(sampling, video_frames, view)
        assert choice.indices.dtype == np.int64
        assert len(choice.indices) == sampling.frames
        assert choice.indices[0] >= 0
        assert choice.indices[-1] < video_frames
        assert (np.diff(choice.indices) >= 0).all()
        assert 0 <= choice.padded < sampling.frames
        if previous is not None:
            assert (choice.indices >= previous).all(), "a later view lies later"
        previous = choice.indices


@given(samplings, st.integers(1, 100_000))
def test_a_video_that_is_long_enough_is_never_padded(sampling, surplus):
    span = sampling.frames * getattr(sampling, "stride", 1)
    assert choose(sampling, span + surplus, 0).padded == 0


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 1000))
def test_uniform_views_interleave_into_the_finer_uniform_sampling(frames, clips, video_frames):
    views = [choose(UniformSampling(frames=frames, clips=clips), video_frames, v).indices for v in range(clips)]
    finer = choose(UniformSampling(frames=frames * clips), video_frames, 0).indices
    assert np.stack(views, 1).reshape(-1).tolist() == finer.tolist()


def test_no_frames_and_no_such_view_are_refused():
    with pytest.raises(ValueError, match="has none"):
        choose(UniformSampling(frames=4), 0, 0)
    with pytest.raises(ValueError, match="View 2"):
        choose(UniformSampling(frames=4, clips=2), 9, 2)


def test_kind_selects_the_rule():
    adapter = TypeAdapter(Sampling)
    assert adapter.validate_python({"kind": "uniform", "frames": 4}) == UniformSampling(frames=4)
    assert adapter.validate_python({"kind": "dense", "frames": 4, "stride": 2}) == DenseSampling(frames=4, stride=2)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "uniform", "frames": 4, "stride": 2})


def test_description_names_fields_and_formula():
    described = describe(DenseSampling(frames=16, stride=4))
    assert (described["kind"], described["frames"], described["stride"]) == ("dense", 16, 4)
    assert described["formula"] == "dense-v1"
