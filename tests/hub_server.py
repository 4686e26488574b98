"""A Hugging Face Hub for the tests: real HTTP on 127.0.0.1, models only.

This file: users, faults, the log, and HTTP.

In a test `with HubServer(directory) as hub:` (the fixture `hub` of tests/hub/conftest.py); by hand

    python tests/hub_server.py --root DIRECTORY

prints what to export, and `hf upload` and `from_pretrained` find it. hub_routes.py has the answers,
hub_storage.py what is kept.

Files reach it in three ways, as the client chooses; no setting is needed:
  regular  inside the commit (base64): what is small and text.
  lfs      HF_HUB_DISABLE_XET=1: PUT to a second origin, which takes signed addresses alone and refuses every token. Can be cut and counted.
  xet      the client's default: the token names a directory (`local:///...`) and hf_xet writes its chunks there; the commit that names a
           file by its sha256 makes the server put it together, with hf_xet. Same machine only; no
           HTTP, so that no fault can be put there.
Downloads are plain HTTP in all cases: LFS and Xet files by a redirect to the second origin, with
ranges.

Requests that no route knows get a 404 and go to `problems`, as does a route that crashes: the
fixture fails on either.
Needs the standard library, PyYAML and, for xet, hf_xet: huggingface_hub brings both.
"""

import argparse
import hmac
import json
import os
import re
import secrets
import signal
import socket
import string
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import ROUTES, Call, HubError, Reply, User
from hub_storage import Blob, Repo, Store

__all__ = ["HubServer", "Request"]

BLOCK = 64 * 1024


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    origin: str  # "hub" or "storage"
    method: str
    path: str  # unquoted, with the query
    had_authorization: bool
    status: int | None  # None: the connection was cut
    received: int  # bytes of the body
    sent: int


@dataclass
class _Fault:
    method: str
    path: str
    times: int | None  # None: always
    status: int | None = None
    after_bytes: int | None = None
    answer_lost: bool = False


