"""The one exception a Tubelet user meets: what went wrong, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TubeletError(Exception):
    """An error that the user can fix.

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
        return f"{_sentence(self.problem)} {_sentence(self.remedy)}"


def _sentence(text: str) -> str:
    return text if text.endswith(("?", "!", ".")) else f"{text}."


class StoreUnreachable(TubeletError):
    """Object storage is unreachable; the operation may be retried."""


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
