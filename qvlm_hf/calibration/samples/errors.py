"""The one way to say what is wrong with a sample: where (file, line, key), problem, remedy."""

__all__ = ["place", "sample_error"]


def place(origin: str, key: str = "") -> str:
    """Where something stands: 'data.jsonl:3: key "image"', or the whole entry, 'data.jsonl:3:'."""
    return f'{origin}: key "{key}"' if key else f"{origin}:"


def sample_error(where: str, problem: str, remedy: str) -> ValueError:
    """The error, one line."""
    return ValueError(f"{where} {problem}; {remedy}")
