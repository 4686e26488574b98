"""What the Hub of the tests answers: one function per request that huggingface_hub 2.4.0 and
Transformers were seen to make.

A route takes a `Call` and returns a `Reply` or raises `HubError`, which carries the headers that
the client turns into its exceptions. Nothing here knows sockets: hub_server.py finds the user of
the token, calls the route and sends what it returned.

Access follows the Hub: a repository that one may not see is missing (401 to a stranger, 404 to a
user); writing needs an owner's token with the role "write" and is a 403 otherwise; anyone with such
a token may open a pull request and upload to it.

Left out: datasets and Spaces, discussions without changes, multipart uploads, .gitignore, pages of
long listings, copies within the Hub, resource groups, rate limits. Of `validate-yaml` only the
rules of `_card_problems`.
"""

import base64
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING
from urllib.parse import quote

import yaml
from hub_storage import Blob, Commit, Repo

if TYPE_CHECKING:
    from hub_server import HubServer

__all__ = ["ROUTES", "Call", "HubError", "Reply", "User"]

LICENSES = ("mit", "apache-2.0", "llama2", "other")  # of ninety
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LFS_SIZE = 10 * 2**20  # a larger file is never regular; nor is a binary one
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.onnx", "*.gguf", "*.npz", "*.zip", "*.model")
ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS
).encode()


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and what it allows."""

    name: str
    role: str  # "read" or "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo: Repo) -> bool:
        return repo.namespace in (self.name, *self.orgs)


@dataclass
class Reply:
    status: int = 200
    body: object = None  # a Path for a file; bytes; or what JSON can say
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that is an error.

    `code` decides the exception in the client; `body` goes beside the message.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **body: object):
        super().__init__(message)
        line = " ".join(message.split()).encode("ascii", "replace").decode()  # headers hold no more
        headers = {"X-Error-Message": line} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(status, {"error": message} | body, headers)


@dataclass
class Call:
    """One request, parsed: all that a route works with."""

    hub: "HubServer"
    method: str
    path: str  # as it came, without the query
    query: dict[str, list[str]]
    blocks: Iterator[bytes]  # the body
    user: User | None = None
    # the groups of the route's pattern, unquoted
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
        hidden = repo is None or (repo.private and not (user and user.owns(repo)))
        if hidden or (need != "read" and user is None):
            raise HubError(
                *(404, "Repository not found") if user else (401, "Invalid username or password."),
                "RepoNotFound",
            )
        if need != "read" and user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if need == "write" and not user.owns(repo):
            raise HubError(403, f"Forbidden: you have no right to write to {repo.id}.")
        return repo

    def commit(self) -> tuple[Repo, Commit]:
        """Repository and commit of the path."""
        repo, revision = self.repo(), self.args.get("rev") or "main"
        commit = repo.commit(revision)
        if commit is None:
            raise _no_revision(revision)
        return repo, commit

    def target(self) -> tuple[Repo, str]:
        """Repository and ref of an upload: owners write anywhere, others to a pull request that
        they opened or are about to open.
        """
        repo, revision = self.repo("propose"), self.args["rev"]
        ref = repo.ref(revision)
        mine = any(
            pull.ref == ref and pull.author == self.user.name
            for pull in repo.pull_requests.values()
        )
        if not self.flag("create_pr") and not mine:
            self.repo("write")
        if ref is None:
            raise _no_revision(revision)
        return repo, ref


def _no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


Route = Callable[[Call], Reply]
ROUTES: dict[str, list[tuple[str, re.Pattern[str], Route]]] = {"hub": [], "storage": []}
REPO = "(?P<repo>[^/]+/[^/]+)"
API = f"/api/models/{REPO}"
REV = "(?P<rev>[^/]+)"  # a slash comes as %2F
NUM = r"(?P<num>\d+)"


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
    return Reply(body={"type": "user", "name": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    user, wanted = call.signed_in(), call.json()
    id_ = f"{wanted.get('organization') or user.name}/{wanted['name']}"
    repo = Repo(id_, wanted.get("visibility") == "private", call.hub.store)
    if user.role != "write" or not user.owns(repo):
        message = "You don't have the rights to create a model under the namespace"
        raise HubError(403, f'{message} "{repo.namespace}"')
    answer = {"url": f"{call.hub.endpoint}/{repo.id}", "name": repo.id, "id": repo.id}
    if repo.id in call.hub.repos:
        raise HubError(409, "You already created this model repo", **answer)
    files = {".gitattributes": repo.store.regular(ATTRIBUTES)}
    repo.advance("refs/heads/main", files, "initial commit", "", user.name)
    call.hub.repos[repo.id] = repo
    return Reply(body=answer)


@route("GET", f"{API}/auth-check(?P<write>/write)?")
def auth_check(call: Call) -> Reply:
    call.repo("write" if call.args["write"] else "read")
    return Reply()


@route("GET", f"{API}(/revision/{REV})?")
def model_info(call: Call) -> Reply:
    repo, commit = call.commit()
    readme = commit.files.get("README.md")
    card = _front_matter(repo.store.path(readme.sha256).read_text()) if readme else {}
    return Reply(
        body={
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.oid,
            "lastModified": repo.history()[0].date,
            "private": repo.private,
            "siblings": [{"rfilename": path} for path in commit.files],
            "cardData": card,
            "tags": _tags(card),
        }
    )


# Cards


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tags(card: dict) -> list[str]:
    """The card's own, and those that the Hub derives from it."""
    tags = [
        *_listed(card.get("library_name")),
        *_listed(card.get("tags")),
        *(f"license:{name}" for name in _listed(card.get("license"))),
    ]
    relation = card.get("base_model_relation")
    for base in _listed(card.get("base_model")):
        tags += [f"base_model:{base}", *([f"base_model:{relation}:{base}"] if relation else [])]
    return list(dict.fromkeys(tags))