class HubServer:
    """The server, while its `with` block runs.

    Attributes:
        endpoint: of the Hub, for HF_ENDPOINT; `storage` is the second origin.
        user: who owns `token`, which may write.
        repos: by id; `repo(id)` is the same.
        requests: the log, in the order of the answers.
        problems: requests that no route knows, and routes that crashed.
    """

    def __init__(self, root: Path, *, user: str = "me", port: int = 0):
        self.store, self.user = Store(root), user
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self._users: dict[str, User] = {}
        self._faults: list[_Fault] = []
        self._wrong_etags: list[str] = []
        self._secret = secrets.token_bytes()
        self._lock = threading.RLock()
        self._servers = [_Server(self, "hub", port), _Server(self, "storage", 0)]
        self.endpoint, self.storage = (server.url for server in self._servers)
        self.token = self.add_user(user)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            serve, often = server.serve_forever, {"poll_interval": 0.02}
            threading.Thread(target=serve, kwargs=often, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What tests use

    def repo(self, id_: str) -> Repo:
        return self.repos[id_]

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A new token, of the form of real ones."""
        token = "hf_" + "".join(secrets.choice(string.ascii_letters) for _ in range(34))
        self._users[token] = User(name, role, orgs)
        return token

    def environment(self, home: Path) -> dict[str, str]:
        """All variables for another process: this one's, less huggingface_hub's, and ours."""
        theirs = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        switches = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token}
        ours |= dict.fromkeys(switches, "1")
        return kept | ours | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")

    def fail(self, method: str, path: str, status: int = 500, times: int | None = 1) -> None:
        """Answers matching requests with an error and does nothing else.

        Of all faults: `method` and `path` are patterns, `path` is searched in the unquoted path and
        query of both origins; `times` None means always. Of several that match a request, the
        oldest counts."""
        self._faults.append(_Fault(method, path, times, status=status))

    def cut(self, path: str, after_bytes: int, times: int | None = 1, method: str = ".*") -> None:
        """Closes the connection after that much of a body has come in.

        Shorter bodies pass and are not counted.
        """
        self._faults.append(_Fault(method, path, times, after_bytes=after_bytes))

    def lose_answer(self, method: str, path: str, times: int | None = 1) -> None:
        """Does what was asked and closes the connection instead of answering."""
        self._faults.append(_Fault(method, path, times, answer_lost=True))

    def wrong_etag(self, path: str) -> None:
        """From now on reports, everywhere, another hash than the content's for files whose path in
        the repository matches.
        """
        self._wrong_etags.append(path)

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self._wrong_etags.clear()

    def calls(self, method: str, path: str) -> list[Request]:
        """The part of the log that matches two patterns."""
        found = (request for request in self.requests if re.fullmatch(method, request.method))
        return [request for request in found if re.search(path, request.path)]

    # What routes and the handler use

    def shown(self, path: str, blob: Blob) -> Blob:
        """What is said of a file."""
        wrong = any(re.search(pattern, path) for pattern in self._wrong_etags)
        return replace(blob, sha256=blob.sha256[::-1], oid=blob.oid[::-1]) if wrong else blob

    def signed(self, path: str) -> str:
        """An address of the second origin."""
        return f"{self.storage}{path}?signature={self._signature(path)}"

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def fault(self, method: str, path: str) -> _Fault | None:
        for fault in list(self._faults):
            if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                return fault
        return None

    def spend(self, fault: _Fault) -> bool:
        """Whether a fault may happen now; counts it."""
        with self._lock:
            if fault.times is not None:
                fault.times -= 1
            if fault.times == 0 and fault in self._faults:
                self._faults.remove(fault)
            return fault.times is None or fault.times >= 0

    def answer(self, origin: str, call: Call, authorization: str | None) -> Reply:
        """The answer, errors included."""
        try:
            if origin == "hub":
                call.user = self._user(authorization)
            elif authorization or call.query.get("signature") != [self._signature(call.path)]:
                raise HubError(
                    400 if authorization else 403, "This origin wants a signed address and no token"
                )
            return self._route(origin, call)
        except HubError as error:
            return error.reply
        except (_Cut, ConnectionError):
            raise
        except Exception as error:
            self.problems.append(traceback.format_exc())
            return HubError(500, repr(error)).reply

    def _user(self, authorization: str | None) -> User | None:
        user = self._users.get((authorization or "").removeprefix("Bearer "))
        if authorization and user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _route(self, origin: str, call: Call) -> Reply:
        for method, pattern, function in ROUTES[origin]:
            found = pattern.fullmatch(call.path)
            if found and re.fullmatch(method, call.method):
                call.args = {
                    name: unquote(value or "") for name, value in found.groupdict().items()
                }
                if origin == "storage":  # long bodies, and nothing that others change
                    return function(call)
                with self._lock:
                    return function(call)
        self.problems.append(f"no route for {call.method} {call.path}")
        raise HubError(404, f"This server does not know {call.method} {call.path}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, origin: str, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub, self.origin = hub, origin
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news: `HubServer.answer` keeps what is."""


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    """HTTP: bodies, ranges, faults and the log."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self._received = self._sent = 0
        self._fault = hub.fault(self.command, unquote(self.path)) or _Fault("", "", 0)
        blocks = self._body()
        call = Call(hub, self.command, url.path, parse_qs(url.query), blocks)
        try:
            if self._fault.status and hub.spend(self._fault):
                reply = HubError(self._fault.status, "A fault of the tests").reply
            else:
                reply = hub.answer(self.server.origin, call, self.headers["Authorization"])
            for _ in blocks:  # what the route left unread would be taken for the next request
                pass
            if self._fault.answer_lost and hub.spend(self._fault):
                raise _Cut
            self._reply(reply)
        except _Cut:
            self._log(None)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> Iterator[bytes]:
        """The blocks of the request's body."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self._take(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self._take(min(left, BLOCK))
            left -= len(block)
            yield block

    def _take(self, size: int) -> bytes:
        limit = self._fault.after_bytes
        cut = (
            limit is not None
            and self._received + size > limit
            and self.server.hub.spend(self._fault)
        )
        block = self.rfile.read(limit - self._received if cut else size)
        self._received += len(block)
        if cut or len(block) < size:  # or the client went away
            raise _Cut
        return block

    def _reply(self, reply: Reply) -> None:
        """Sends an answer: the range of a file that was asked for, or all of it."""
        body, status, headers = reply.body, reply.status, dict(reply.headers)
        if not isinstance(body, Path):
            body = (
                body
                if isinstance(body, bytes)
                else b""
                if body is None
                else json.dumps(body).encode()
            )
            headers["Content-Type"] = "application/json; charset=utf-8"
            self._send(status, headers, body)
            return
        size, wanted = body.stat().st_size, self.headers["Range"]
        start, stop = _range(wanted, size)
        if start >= stop and wanted:
            self._send(416, {"Content-Range": f"bytes */{size}"}, b"")
            return
        if wanted:
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{size}"
        with body.open("rb") as file:  # a model of a test fits into memory
            file.seek(start)
            self._send(status, headers | {"Accept-Ranges": "bytes"}, file.read(stop - start))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._sent = 0 if self.command == "HEAD" else len(body)
        self._log(status)  # before the answer: who has it may read the log
        self.send_response(status)
        for name, value in (
            headers | {"Content-Length": str(len(body)), "X-Request-Id": secrets.token_hex(8)}
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: self._sent])

    def _log(self, status: int | None) -> None:
        authorized = "Authorization" in self.headers
        line = Request(
            self.server.origin,
            self.command,
            unquote(self.path),
            authorized,
            status,
            self._received,
            self._sent,
        )
        self.server.hub.requests.append(line)

    def log_message(self, *_: object) -> None:
        """`requests` is the log."""


def _range(wanted: str | None, size: int) -> tuple[int, int]:
    """Start and stop of "bytes=a-b", "bytes=a-" or "bytes=-n"."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not found:
        return 0, size
    first, last = found.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A small Hugging Face Hub on 127.0.0.1, for trying uploads by hand."
    )
    parser.add_argument("--root", type=Path, required=True, help="directory for the contents")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--user", default="me", help="who the token belongs to")
    arguments = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    with HubServer(arguments.root, user=arguments.user, port=arguments.port) as hub:
        print(
            f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} NO_PROXY=127.0.0.1", flush=True
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
