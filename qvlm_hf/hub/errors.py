"""What the Hub's refusals mean, in one line that says what to do; built-in exceptions, so that callers need no class of huggingface_hub.

    401, 403             PermissionError
    404                  FileNotFoundError
    429, 5xx, no answer  ConnectionError
    anything else        OSError

Answers of the server are quoted, because they know more than the status; whatever looks like a
token is blotted out of them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

__all__ = ["TOKEN", "explained", "one_line"]

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")

_ANSWERS: dict[int, tuple[type[OSError], str, str]] = {
    400: (OSError, "the Hub refuses the request", "mend what it names"),
    401: (
        PermissionError,
        "the Hub does not accept the token",
        "run `hf auth login` or set HF_TOKEN",
    ),
    403: (
        PermissionError,
        "the token may not write there",
        "take a token with write permission, another repository, or open a pull request",
    ),
    404: (
        FileNotFoundError,
        "no such repository or revision, or a private one that the token may not see",
        "check both names",
    ),
    409: (OSError, "something else changed the repository at the same time", "repeat the command"),
    412: (OSError, "something else changed the repository at the same time", "repeat the command"),
    413: (OSError, "a file is too large for the Hub", "save with smaller shards (max_shard_size)"),
    429: (ConnectionError, "too many requests", "wait some minutes and repeat the command"),
}
_REPEAT = "repeat the command; what has arrived is not sent again"


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns every error of a conversation with the Hub into one line about `repo_id`.

    Raises:
        PermissionError: see the module.
        FileNotFoundError: see the module.
        ConnectionError: the Hub is offline, out of reach or out of order.
        OSError: another refusal.
        ValueError: as it came, in one line: what huggingface_hub refuses to send.
    """
    try:
        yield
    except Exception as error:
        explanation = _explanation(repo_id, error)
        if explanation is None:
            raise
        raise explanation from error


def one_line(error: object) -> str:
    """The first line of a message, without tokens."""
    lines = str(error).strip().splitlines()
    return TOKEN.sub("hf_***", lines[0].strip().rstrip(".:")) if lines else type(error).__name__


def _explanation(repo_id: str, error: BaseException | None) -> Exception | None:
    """What to raise instead of `error`; None: it is no matter of the Hub's."""
    match error:
        case LocalTokenNotFoundError():
            return PermissionError(
                f"{repo_id}: there is no Hub token: run `hf auth login` or set HF_TOKEN."
            )
        case OfflineModeIsEnabled():
            return ConnectionError(
                f"{repo_id}: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to publish."
            )
        case HfHubHTTPError():
            return _refusal(repo_id, error)
        case PermissionError() if error.errno is None:  # hf_xet's; a file's has a number
            return PermissionError(
                f"{repo_id}: the Hub does not accept the token ({one_line(error)}): "
                f"{_ANSWERS[401][2]}."
            )
        case HTTPError() | ConnectionError() | TimeoutError():
            return ConnectionError(
                f"{repo_id}: the Hub cannot be reached ({one_line(error)}): check the network and "
                f"{_REPEAT}."
            )
        case RuntimeError():  # of one file; the reason is its cause
            return _explanation(repo_id, error.__cause__)
        case ValueError():
            return ValueError(f"{repo_id}: {TOKEN.sub('hf_***', ' '.join(str(error).split()))}")
    return None


def _refusal(repo_id: str, error: HfHubHTTPError) -> OSError:
    status = error.response.status_code
    kind, meaning, remedy = _ANSWERS.get(status, (OSError, "the Hub refuses", "see what it says"))
    if status >= 500:
        kind, meaning, remedy = ConnectionError, "the Hub is out of order", _REPEAT
    said = f": {one_line(error.server_message)}" if error.server_message else ""
    return kind(f"{repo_id}: {meaning} ({status}{said}): {remedy}.")
