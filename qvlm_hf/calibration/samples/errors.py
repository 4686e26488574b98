"""The first line of somebody else's error, for a message of ours."""

__all__ = ["first_line"]


def first_line(error: BaseException) -> str:
    """Of an error without a message: its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