def _front_matter(text: str) -> dict:
    """The YAML between the first two lines of dashes."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(found[1]) if found else {}) or {}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    errors = [{"message": message} for message in _card_problems(call.json()["content"])]
    return Reply(400 if errors else 200, {"errors": errors, "warnings": []})


def _card_problems(text: str) -> list[str]:
    try:
        card = _front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(card, dict):
        return ["YAML must be an object"]
    strings = ("tags", "datasets", "metrics", "license", "pipeline_tag", "library_name")
    found = [
        f'"{key}" must hold strings'
        for key in strings
        if not all(isinstance(value, str) for value in _listed(card.get(key)))
    ]
    bases = _listed(card.get("base_model"))
    if not all(isinstance(base, str) and ID.fullmatch(base) for base in bases):
        found.append(f'"base_model" with value "{bases}" is not valid. Use a model id')
    if card.get("license", "mit") not in LICENSES:
        found.append(f'"license" must be one of [{", ".join(LICENSES)}]')
    if card.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        found.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
    return found


# Refs and pull requests


@route("POST", f"{API}/branch/{REV}")
def create_branch(call: Call) -> Reply:
    repo, name = call.repo("write"), call.args["rev"]
    if name.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {name}")
    if f"refs/heads/{name}" in repo.refs:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    call.args["rev"] = call.json().get("startingPoint", "main")
    repo.refs[f"refs/heads/{name}"] = call.commit()[1].oid
    return Reply()


@route("POST", f"{API}/discussions")
def open_pull_request(call: Call) -> Reply:
    repo, wanted = call.repo("propose"), call.json()
    if not wanted.get("pullRequest"):
        raise HubError(400, "This server has pull requests only")
    pull = repo.open_pull_request(wanted["title"], wanted["description"], call.user.name)
    url = f"{call.hub.endpoint}/{repo.id}/discussions/{pull.num}"
    return Reply(body={"num": pull.num, "pullRequest": True, "url": url})


@route("GET", f"{API}/discussions/{NUM}")
def pull_request(call: Call) -> Reply:
    repo = call.repo()
    pull = repo.pull_requests[int(call.args["num"])]
    facts = {"title": pull.title, "num": pull.num, "status": "draft", "createdAt": pull.date}
    facts |= {"author": {"name": pull.author}, "repo": {"name": repo.id, "type": "model"}}
    facts |= {"isPullRequest": True, "changes": {"base": "refs/heads/main"}}
    return Reply(body=facts | {"filesWithConflicts": [], "diff": "", "events": []})


# Uploads


@route("POST", f"{API}/preupload/{REV}")
def preupload(call: Call) -> Reply:
    repo, ref = call.target()
    files, answers = repo.tree(ref), []
    for file in call.json()["files"]:
        name, there = file["path"].rpartition("/")[2], files.get(file["path"])
        lfs = b"\0" in base64.b64decode(file["sample"]) or file["size"] > LFS_SIZE
        lfs = lfs or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)
        mode = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        known = there and there.lfs == lfs
        oid = {"oid": call.hub.shown(file["path"], there).etag} if known else {}
        answers.append({"path": file["path"]} | mode | oid)
    return Reply(body={"files": answers})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    """Without "actions" where the content is here already: that is what makes a second attempt
    cheap.
    """
    repo, objects = call.repo("propose"), []
    for wanted in call.json()["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if not call.hub.store.has(wanted["oid"]):
            verify = f"{call.hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"
            upload = call.hub.signed(f"/upload/{repo.id}/{wanted['oid']}")
            entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        objects.append(entry)
    return Reply(body={"transfer": "basic", "objects": objects})


@route("PUT", f"/upload/{REPO}/(?P<oid>[0-9a-f]{{64}})", origin="storage")
def upload(call: Call) -> Reply:
    got = call.hub.store.add(call.blocks)
    if got != call.args["oid"]:
        raise HubError(400, f"The content has the sha256 {got}")
    return Reply(headers={"ETag": f'"{got}"'})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Reply:
    call.repo("propose")
    oid = call.json()["oid"]
    if not call.hub.store.has(oid):
        raise HubError(404, f"Object {oid} was not uploaded")
    return Reply()


@route("GET", f"{API}/xet-write-token/{REV}")
def xet_write_token(call: Call) -> Reply:
    if call.flag("create_pr"):
        call.repo("propose")
    else:
        call.target()
    url, expires = f"local://{call.hub.store.xet_directory()}", int(time.time()) + 24 * 3600
    return Reply(body={"casUrl": url, "exp": expires, "accessToken": secrets.token_hex()})


@route("POST", f"{API}/commit/{REV}")
def commit(call: Call) -> Reply:
    """All operations on a copy of the tree; then one ref moves."""
    repo, ref = call.target()
    header, *operations = [json.loads(line) for line in call.read().splitlines() if line]
    summary, description = (header["value"].get(key, "") for key in ("summary", "description"))
    files = dict(repo.tree(ref))
    for operation in operations:
        _apply(call.hub, files, operation["key"], operation["value"])
    answer = {"success": True}
    if call.flag("create_pr"):
        pull = repo.open_pull_request(summary, description, call.user.name)
        ref, url = pull.ref, f"{call.hub.endpoint}/{repo.id}/discussions/{pull.num}"
        answer["pullRequestUrl"] = url
    oid = repo.advance(ref, files, summary, description, call.user.name).oid
    return Reply(
        body=answer | {"commitOid": oid, "commitUrl": f"{call.hub.endpoint}/{repo.id}/commit/{oid}"}
    )


def _apply(hub: "HubServer", files: dict[str, Blob], key: str, value: dict) -> None:
    """One operation of a commit."""
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        if path == "README.md" and (problems := _card_problems(content.decode())):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(problems)}")
        files[path] = hub.store.regular(content)
    elif key == "lfsFile":
        if not hub.store.has(value["oid"]):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = hub.store.pointed(value["oid"])
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    else:
        raise HubError(400, f"Unknown operation {key}")


# Downloads


@route("GET", f"{API}/tree/{REV}(/(?P<path>.+))?")
def tree(call: Call) -> Reply:
    _, commit = call.commit()
    below = f"{call.args['path']}/" if call.args["path"] else ""
    paths = [path for path in commit.files if path.startswith(below)]
    if below and not paths:
        raise _missing(call.args["path"], commit)
    if not call.flag("recursive"):
        paths = [path for path in paths if "/" not in path.removeprefix(below)]
    entries = []
    for path in paths:
        blob = call.hub.shown(path, commit.files[path])
        lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
        entries.append(entry | ({"lfs": lfs} if blob.lfs else {}))
    return Reply(body=entries)


def _missing(path: str, commit: Commit) -> HubError:
    error = HubError(404, f"{path} does not exist", "EntryNotFound")
    # the client keeps what is missing in its cache, by commit
    error.reply.headers["X-Repo-Commit"] = commit.oid
    return error


@route("HEAD|GET", f"/{REPO}/resolve/{REV}/(?P<path>.+)")
def resolve(call: Call) -> Reply:
    repo, commit = call.commit()
    path = call.args["path"]
    if path not in commit.files:
        raise _missing(path, commit)
    blob = commit.files[path]
    etag = f'"{call.hub.shown(path, blob).etag}"'
    headers = {"X-Repo-Commit": commit.oid, "ETag": etag}
    if not blob.lfs:
        return Reply(200, repo.store.path(blob.sha256), headers)
    location = call.hub.signed(f"/objects/{blob.sha256}/{quote(path, safe='')}")
    linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(blob.size), "Location": location}
    return Reply(302, b"", headers | linked)


@route("HEAD|GET", "/objects/(?P<oid>[0-9a-f]{64})/.+", origin="storage")
def download(call: Call) -> Reply:
    return Reply(200, call.hub.store.path(call.args["oid"]), {"ETag": f'"{call.args["oid"]}"'})
