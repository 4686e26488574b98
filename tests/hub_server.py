"""A Hugging Face Hub for the tests: real HTTP on 127.0.0.1, two origins, models only.

In a test `with HubServer(directory) as hub:`; by hand `python tests/hub_server.py --root DIRECTORY`, which prints what to export. The
answers are those that huggingface_hub 2.4.0 and Transformers were seen to ask for; everything else is a 404 and is kept in `hub.unspoken`.

Files reach it in three ways, as the client chooses; none needs a setting here:
  regular  inside the commit (base64): what is small and text.
  lfs      PUT to the storage origin, which accepts signed addresses alone and refuses every token. The client wants it with
           HF_HUB_DISABLE_XET=1. Uploads can be cut and counted.
  xet      the client's default. The token names a directory (`local:///...`), hf_xet writes its chunks there, and the commit that names a file
           by its sha256 makes the server put it together with hf_xet. Same machine only; the chunks travel outside HTTP, so that no fault can
           be put there. Downloads are plain HTTP in all cases.
Access follows the Hub: a bad token is a 401 everywhere; a repository one may not see is missing (401 to a stranger, 404 to a user); writing
needs a token with the role "write" of an owner, and is a 403 otherwise; anyone with such a token may open a pull request.
A repository is a map from refs to commits, a commit an immutable map from paths to blobs: an upload moves one ref when everything is right.

Not spoken: datasets and Spaces, multipart uploads, .gitignore, pagination, copies within the Hub, resource groups, webhooks, rate limits. Of
`validate-yaml` only the rules that `_card_problems` lists. Needs the standard library, PyYAML and, for xet, hf_xet: huggingface_hub brings both.
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

__all__ = ["Blob", "Commit", "HubServer", "PullRequest", "Repo", "Request", "User"]

LFS_SIZE = 10 * 2**20  # a larger file is never regular
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.gguf", "*.npz", "*.npy", "*.parquet", "*.zip", "*.gz", "*.model")
ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
BLOCK = 64 * 1024


# What is stored


@dataclass(frozen=True)
class Blob:
    """A file: the content lies under its sha256, `oid` is git's name of it (of the pointer where it is an LFS file)."""

    size: int
    sha256: str
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    files: dict[str, Blob]
    title: str
    description: str
    author: str
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    date: str
    base: str  # the commit of main it started from
    status: str = "draft"
    merged: str | None = None  # the commit it became

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass(frozen=True)
class User:
    name: str
    token: str
    role: str  # of the token: "read" or "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A line of the log. `path` is unquoted and has the query; `status` is None where the connection was cut."""

    origin: str  # "hub" or "storage"
    method: str
    path: str
    had_authorization: bool
    status: int | None
    received: int  # bytes of the bodies
    sent: int


