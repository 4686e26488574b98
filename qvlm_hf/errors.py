"""Other programs' errors inside ours."""

import re

__all__ = ["TOKEN", "first_line", "one_line"]

_LONGEST = 160  # characters of a line
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # of the Hub


def first_line(error: object) -> str:
    """The first line of a message, for brackets in ours: without full stop, and without tokens.

    Of an error without a message it is the class.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TOKEN.sub("hf_***", lines[0].strip().rstrip(".:"))


def one_line(error: BaseException) -> str:
    """The class and first words of an error, for a table or behind our own words."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
