"""Repeating an operation after transient faults."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from tubelet.errors import StoreUnreachable

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


def retry(
    call: Callable[[], T],
    may_retry: Callable[[Exception, int], bool],
    first_pause_s: float = _FIRST_PAUSE_S,
    longest_pause_s: float = _LONGEST_PAUSE_S,
) -> T:
    """`call()`, repeated after an exception as long as `may_retry(exception, calls so far)` is true.

    The pause before each repetition is drawn uniformly from 0 to a limit that doubles from `first_pause_s` to
    `longest_pause_s` (full jitter): processes that failed together do not retry together.

    Raises:
        Exception: that of the last call, or what `may_retry` raises in its place.
    """
    for calls in itertools.count(1):
        try:
            return call()
        except Exception as error:
            if not may_retry(error, calls):
                raise
        # The exponent is bounded: 2.0 ** 1024 overflows, after some two hours of pauses.
        time.sleep(random.uniform(0, min(longest_pause_s, first_pause_s * 2.0 ** min(calls - 1, 60))))
    raise AssertionError("unreachable")


def retry_while_unreachable(call: Callable[[], T], patience_s: float) -> T:
    """`call()`, repeated while object storage is unreachable, for `patience_s` seconds.

    Raises:
        StoreUnreachable: it was unreachable for that long.
    """
    deadline = time.monotonic() + patience_s
    return retry(call, lambda error, _: isinstance(error, StoreUnreachable) and time.monotonic() <= deadline)