@dataclass
class Repo:
    id: str
    private: bool
    store: "_Store"
    created: str
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        return next((name for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision) if name in self.refs), None)

    def commit(self, revision: str = "main") -> Commit | None:
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        found = [oid for oid in self.commits if re.fullmatch("[0-9a-f]{7,40}", revision) and oid.startswith(revision)]
        return self.commits[found[0]] if len(found) == 1 else None

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits, newest first."""
        commit, found = self.commit(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found

    def tree(self, revision: str = "main") -> dict[str, Blob]:
        commit = self.commit(revision)
        assert commit is not None, f"{self.id} has no revision {revision}"
        return commit.files

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return {path: self.store.path(blob.sha256).read_bytes() for path, blob in self.tree(revision).items()}

    def advance(self, ref: str, files: dict[str, Blob], title: str, description: str, author: str) -> Commit:
        """Puts a commit on top of a ref. The assignment to `refs` is the only change anyone can see."""
        parent, date = self.refs.get(ref), _now()
        record = [parent, {path: blob.oid for path, blob in sorted(files.items())}, title, description, author, date]
        oid = hashlib.sha1(json.dumps(record).encode()).hexdigest()
        commit = Commit(oid, parent, dict(sorted(files.items())), title, description, author, date)
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def open_pull_request(self, title: str, description: str, author: str, status: str = "draft") -> PullRequest:
        number = len(self.pull_requests) + 1
        pull = PullRequest(number, title, description, author, _now(), self.refs["refs/heads/main"], status)
        self.pull_requests[number] = pull
        self.refs[pull.ref] = pull.base
        return pull


class _Store:
    """Contents by sha256, in a directory: complete or absent."""

    def __init__(self, root: Path):
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / sha256

    def add(self, blocks: Iterator[bytes]) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file:
            try:
                for block in blocks:
                    digest.update(block)
                    size += file.write(block)
            except BaseException:
                Path(file.name).unlink()
                raise
        os.replace(file.name, self.path(digest.hexdigest()))
        return digest.hexdigest(), size

    def regular(self, content: bytes) -> Blob:
        sha256, size = self.add(iter([content]))
        return Blob(size, sha256, _git_oid(content), lfs=False)

    def pointed(self, sha256: str) -> Blob:
        size = self.path(sha256).stat().st_size
        return Blob(size, sha256, _git_oid(_pointer(sha256, size)), lfs=True)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# Xet: a directory that hf_xet wrote


def _xet_files(directory: Path) -> dict[str, tuple[str, int]]:
    """sha256 -> (xet hash, bytes) of the files in the shards of a directory.

    A shard is records of 48 bytes: a header; then per file its hash, flags and number of segments, the segments, as many checks (flag 31) and the
    sha256 (flag 30); a record of 0xff ends the files. A hash is four little-endian words.
    """
    found = {}
    for shard in directory.glob("xet/xorbs/shards/*.mdb"):
        records = list(struct.iter_unpack("<32s4I", (data := shard.read_bytes())[: len(data) // 48 * 48]))
        at = 1
        while (head := records[at])[0] != b"\xff" * 32:
            hash_, flags, segments = head[:3]
            size = sum(record[2] for record in records[at + 1 : at + 1 + segments])
            at += 1 + segments * (2 if flags >> 31 else 1)
            if flags >> 30 & 1:
                found[_xet_hex(records[at][0])] = (_xet_hex(hash_), size)
                at += 1
    return found


def _xet_hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _xet_rebuild(directory: Path, hash_: str, size: int, target: Path) -> None:
    """Puts one file together, from a copy: the client may still hold the lock of its directory."""
    import hf_xet

    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(hf_xet.XetFileInfo(hash_, size), str(target))


# Requests and answers


class HubError(Exception):
    """Becomes an answer with the headers that the client turns into its exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: object):
        super().__init__(message)
        self.reply = Reply(status, {"error": message} | body, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))


