"""A Hugging Face Hub in memory, models only: the real client talks to it, and no socket is opened.

`FakeHub.client` makes huggingface_hub's HTTP client with a transport that answers here, so that its
retries, redirects and errors are the real ones. fake_hub_routes.py has the answers,
fake_hub_storage.py what is kept.

Files reach it in three ways, as the client chooses:
  regular  inside the commit (base64): what is small and text.
  lfs      PUT to a second origin, which takes signed addresses alone and refuses every token.
  xet      `FakeHub.new_upload_commit` stands for hf_xet, which would open sockets of its own.
"""

import hashlib
import json
import re
import secrets
import threading
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote

from fake_hub_routes import ROUTES, Call, HubError, Reply, User
from fake_hub_storage import Blob, Repo
from huggingface_hub import constants
from huggingface_hub.utils import _http

__all__ = ["FakeHub"]

httpx = getattr(_http, "httpx2", None) or _http.httpx


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    method: str
    path: str  # unquoted, with the query
    is_storage: bool
    had_authorization: bool
    status: int | None  # None: the connection was cut


@dataclass
class _Fault:
    """What `FakeHub.fail` and its like ask for."""

    method: str
    path: str
    times: int | None  # None: always
    kind: str
    value: int = 0

    def happens(self, kind: str, request: Any, path: str) -> bool:
        """Whether it hits this request; counts it."""
        if kind != self.kind or self.times == 0 or not re.search(self.path, path):
            return False
        if not re.fullmatch(self.method, request.method):
            return False
        if kind == "cut" and len(request.content) <= self.value:
            return False
        self.times = None if self.times is None else self.times - 1
        return True


class _XetUpload:
    """What the client asks of an upload by hf_xet."""

    def __init__(self, hub: "FakeHub"):
        self.hub = hub

    def start_upload_file(self, path: str, sha256: object) -> Any:
        digest = self.hub.keep(Path(path).read_bytes())
        done = SimpleNamespace(xet_info=SimpleNamespace(sha256=digest))
        return SimpleNamespace(result=lambda: done)

    def wait_to_finish(self) -> None: ...

    def abort(self) -> None: ...

    def __enter__(self) -> "_XetUpload":
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeHub:
    """The Hub.

    Attributes:
        token: of "me", who may write.
        repos: by id; `repo(id)` is the same.
        contents: of LFS and Xet files, by SHA-256.
        requests: the log, in the order of the answers.
        problems: requests that no route knows, and routes that crashed.
    """

    endpoint, storage = constants.ENDPOINT, "https://storage.test"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.users: dict[str, User] = {}
        self._faults: list[_Fault] = []
        self._wrong_etags: list[str] = []
        self._lock = threading.RLock()
        self.token = self.add_user("me")

    def client(self) -> Any:
        """What `huggingface_hub.set_client_factory` asks for."""
        hooks = {"request": [_http.hf_request_event_hook]}
        transport = httpx.MockTransport(self._answer)
        return httpx.Client(transport=transport, event_hooks=hooks, follow_redirects=True)

    def new_upload_commit(self, **_: object) -> "_XetUpload":
        """What the client asks of a session of hf_xet."""
        return _XetUpload(self)

    # What tests use

    def repo(self, id_: str) -> Repo:
        return self.repos[id_]

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A new token, of the form of real ones."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = User(name, role, orgs)
        return token

    def fail(self, method: str, path: str, status: int = 500, times: int | None = 1) -> None:
        """Answers matching requests with an error and does nothing else.

        Of all faults: `method` and `path` are patterns, `path` is searched in the unquoted path and
        query of both origins; `times` None means always.
        """
        self._faults.append(_Fault(method, path, times, "fail", status))

    def cut(self, path: str, after_bytes: int, times: int | None = None) -> None:
        """Closes the connection within bodies that are longer than that."""
        self._faults.append(_Fault("PUT", path, times, "cut", after_bytes))

    def lose_answer(self, method: str, path: str, times: int | None = None) -> None:
        """Does what was asked and closes the connection instead of answering."""
        self._faults.append(_Fault(method, path, times, "lose"))

    def wrong_etag(self, path: str) -> None:
        """From now on tells another hash than the content's for files whose path matches."""
        self._wrong_etags.append(path)

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self._wrong_etags.clear()

    def calls(self, method: str, path: str) -> list[Request]:
        """The part of the log that matches."""
        return [r for r in self.requests if r.method == method and re.search(path, r.path)]

    # What routes use

    def keep(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest

    def shown(self, path: str, blob: Blob) -> Blob:
        """What is said of a file."""
        wrong = any(re.search(pattern, path) for pattern in self._wrong_etags)
        return replace(blob, told=blob.sha256[::-1]) if wrong else blob

    # HTTP

    def _answer(self, request: Any) -> Any:
        """The transport: a request of the client in, a response or a broken connection out."""
        path = unquote(request.url.raw_path.decode())
        is_storage = str(request.url).startswith(self.storage)
        if not is_storage and not str(request.url).startswith(self.endpoint):
            raise httpx.ConnectError("nothing answers at this address")
        authorization = request.headers.get("Authorization")
        line = Request(request.method, path, is_storage, bool(authorization), None)
        with self._lock:
            if any(fault.happens("cut", request, path) for fault in self._faults):
                self.requests.append(line)
                raise httpx.WriteError("the connection was cut")
            failed = [f.value for f in self._faults if f.happens("fail", request, path)]
            if failed:
                reply = HubError(failed[0], "A fault of the tests").reply
            else:
                reply = self._route(request, is_storage, authorization)
            response = _response(request, reply)
            lost = any(fault.happens("lose", request, path) for fault in self._faults)
            self.requests.append(replace(line, status=None if lost else response.status_code))
        if lost:
            raise httpx.RemoteProtocolError("the server closed the connection")
        return response

    def _route(self, request: Any, is_storage: bool, authorization: str | None) -> Reply:
        """The answer, errors included."""
        path, query = request.url.raw_path.decode().partition("?")[::2]
        call = Call(self, request.content, parse_qs(query))
        try:
            if is_storage and (authorization or call.query.get("signature") != ["valid"]):
                raise HubError(400, "This origin wants a signed address and no token")
            call.user = self.users.get((authorization or "").removeprefix("Bearer "))
            if authorization and call.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                found = pattern.fullmatch(path)
                if found and re.fullmatch(method, request.method):
                    groups = found.groupdict().items()
                    call.args = {name: unquote(value or "") for name, value in groups}
                    return function(call)
            self.problems.append(f"no route for {request.method} {path}")
            raise HubError(404, f"This Hub does not know {request.method} {path}")
        except HubError as error:
            return error.reply
        except Exception as error:
            self.problems.append(traceback.format_exc())
            return HubError(500, repr(error)).reply


def _response(request: Any, reply: Reply) -> Any:
    """The client's form of an answer."""
    body, status, headers = reply.body, reply.status, dict(reply.headers)
    if not isinstance(body, bytes):
        body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
    headers |= {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}
    content = b"" if request.method == "HEAD" else body
    return httpx.Response(status, headers=headers, content=content)
