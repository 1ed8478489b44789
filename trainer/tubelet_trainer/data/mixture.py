"""Several stores in one stream: every batch holds a fixed share of each.

    store a ─▶ loader, rows 0 ... 3/4 B ─┐
    store b ─▶ loader, rows 3/4 B ... B ─┴▶ batch [B, D]

Shares are kept exactly over the run: store i fills floor(n B c_i) - floor(n B c_(i-1)) of the first n batches' tokens,
where c_i is the sum of the shares up to i. Each store's stream repeats independently, epoch after epoch, so all
positions follow from the number of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from tubelet.errors import TubeletError
from tubelet_store.moments import Moments
from tubelet_store.reader import Store
from tubelet_trainer.data.batch import Batch, Pairs, join_pairs
from tubelet_trainer.data.loader import ActivationLoader
from tubelet_trainer.data.shard_prefetch import refuse_small_cache

# A share of the whole, as a count of tokens: moments are merged by count.
_WHOLE = 1 << 40


class Mixture:
    """Batches filled from several streams. One iteration at a time.

    Args:
        parts: Streams of the same batches, whose shares are neighbors and together 1 (see `ActivationLoader`).

    Raises:
        TubeletError: a cache is too small for what all parts shuffle together.
    """

    def __init__(self, parts: Sequence[ActivationLoader]) -> None:
        self.parts = tuple(parts)
        refuse_small_cache([need for part in self.parts for need in part.needs])
        first = self.parts[0]
        self.batch_tokens, self.total_tokens, self.steps = first.batch_tokens, first.total_tokens, first.steps
        self.tokens_per_epoch = sum(part.tokens_per_epoch for part in self.parts)
        """Tokens of one pass over every store."""
        self.device = first.device

    @property
    def clips(self) -> NDArray[np.int64]:
        """Clips that are served, counted through all stores."""
        return np.concatenate([part.clips + part.clip_offset for part in self.parts])

    @property
    def memory_bytes(self) -> int:
        """Of the windows of all parts."""
        return sum(part.memory_bytes for part in self.parts)

    @property
    def step(self) -> int:
        """Number of the next batch."""
        return self.parts[0].step

    @step.setter
    def step(self, step: int) -> None:
        for part in self.parts:
            part.step = step

    @property
    def strata(self) -> list[tuple[int, int]]:
        """Per store: tokens of a batch and the clips they are drawn from."""
        return [stratum for part in self.parts for stratum in part.strata]

    def clips_of(self, step: int) -> NDArray[np.int64]:
        """Clip of each token of batch `step`, from the order alone."""
        return np.concatenate([part.clips_of(step) for part in self.parts])

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch."""
        return {"step": self.step, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            TubeletError: the state belongs to another stream.
        """
        states = state.get("parts", [state])
        if len(states) != len(self.parts):
            raise TubeletError(
                f"The loader's state belongs to {len(states)} stores, here are {len(self.parts)}",
                "Resume with the same store and mix",
            )
        for part, own in zip(self.parts, states, strict=True):
            part.load_state_dict({**own, "step": state["step"]})

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `step` to the end of the stream; `step` counts along."""
        with ExitStack() as stack:
            streams = [stack.enter_context(closing(cast("Any", iter(part)))) for part in self.parts]
            for batches in zip(*streams, strict=True):
                yield _join(batches)


def _join(batches: Sequence[Batch]) -> Batch:
    starts = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()[:-1]
    return Batch(
        hooks={hook: torch.cat([batch.hooks[hook] for batch in batches]) for hook in batches[0].hooks},
        positions=torch.cat([batch.positions for batch in batches]),
        grid=batches[0].grid,
        whole=sum(batch.whole for batch in batches),
        temporal=_join_pairs([batch.temporal for batch in batches], starts),
        spatial=_join_pairs([batch.spatial for batch in batches], starts),
    )


def _join_pairs(parts: Sequence[Pairs | None], starts: Sequence[int]) -> Pairs | None:
    # A store without tokens in this batch has no pairs.
    present = [(part, start) for part, start in zip(parts, starts, strict=True) if part is not None]
    return join_pairs([part for part, _ in present], [start for _, start in present]) if present else None


def mixed_moments(moments: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """Moments of tokens of which `shares` come from each store; `count` is only their common scale."""
    total = Moments.empty(len(moments[0].mean))
    for each, share in zip(moments, shares, strict=True):
        count = round(share * _WHOLE)
        factor = count / max(each.count, 1)
        total = total.merge(
            Moments(
                count=count,
                mean=each.mean,
                scatter=each.scatter * factor,
                absmax=each.absmax,
                norm_sum=each.norm_sum * factor,
                norm_histogram=np.round(each.norm_histogram * factor).astype(np.int64),
                nonfinite=each.nonfinite,
            )
        )
    return total


def refuse_other_kind(one: Store, other: Store, hooks: Sequence[str]) -> None:
    """Refuse to mix stores whose tokens are not comparable.

    Raises:
        TubeletError: grid, type, backbone, preprocessing, or the width of a hook differ.
    """
    if one.identity == other.identity:
        raise TubeletError(f"{other.url} is the same store as {one.url}", "Leave it out of mix")
    differ = [
        name
        for name in ("grid", "dtype", "backbone", "preprocessing")
        if getattr(one.plan, name) != getattr(other.plan, name)
    ]
    widths = [{hook.name: hook.channels for hook in store.plan.hooks} for store in (one, other)]
    differ += [f"hook {hook}" for hook in hooks if widths[0].get(hook) != widths[1].get(hook)]
    if differ:
        raise TubeletError(
            f"{other.url} cannot be mixed with {one.url}: {', '.join(differ)} differ",
            "Mix stores of one backbone with the same grid, dtype and preprocessing",
        )
