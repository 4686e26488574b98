"""The Hub's refusals in one line, as built-in exceptions.

PermissionError for 401 and 403, FileNotFoundError for 404, ConnectionError for 429, 5xx and no
answer, else OSError. What the Hub or huggingface_hub says is quoted, without tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from qvlm_hf.errors import first_line

__all__ = ["explained"]

_LOG_IN = "run `hf auth login` or set HF_TOKEN"
_REPEAT = "repeat the command; what has arrived is not sent again"
_ANSWERS: dict[int, tuple[type[OSError], str]] = {
    401: (PermissionError, _LOG_IN),
    403: (PermissionError, "take a token with write permission, or open a pull request"),
    404: (FileNotFoundError, "check both names, and whether the token may see a private one"),
    429: (ConnectionError, "wait some minutes and repeat the command"),
}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns every error of a conversation with the Hub into one line about `repo_id`.

    Raises:
        OSError: PermissionError, FileNotFoundError, ConnectionError or another; see the module.
        ValueError: what huggingface_hub refuses to send.
    """
    try:
        yield
    except Exception as error:
        # huggingface_hub wraps the error of one file
        wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
        found = _explanation(repo_id, error.__cause__ if wrapped else error)
        if found is None:
            raise
        raise found from error


def _explanation(repo_id: str, error: BaseException | None) -> Exception | None:
    """What to raise instead of `error`; None: it is no matter of the Hub's."""
    reason = first_line(error)
    match error:
        case HfHubHTTPError():
            status = error.response.status_code
            other = (ConnectionError, _REPEAT) if status >= 500 else (OSError, "see what it says")
            kind, remedy = _ANSWERS.get(status, other)
            said = first_line(error.server_message or error)
            return kind(f"{repo_id}: the Hub refuses ({status}: {said}): {remedy}.")
        case LocalTokenNotFoundError():
            return PermissionError(f"{repo_id}: there is no Hub token: {_LOG_IN}.")
        case PermissionError() if error.errno is None:  # hf_xet's; a file's has a number
            return PermissionError(f"{repo_id}: the Hub refuses the token ({reason}): {_LOG_IN}.")
        case OfflineModeIsEnabled() | HTTPError() | ConnectionError() | TimeoutError():
            return ConnectionError(f"{repo_id}: the Hub cannot be reached ({reason}): {_REPEAT}.")
        case ValueError():
            return ValueError(f"{repo_id}: {reason}.")
    return None