@dataclass
class Reply:
    status: int = 200
    body: object = None  # bytes, a Path, or what JSON can say
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    """One request, parsed: what a route works with."""

    hub: "HubServer"
    method: str
    path: str  # as it came, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]
    blocks: Iterator[bytes]  # the body
    user: User | None = None
    args: dict[str, str] = field(default_factory=dict)

    def read(self) -> bytes:
        return b"".join(self.blocks)

    def json(self) -> dict:
        return json.loads(self.read() or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def signed_in(self) -> User:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def repo(self, need: str = "read") -> Repo:
        """The repository of the path. `need` is "read", "propose" (a pull request) or "write"."""
        repo, user = self.hub.repos.get(self.args["repo"]), self.user
        owner = repo is not None and user is not None and repo.namespace in (user.name, *user.orgs)
        if repo is None or (repo.private and not owner) or (need != "read" and user is None):
            raise (
                HubError(404, "Repository not found", "RepoNotFound")
                if user
                else HubError(401, "Invalid username or password.", "RepoNotFound")
            )
        if need != "read" and user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if need == "write" and not owner:
            raise HubError(403, f"Forbidden: you have no right to write to {repo.id}.")
        return repo

    def writable(self) -> tuple[Repo, str]:
        """Repository and ref of an upload: owners write anywhere, others to the pull request they opened or are about to open."""
        repo, revision = self.repo("propose"), self.args["rev"]
        ref = repo.ref(revision)
        mine = any(pull.ref == ref and pull.author == self.user.name for pull in repo.pull_requests.values())
        if not self.flag("create_pr") and not mine:
            self.repo("write")
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, ref

    def commit(self) -> tuple[Repo, Commit]:
        repo, revision = self.repo(), self.args.get("rev", "main")
        commit = repo.commit(revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit


Route = Callable[[Call], Reply]
ROUTES: dict[str, list[tuple[str, re.Pattern[str], Route]]] = {"hub": [], "storage": []}
REPO = "(?P<repo>[^/]+/[^/]+)"
API = f"/api/models/{REPO}"
REV = "(?P<rev>[^/]+)"  # a slash comes as %2F


def route(method: str, pattern: str, origin: str = "hub") -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        ROUTES[origin].append((method, re.compile(pattern), function))
        return function

    return register


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    user = call.signed_in()
    orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    return Reply(body={"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    user, wanted = call.signed_in(), call.json()
    namespace = wanted.get("organization") or user.name
    if user.role != "write" or namespace not in (user.name, *user.orgs):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if wanted.get("type", "model") != "model":
        raise HubError(400, "This server has models only")
    id_ = f"{namespace}/{wanted['name']}"
    url = {"url": f"{call.hub.endpoint}/{id_}", "name": id_, "id": id_}
    if id_ in call.hub.repos:
        raise HubError(409, "You already created this model repo", **url)
    repo = Repo(id_, wanted.get("visibility") == "private", call.hub.store, _now())
    repo.advance("refs/heads/main", {".gitattributes": call.hub.store.regular(ATTRIBUTES)}, "initial commit", "", user.name)
    call.hub.repos[id_] = repo
    return Reply(body=url)


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Reply:
    wanted = call.json()
    call.args["repo"] = f"{wanted.get('organization') or call.signed_in().name}/{wanted['name']}"
    del call.hub.repos[call.repo("write").id]
    return Reply()


@route("PUT", f"{API}/settings")
def settings(call: Call) -> Reply:
    repo, wanted = call.repo("write"), call.json()
    repo.private = wanted.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = wanted.get("gated", repo.gated)
    return Reply(body={"private": repo.private, "gated": repo.gated})


@route("GET", f"{API}/auth-check(?P<write>/write)?")
def auth_check(call: Call) -> Reply:
    call.repo("write" if call.args["write"] else "read")
    return Reply()


@route("GET", "/api/models")
def list_models(call: Call) -> Reply:
    """Those one may see, with all tags of `filter` and the `author`."""
    found, query = [], call.query
    for call.args["repo"], repo in call.hub.repos.items():
        owner = call.user is not None and repo.namespace in (call.user.name, *call.user.orgs)
        described = _describe(call, repo, repo.commit())
        tags = {tag for part in query.get("filter", []) for tag in part.split(",")}
        if (owner or not repo.private) and tags <= set(described["tags"]) and query.get("author", [repo.namespace]) == [repo.namespace]:
            found.append(described)
    return Reply(body=found)


@route("GET", f"{API}(/revision/{REV})?")
def model_info(call: Call) -> Reply:
    call.args["rev"] = call.args["rev"] or "main"
    return Reply(body=_describe(call, *call.commit()))


def _describe(call: Call, repo: Repo, commit: Commit) -> dict:
    files = {path: call.hub.shown(path, blob) for path, blob in commit.files.items()}
    siblings: list[dict] = [{"rfilename": path} for path in files]
    if call.flag("blobs"):
        for entry, blob in zip(siblings, files.values(), strict=True):
            entry |= {"size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(_pointer(blob.sha256, blob.size))}
    readme = commit.files.get("README.md")
    card = _front_matter(call.hub.store.path(readme.sha256).read_text()) if readme else {}
    main = repo.history()
    described = {
        "_id": repo.id, "id": repo.id, "modelId": repo.id, "author": repo.namespace, "sha": commit.oid, "lastModified": main[0].date,
        "createdAt": repo.created, "private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0,
        "usedStorage": sum(blob.size for blob in files.values()), "siblings": siblings, "cardData": card, "tags": _tags(card),
    }  # fmt: skip
    return described | {name: card[name] for name in ("pipeline_tag", "library_name") if name in card}


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tags(card: dict) -> list[str]:
    """The card's own, and those that the Hub derives from it."""
    tags = [*_listed(card.get("library_name")), *_listed(card.get("tags")), *(f"license:{name}" for name in _listed(card.get("license")))]
    relation = card.get("base_model_relation")
    for base in _listed(card.get("base_model")):
        tags += [f"base_model:{base}", *([f"base_model:{relation}:{base}"] if relation else [])]
    return list(dict.fromkeys(tags))


def _front_matter(text: str) -> dict:
    """The YAML between the first two lines of dashes. Raises what yaml raises."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(found[1]) if found else {}) or {}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    problems, card = [], None
    try:
        card = _front_matter(call.json()["content"])
        problems = _card_problems(card)
    except yaml.YAMLError as error:
        problems = [f"YAML: {error}"]
    if problems:
        return Reply(400, {"errors": [{"message": message} for message in problems], "warnings": []})
    warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    return Reply(body={"errors": [], "warnings": warnings})


def _card_problems(card: object) -> list[str]:
    if not isinstance(card, dict):
        return ["YAML must be an object"]
    found = [f'"{key}" must be a string' for key in ("license", "pipeline_tag", "library_name") if not isinstance(card.get(key, ""), str)]
    for key in ("tags", "datasets", "metrics"):
        found += [f'"{key}" must hold strings' for value in _listed(card.get(key)) if not isinstance(value, str)][:1]
    for base in _listed(card.get("base_model")):
        if not (isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)):
            found.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if card.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        found.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
    return found


# Refs and pull requests


@route("GET", f"{API}/refs")
def refs(call: Call) -> Reply:
    repo, wanted = call.repo(), {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    if call.flag("include_prs"):
        wanted["pullRequests"] = "refs/pr/"
    return Reply(
        body={
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in wanted.items()
        }
    )


@route("GET", f"{API}/commits/{REV}")
def commits(call: Call) -> Reply:
    repo, commit = call.commit()
    return Reply(
        body=[
            {"id": one.oid, "title": one.title, "message": one.description, "date": one.date, "authors": [{"user": one.author}]}
            for one in repo.history(commit.oid)
        ]
    )


@route("POST", f"{API}/branch/{REV}")
def create_branch(call: Call) -> Reply:
    repo, name = call.repo("write"), call.args["rev"]
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    if f"refs/heads/{name}" in repo.refs:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    call.args["rev"] = call.json().get("startingPoint") or "main"
    repo.refs[f"refs/heads/{name}"] = call.commit()[1].oid
    return Reply()


@route("POST", f"{API}/tag/{REV}")
def create_tag(call: Call) -> Reply:
    repo, name = call.repo("write"), f"refs/tags/{call.json()['tag']}"
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = call.commit()[1].oid
    return Reply()


@route("DELETE", f"{API}/(?P<kind>branch|tag)/{REV}")
def delete_ref(call: Call) -> Reply:
    repo, name = call.repo("write"), f"refs/{'heads' if call.args['kind'] == 'branch' else 'tags'}/{call.args['rev']}"
    if name == "refs/heads/main":
        raise HubError(403, "The default branch cannot be deleted")
    if name not in repo.refs:
        raise HubError(404, f"Invalid rev id: {call.args['rev']}", "RevisionNotFound")
    del repo.refs[name]
    return Reply()


@route("POST", f"{API}/discussions")
def open_discussion(call: Call) -> Reply:
    repo, wanted = call.repo("propose"), call.json()
    if not wanted.get("pullRequest"):
        raise HubError(400, "This server has pull requests only")
    pull = repo.open_pull_request(wanted["title"], wanted["description"], call.user.name)
    return Reply(body={"num": pull.num, "pullRequest": True, "url": f"{call.hub.endpoint}/{repo.id}/discussions/{pull.num}"})


def _pull_request(call: Call, need: str = "read") -> tuple[Repo, PullRequest]:
    repo = call.repo(need)
    pull = repo.pull_requests.get(int(call.args["num"]))
    if pull is None:
        raise HubError(404, "No discussion with this number")
    return repo, pull


@route("GET", f"{API}/discussions")
def discussions(call: Call) -> Reply:
    found = [_discussion(call.repo(), pull) for pull in call.repo().pull_requests.values()]
    return Reply(body={"discussions": found, "count": len(found), "start": 0})


@route("GET", f"{API}/discussions/(?P<num>\\d+)")
def discussion(call: Call) -> Reply:
    return Reply(body=_discussion(*_pull_request(call)))


def _discussion(repo: Repo, pull: PullRequest) -> dict:
    author = {"author": {"name": pull.author}, "createdAt": pull.date}
    comment = {"edited": False, "hidden": False, "latest": {"raw": pull.description}}
    events = [{"id": f"{pull.num}-0", "type": "comment", "data": comment, **author}]
    own = [commit for commit in repo.history(pull.ref) if commit not in repo.history(pull.base)]
    events += [{"id": one.oid, "type": "commit", "data": {"subject": one.title, "oid": one.oid}, **author} for one in reversed(own)]
    return {
        "title": pull.title, "num": pull.num, "status": pull.status, "repo": {"name": repo.id, "type": "model"}, "isPullRequest": True,
        "events": events, "diff": "", "filesWithConflicts": _conflicts(repo, pull),
        "changes": {"base": "refs/heads/main", "mergeCommitId": pull.merged}, **author,
    }  # fmt: skip


def _changes(repo: Repo, pull: PullRequest) -> dict[str, Blob | None]:
    """Path -> new blob, None where the pull request deletes it."""
    before, after = repo.tree(pull.base), repo.tree(pull.ref)
    return {path: after.get(path) for path in before | after if before.get(path) != after.get(path)}


def _conflicts(repo: Repo, pull: PullRequest) -> list[str]:
    before, main = repo.tree(pull.base), repo.tree()
    return [] if pull.merged else [path for path in _changes(repo, pull) if main.get(path) != before.get(path)]


@route("POST", f"{API}/discussions/(?P<num>\\d+)/status")
def change_status(call: Call) -> Reply:
    _, pull = _pull_request(call, "write")
    pull.status = call.json()["status"]
    change = {"id": f"{pull.num}-s", "type": "status-change", "data": {"status": pull.status}}
    return Reply(body={"newStatus": change | {"author": {"name": pull.author}, "createdAt": _now()}})


@route("POST", f"{API}/discussions/(?P<num>\\d+)/merge")
def merge(call: Call) -> Reply:
    repo, pull = _pull_request(call, "write")
    if pull.status != "open":
        raise HubError(400, f"This pull request is {pull.status}; only an open one can be merged")
    if conflicts := _conflicts(repo, pull):
        raise HubError(409, f"Merge conflicts in {', '.join(conflicts)}")
    files = {path: blob for path, blob in (repo.tree() | _changes(repo, pull)).items() if blob is not None}
    commit = repo.advance("refs/heads/main", files, f"{pull.title} (#{pull.num})", pull.description, call.user.name)
    pull.status, pull.merged = "merged", commit.oid
    return Reply(body={})


# Uploads


@route("POST", f"{API}/preupload/{REV}")
def preupload(call: Call) -> Reply:
    repo, ref = call.writable()
    files, answers = repo.tree(ref), []
    for file in call.json()["files"]:
        binary = b"\0" in base64.b64decode(file["sample"])
        lfs = binary or file["size"] > LFS_SIZE or any(fnmatch(file["path"].rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)
        answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if (there := files.get(file["path"])) is not None and there.lfs == lfs:
            answer["oid"] = there.etag
        answers.append(answer)
    return Reply(body={"files": answers})


@route("POST", f"/{REPO}\\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    """Without "actions" where the content is here already: that is what makes a second attempt cheap."""
    repo, objects = call.repo("propose"), []
    for wanted in call.json()["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not call.hub.store.path(wanted["oid"]).exists():
            verify = {"href": f"{call.hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": {"href": call.hub.signed(f"/upload/{repo.id}/{wanted['oid']}")}, "verify": verify}
        objects.append(entry)
    return Reply(body={"transfer": "basic", "objects": objects})


@route("POST", f"/{REPO}\\.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Reply:
    call.repo("propose")
    wanted = call.json()
    path = call.hub.store.path(wanted["oid"])
    if not path.exists() or path.stat().st_size != wanted["size"]:
        raise HubError(404, f"Object {wanted['oid']} was not uploaded")
    return Reply(body={})


@route("GET", f"{API}/xet-write-token/{REV}")
def xet_write_token(call: Call) -> Reply:
    """A directory for each upload: two clients would wait for each other's lock in one."""
    if not call.flag("create_pr"):
        call.writable()
    call.repo("propose")
    directory = call.hub.xet_directory()
    return Reply(body={"casUrl": f"local://{directory}", "exp": int(time.time()) + 24 * 3600, "accessToken": secrets.token_hex()})


@route("POST", f"{API}/commit/{REV}")
def commit(call: Call) -> Reply:
    repo, ref = call.writable()
    header, *operations = [json.loads(line) for line in call.read().splitlines() if line]
    header = header["value"]
    parent = header.get("parentCommit")
    if parent is not None and not repo.refs[ref].startswith(parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.tree(ref))
    for operation in operations:
        _apply(call.hub, files, operation["key"], operation["value"])
    pull = None
    if call.flag("create_pr"):
        pull = repo.open_pull_request(header["summary"], header.get("description", ""), call.user.name, status="open")
        ref = pull.ref
    made = repo.advance(ref, files, header["summary"], header.get("description", ""), call.user.name)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.endpoint}/{repo.id}/commit/{made.oid}"}
    return Reply(body=answer | ({"pullRequestUrl": f"{call.hub.endpoint}/{repo.id}/discussions/{pull.num}"} if pull else {}))


def _apply(hub: "HubServer", files: dict[str, Blob], key: str, value: dict) -> None:
    """One operation of a commit, on a copy of the tree."""
    path = value["path"]
    if key == "file":
        files[path] = hub.store.regular(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if not hub.has(value["oid"]):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = hub.store.pointed(value["oid"])
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path.rstrip("/") + "/"))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation {key}")


# Downloads


@route("GET", f"{API}/tree/{REV}(/(?P<path>.+))?")
def tree(call: Call) -> Reply:
    repo, commit = call.commit()
    below = f"{call.args['path']}/" if call.args["path"] else ""
    names = [name for name in commit.files if name.startswith(below)]
    if below and not names:
        raise _missing(call.args["path"], commit)
    paths = {
        below + "/".join(parts[: depth + 1]): None
        for name in names
        for parts in [name.removeprefix(below).split("/")]
        for depth in range(len(parts))
    }
    if not call.flag("recursive"):
        paths = {path: None for path in paths if "/" not in path.removeprefix(below)}
    return Reply(body=[_entry(call, repo, commit, path, call.flag("expand")) for path in paths])


@route("POST", f"{API}/paths-info/{REV}")
def paths_info(call: Call) -> Reply:
    repo, commit = call.commit()
    form = parse_qs(call.read().decode())
    folders = {"/".join(name.split("/")[:depth]) for name in commit.files for depth in range(1, name.count("/") + 1)}
    found = [path for path in form.get("paths", []) if path in commit.files or path in folders]
    return Reply(body=[_entry(call, repo, commit, path, form.get("expand", [""])[0].lower() == "true") for path in found])


def _entry(call: Call, repo: Repo, commit: Commit, path: str, expand: bool) -> dict:
    """A line of a listing: a file, or a folder."""
    inside = {name: blob.oid for name, blob in commit.files.items() if name.startswith(f"{path}/")}
    if path in commit.files:
        blob = call.hub.shown(path, commit.files[path])
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(_pointer(blob.sha256, blob.size))}
    else:
        entry = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(json.dumps(inside).encode()).hexdigest()}
    if expand:
        last = _last_change(repo.history(commit.oid), [path, *inside])
        entry["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return entry


def _last_change(history: list[Commit], paths: list[str]) -> Commit:
    for newer, older in zip(history, history[1:], strict=False):
        if any(newer.files.get(path) != older.files.get(path) for path in paths):
            return newer
    return history[-1]


def _missing(path: str, commit: Commit) -> HubError:
    error = HubError(404, f"{path} does not exist", "EntryNotFound")
    error.reply.headers["X-Repo-Commit"] = commit.oid  # the client keeps what is missing in its cache, by commit
    return error


@route("HEAD|GET", f"/{REPO}/resolve/{REV}/(?P<path>.+)")
def resolve(call: Call) -> Reply:
    repo, commit = call.commit()
    path = call.args["path"]
    if repo.gated and (call.user is None or repo.namespace not in (call.user.name, *call.user.orgs)):
        raise HubError(403 if call.user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
    if path not in commit.files:
        raise _missing(path, commit)
    blob, shown = commit.files[path], call.hub.shown(path, commit.files[path])
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{shown.etag}"', "Accept-Ranges": "bytes"}
    if not blob.lfs:
        return Reply(200, call.hub.store.path(blob.sha256), headers)
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
    return Reply(302, b"", headers | {"Location": call.hub.signed(f"/objects/{blob.sha256}/{quote(path, safe='')}")})


@route("HEAD|GET", "/objects/(?P<oid>[0-9a-f]{64})/.+", origin="storage")
def download(call: Call) -> Reply:
    return Reply(200, call.hub.store.path(call.args["oid"]), {"ETag": f'"{call.args["oid"]}"', "Accept-Ranges": "bytes"})


@route("PUT", f"/upload/{REPO}/(?P<oid>[0-9a-f]{{64}})", origin="storage")
def upload(call: Call) -> Reply:
    got, _ = call.hub.store.add(call.blocks)
    if got != call.args["oid"]:
        raise HubError(400, f"The content has the sha256 {got}")
    return Reply(headers={"ETag": f'"{got}"'})


# The server


@dataclass
class _Fault:
    method: str
    path: re.Pattern[str]
    times: int | None  # None: always
    status: int | None = None
    after_bytes: int | None = None
    seconds: float = 0


class HubServer:
    """See the module. `token` may write as the user `user`; everything is public API of the tests except what starts with "_".

    Attributes:
        endpoint: of the Hub, for HF_ENDPOINT; `storage` is the second origin.
        requests: the log, in the order of the answers.
        unspoken: "METHOD path" of requests that no route knew.
        repos: by id.
    """

    def __init__(self, root: Path, *, user: str = "me", port: int = 0):
        self.root, self.user = root, user
        self.store = _Store(root / "objects")
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.unspoken: list[str] = []
        self.lock = threading.RLock()
        self._users: dict[str, User] = {}
        self._faults: list[_Fault] = []
        self._wrong_etags: list[re.Pattern[str]] = []
        self._xet: list[Path] = []
        self._secret = secrets.token_bytes()
        self.token = self.add_user(user)
        self._servers = {"hub": _Server(self, "hub", port), "storage": _Server(self, "storage", 0)}
        self.endpoint, self.storage = (server.url for server in self._servers.values())

    def __enter__(self) -> "HubServer":
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    # for tests

    def repo(self, id_: str) -> Repo:
        return self.repos[id_]

    def add_user(self, name: str, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A new token of that user, in the form of a real one."""
        token = "hf_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(34))
        self._users[token] = User(name, token, role, orgs)
        return token

    def environment(self, home: Path, token: str | None = None, *, xet: bool = False) -> dict[str, str]:
        """Variables for another process, over those of this one. `token` "" means none."""
        ours = {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token if token is None else token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": str(int(not xet)), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        foreign = [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]
        return {name: value for name, value in os.environ.items() if name not in foreign} | ours

    def fail(self, method: str, path: str, status: int = 500, times: int | None = 1) -> None:
        """Answers matching requests with an error. `path` is searched in the unquoted path and query, of both origins; None: every time."""
        self._faults.append(_Fault(method, re.compile(path), times, status=status))

    def cut(self, path: str, after_bytes: int, times: int | None = 1, method: str = ".*") -> None:
        """Closes the connection when that much of a body has come in (uploads) or gone out (downloads). Shorter bodies pass."""
        self._faults.append(_Fault(method, re.compile(path), times, after_bytes=after_bytes))

    def slow(self, path: str, seconds: float, times: int | None = 1, method: str = ".*") -> None:
        """Waits before it answers."""
        self._faults.append(_Fault(method, re.compile(path), times, seconds=seconds))

    def wrong_etag(self, path: str) -> None:
        """From now on reports another hash than the content's for matching files, everywhere; the content stays right."""
        self._wrong_etags.append(re.compile(path))

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()
        self._wrong_etags.clear()

    def calls(self, method: str, path: str) -> list[Request]:
        """The matching part of the log."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]

    # for routes

    def shown(self, path: str, blob: Blob) -> Blob:
        if any(pattern.search(path) for pattern in self._wrong_etags):
            return replace(blob, sha256=blob.sha256[::-1], oid=blob.oid[::-1])
        return blob

    def signed(self, path: str) -> str:
        return f"{self.storage}{path}?signature={self._signature(path)}"

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def xet_directory(self) -> Path:
        directory = self.root.absolute() / "xet" / str(len(self._xet))
        directory.mkdir(parents=True)
        self._xet.append(directory)
        return directory

    def has(self, sha256: str) -> bool:
        """Whether the content is here; takes it in first where it came by xet."""
        target = self.store.path(sha256)
        for directory in () if target.exists() else reversed(self._xet):
            hash_, size = _xet_files(directory).get(sha256, (None, 0))
            if hash_ is not None:
                rebuilt = target.with_suffix(".xet")
                _xet_rebuild(directory, hash_, size, rebuilt)
                rebuilt.rename(target)
                break
        return target.exists()

    def _fault(self, method: str, path: str) -> _Fault | None:
        with self.lock:
            for fault in self._faults:
                if re.fullmatch(fault.method, method) and fault.path.search(path):
                    if fault.times is not None:
                        fault.times -= 1
                        if not fault.times:
                            self._faults.remove(fault)
                    return fault
        return None

    def answer(self, origin: str, call: Call) -> Reply:
        """Who asks, what for: the answer, errors included."""
        try:
            token = call.headers.get("authorization", "").removeprefix("Bearer ")
            if origin == "storage":
                if token or call.query.get("signature") != [self._signature(call.path)]:
                    raise HubError(400 if token else 403, "The storage wants a signed address and no token")
            elif token:
                call.user = self._users.get(token)
                if call.user is None:
                    raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES[origin]:
                found = pattern.fullmatch(call.path) if re.fullmatch(method, call.method) else None
                if found:
                    call.args = {name: unquote(value or "") for name, value in found.groupdict().items()}
                    if origin == "storage":
                        return function(call)
                    with self.lock:
                        return function(call)
            self.unspoken.append(f"{call.method} {call.path}")
            raise HubError(404, f"This server does not know {call.method} {call.path}")
        except HubError as error:
            return error.reply


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, origin: str, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub, self.origin = hub, origin
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    """HTTP: bodies, ranges, faults and the log."""

    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        self._received = self._sent = 0
        self._status: int | None = None
        self._fault = hub._fault(self.command, unquote(self.path)) or _Fault("", re.compile(""), None)
        time.sleep(self._fault.seconds)
        blocks = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(hub, self.command, url.path, parse_qs(url.query), headers, blocks)
        try:
            if self._fault.status:
                reply = HubError(self._fault.status, "A fault of the tests").reply
            else:
                reply = hub.answer(self.server.origin, call)
            for _ in blocks:  # what the route left unread would be taken for the next request
                pass
            self._reply(reply, headers.get("range"))
        except _Cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            self._log(None)

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
        if limit is not None and self._received + size > limit:
            self.rfile.read(limit - self._received)
            self._received = limit
            raise _Cut
        block = self.rfile.read(size)
        if len(block) < size:
            raise _Cut  # the client went away
        self._received += size
        return block

    def _reply(self, reply: Reply, wanted: str | None) -> None:
        body, headers = reply.body, dict(reply.headers)
        if isinstance(body, Path):
            size = body.stat().st_size
            start, stop = _range(wanted, size)
            if start >= stop and wanted:
                reply, start, stop = HubError(416, "Range not satisfiable").reply, 0, 0
                headers["Content-Range"] = f"bytes */{size}"
            elif wanted:
                reply.status = 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        else:
            body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
            start, stop = 0, len(body)
        self._send(reply.status, headers, body, start, stop)

    def _send(self, status: int, headers: dict[str, str], body: bytes | Path, start: int, stop: int) -> None:
        limit = self._fault.after_bytes
        cut = limit is not None and self.command == "GET" and stop - start > limit
        self._sent = 0 if self.command == "HEAD" else limit if cut else stop - start
        if not cut:
            self._log(status)  # before the answer: who has it may read the log
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in (headers | {"Content-Length": str(stop - start), "X-Request-Id": secrets.token_hex(8)}).items():
            self.send_header(name, value)
        self.end_headers()
        if isinstance(body, Path):
            with body.open("rb") as file:
                file.seek(start)
                for at in range(0, self._sent, BLOCK):
                    self.wfile.write(file.read(min(BLOCK, self._sent - at)))
        else:
            self.wfile.write(body[start : start + self._sent])
        if cut:
            raise _Cut

    def _log(self, status: int | None) -> None:
        authorized = "Authorization" in self.headers
        line = Request(self.server.origin, self.command, unquote(self.path), authorized, status, self._received, self._sent)
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
    parser = argparse.ArgumentParser(description="A small Hugging Face Hub on 127.0.0.1, for trying uploads by hand.")
    parser.add_argument("--root", type=Path, required=True, help="directory for the contents; the history is lost when the server ends")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--user", default="me", help="who the token belongs to")
    arguments = parser.parse_args()
    with HubServer(arguments.root, user=arguments.user, port=arguments.port) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={hub.token} NO_PROXY=127.0.0.1", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
