"""The Hub's refusals in one line that says what to do.

They are built-in exceptions, so that callers need no class of huggingface_hub: PermissionError for
401 and 403, FileNotFoundError for 404, ConnectionError for 429, 5xx and no answer, else OSError.
The server's answer is quoted, without whatever looks like a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from qvlm_hf.errors import TOKEN, first_line

__all__ = ["explained"]

_LOG_IN = "run `hf auth login` or set HF_TOKEN"
_CONFLICT = (
    OSError,
    "something else changed the repository at the same time",
    "repeat the command",
)
_REPEAT = "repeat the command; what has arrived is not sent again"
_ANSWERS: dict[int, tuple[type[OSError], str, str]] = {
    400: (OSError, "the Hub refuses the request", "mend what it names"),
    401: (PermissionError, "the Hub does not accept the token", _LOG_IN),
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
    409: _CONFLICT,
    412: _CONFLICT,
    413: (OSError, "a file is too large for the Hub", "save with smaller shards (max_shard_size)"),
    429: (ConnectionError, "too many requests", "wait some minutes and repeat the command"),
}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns every error of a conversation with the Hub into one line about `repo_id`.

    Raises:
        OSError: PermissionError, FileNotFoundError, ConnectionError or another; see the module.
        ValueError: as it came, in one line: what huggingface_hub refuses to send.
    """
    try:
        yield
    except Exception as error:
        explanation = _explanation(repo_id, error)
        if explanation is None:
            raise
        raise explanation from error


def _explanation(repo_id: str, error: BaseException | None) -> Exception | None:
    """What to raise instead of `error`; None: it is no matter of the Hub's."""
    match error:
        case LocalTokenNotFoundError():
            return PermissionError(f"{repo_id}: there is no Hub token: {_LOG_IN}.")
        case OfflineModeIsEnabled():
            return ConnectionError(
                f"{repo_id}: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it to publish."
            )
        case HfHubHTTPError():
            return _refusal(repo_id, error.response.status_code, error.server_message)
        case PermissionError() if error.errno is None:  # hf_xet's; a file's has a number
            return PermissionError(
                f"{repo_id}: the Hub does not accept the token ({first_line(error)}): {_LOG_IN}."
            )
        case HTTPError() | ConnectionError() | TimeoutError():
            return ConnectionError(
                f"{repo_id}: the Hub cannot be reached ({first_line(error)}): check the network "
                f"and {_REPEAT}."
            )
        case RuntimeError():  # of one file; the reason is its cause
            return _explanation(repo_id, error.__cause__)
        case ValueError():
            return ValueError(f"{repo_id}: {TOKEN.sub('hf_***', ' '.join(str(error).split()))}")
    return None


def _refusal(repo_id: str, status: int, said: str | None) -> OSError:
    kind, meaning, remedy = _ANSWERS.get(status, (OSError, "the Hub refuses", "see what it says"))
    if status >= 500:
        kind, meaning, remedy = ConnectionError, "the Hub is out of order", _REPEAT
    answer = f"{status}: {first_line(said)}" if said else status
    return kind(f"{repo_id}: {meaning} ({answer}): {remedy}.")
