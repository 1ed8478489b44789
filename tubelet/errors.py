"""The one exception a Tubelet user meets: what went wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TubeletError(Exception):
    """A failure that the user can mend.

    Verbs print it as one line and exit with status 2; no traceback is shown.

    Args:
        problem: What was found, naming the file, clip, object or field.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        stop = "" if self.remedy.endswith(("?", "!", ".")) else "."
        return f"{self.problem.rstrip('.')}. {self.remedy}{stop}"


class StoreUnreachable(TubeletError):
    """The object storage does not answer, or not well. It may later: nothing is wrong with what was asked."""


def nearest(wrong: str, right: Iterable[str]) -> str:
    """Phrase that names the closest valid spelling of `wrong`, or lists all of them.

    Example:
        >>> nearest("stide", ["frames", "stride"])
        "Did you mean 'stride'?"
    """
    options = sorted(right)
    close = difflib.get_close_matches(wrong, options, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Valid: {', '.join(options)}"
