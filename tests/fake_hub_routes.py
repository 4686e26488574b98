"""What the Hub of the tests answers: one function per request that huggingface_hub 2.4.0 and
Transformers were seen to make.

A route takes a `Call` and returns a `Reply` or raises `HubError`, which carries the headers that
the client turns into its exceptions.

Access follows the Hub: a repository that one may not see is missing (401 to a stranger, 404 to a
user); writing needs an owner's token with the role "write" and is a 403 otherwise; anyone with such
a token may open a pull request and upload to it.
"""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml
from fake_hub_storage import Blob, Commit, Repo

if TYPE_CHECKING:
    from fake_hub import FakeHub

__all__ = ["ROUTES", "Call", "HubError", "Reply", "User"]

LICENSES = ("mit", "apache-2.0", "llama2", "other")  # of ninety
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LFS_SIZE = 10 * 2**20  # a larger file is never regular; nor is a binary one
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.onnx", "*.gguf", "*.npz", "*.zip", "*.model")


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and what it allows."""

    name: str
    role: str  # "read" or "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


@dataclass
class Reply:
    status: int = 200
    body: Any = b""  # bytes, or what JSON can say
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

    hub: "FakeHub"
    content: bytes
    query: dict[str, list[str]]
    user: User | None = None
    args: dict[str, str] = field(default_factory=dict)  # the groups of the route's pattern

    def json(self) -> dict:
        return json.loads(self.content or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def repo(self, need: str = "read") -> Repo:
        """The repository of the path. `need` is "read", "propose" (a pull request) or "write"."""
        repo, user = self.hub.repos.get(self.args["repo"]), self.user
        hidden = repo is None or (repo.private and not (user and user.owns(repo.id)))
        if hidden or (need != "read" and user is None):
            status = 404 if user else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        if need != "read" and user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if need == "write" and not user.owns(repo.id):
            raise HubError(403, f"Forbidden: you have no right to write to {repo.id}.")
        return repo

    def commit(self) -> tuple[Repo, Commit]:
        """Repository and commit of the path."""
        repo, revision = self.repo(), self.args.get("rev") or "main"
        if (commit := repo.commit(revision)) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def target(self) -> tuple[Repo, str]:
        """Repository and ref of an upload: owners write anywhere, others to a pull request that
        they opened or are about to open.
        """
        repo, ref = self.repo("propose"), self.commit()[0].ref(self.args["rev"])
        if not self.flag("create_pr") and repo.pull_requests.get(ref) != self.user.name:
            self.repo("write")
        return repo, ref


Route = Callable[[Call], Reply]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = "(?P<repo>[^/]+/[^/]+)"
API = f"/api/models/{REPO}"
REV = "(?P<rev>[^/]+)"  # a slash comes as %2F


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


# Accounts and repositories


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    if (user := call.user) is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name} for name in user.orgs]
    auth = {"accessToken": {"displayName": "test", "role": user.role}}
    return Reply(body={"type": "user", "name": user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    user, wanted = call.user, call.json()
    repo = Repo(
        f"{wanted.get('organization') or user.name}/{wanted['name']}",
        wanted.get("visibility") == "private",
    )
    if user.role != "write" or not user.owns(repo.id):
        raise HubError(403, f"You don't have the rights to create {repo.id}")
    answer = {"url": f"{call.hub.endpoint}/{repo.id}", "name": repo.id, "id": repo.id}
    if repo.id in call.hub.repos:
        raise HubError(409, "You already created this model repo", **answer)
    repo.advance({".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
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
    card = _front_matter(readme.content.decode()) if readme else {}
    facts = {"id": repo.id, "sha": commit.oid, "private": repo.private, "cardData": card}
    siblings = [{"rfilename": path} for path in commit.files]
    relation, bases = card.get("base_model_relation"), _listed(card.get("base_model"))
    tags = [*_listed(card.get("tags")), *(f"base_model:{relation}:{base}" for base in bases)]
    return Reply(body=facts | {"siblings": siblings, "tags": tags})


@route("POST", f"{API}/branch/{REV}")
def create_branch(call: Call) -> Reply:
    repo, name = call.repo("write"), f"refs/heads/{call.args['rev']}"
    if name in repo.refs:
        raise HubError(409, f"Reference already exists: {name}")
    repo.refs[name] = repo.refs["refs/heads/main"]
    return Reply()


@route("POST", f"{API}/discussions")
def open_pull_request(call: Call) -> Reply:
    """As the client does before an upload by Xet; one by LFS asks for it in its commit."""
    repo = call.repo("propose")
    ref = repo.open_pull_request(call.user.name)
    number = int(ref.rpartition("/")[2])
    return Reply(body={"num": number, "pullRequest": True, "url": _page(call, repo, ref)})


@route("GET", rf"{API}/discussions/(?P<num>\d+)")
def pull_request(call: Call) -> Reply:
    repo, number = call.repo(), int(call.args["num"])
    facts = {"title": "", "num": number, "status": "draft", "createdAt": "2026-11-21T00:00:00.0Z"}
    facts |= {"author": {"name": repo.pull_requests[f"refs/pr/{number}"]}, "events": []}
    facts |= {"isPullRequest": True, "changes": {"base": "main"}, "filesWithConflicts": []}
    return Reply(body=facts | {"repo": {"name": repo.id, "type": "model"}})


def _page(call: Call, repo: Repo, ref: str) -> str:
    return f"{call.hub.endpoint}/{repo.id}/discussions/{ref.rpartition('/')[2]}"


# Cards


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _front_matter(text: str) -> dict:
    """The YAML between the first two lines of dashes."""
    found = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(found[1]) if found else {}) or {}


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    errors = [{"message": message} for message in _card_problems(call.json()["content"])]
    return Reply(400 if errors else 200, {"errors": errors, "warnings": []})


def _card_problems(text: str) -> list[str]:
    """A part of the Hub's rules."""
    card = _front_matter(text)
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


# Uploads


@route("POST", f"{API}/preupload/{REV}")
def preupload(call: Call) -> Reply:
    repo, ref = call.target()
    files, answers = repo.commit(ref).files, []
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
    call.repo("propose")
    objects = []
    for wanted in call.json()["objects"]:
        entry = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in call.hub.contents:
            href = f"{call.hub.storage}/upload/{wanted['oid']}?signature=valid"
            entry["actions"] = {"upload": {"href": href}}
        objects.append(entry)
    return Reply(body={"transfer": "basic", "objects": objects})


@route("PUT", "/upload/(?P<oid>[0-9a-f]{64})")
def upload(call: Call) -> Reply:
    if (got := call.hub.keep(call.content)) != call.args["oid"]:
        raise HubError(400, f"The content has the sha256 {got}")
    return Reply()


@route("POST", f"{API}/commit/{REV}")
def commit(call: Call) -> Reply:
    """All operations on a copy of the tree; then one ref moves."""
    repo, ref = call.target()
    header, *operations = [json.loads(line) for line in call.content.splitlines() if line]
    files = dict(repo.commit(ref).files)
    for operation in operations:
        _apply(call.hub, files, operation["key"], operation["value"])
    answer = {"success": True}
    if call.flag("create_pr"):
        ref = repo.open_pull_request(call.user.name)
        answer["pullRequestUrl"] = _page(call, repo, ref)
    oid = repo.advance(files, header["value"]["summary"], ref)
    url = f"{call.hub.endpoint}/{repo.id}/commit/{oid}"
    return Reply(body=answer | {"commitOid": oid, "commitUrl": url})


def _apply(hub: "FakeHub", files: dict[str, Blob], key: str, value: dict) -> None:
    """One operation of a commit."""
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        if path == "README.md" and (problems := _card_problems(content.decode())):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(problems)}")
        files[path] = Blob(content)
    elif key == "lfsFile":
        if value["oid"] not in hub.contents:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = Blob(hub.contents[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
    else:
        raise HubError(400, f"Unknown operation {key}")


# Downloads


@route("GET", f"{API}/tree/{REV}")
def tree(call: Call) -> Reply:
    entries = []
    for path, blob in call.commit()[1].files.items():
        blob = call.hub.shown(path, blob)
        size = len(blob.content)
        lfs = {"oid": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
        entry = {"type": "file", "path": path, "size": size, "oid": blob.oid}
        entries.append(entry | ({"lfs": lfs} if blob.lfs else {}))
    return Reply(body=entries)


@route("HEAD|GET", f"/{REPO}/resolve/{REV}/(?P<path>.+)")
def resolve(call: Call) -> Reply:
    (repo, commit), path = call.commit(), call.args["path"]
    if path not in commit.files:
        error = HubError(404, f"{path} does not exist", "EntryNotFound")
        # the client keeps what is missing in its cache, by commit
        error.reply.headers["X-Repo-Commit"] = commit.oid
        raise error
    blob = call.hub.shown(path, commit.files[path])
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        return Reply(200, blob.content, headers)
    where = f"/objects/{repo.id}/{commit.oid}/{quote(path, safe='')}"
    linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(blob.content))}
    location = {"Location": f"{call.hub.storage}{where}?signature=valid"}
    return Reply(302, b"", headers | linked | location)


@route("HEAD|GET", f"/objects/{REPO}/{REV}/(?P<path>.+)")
def download(call: Call) -> Reply:
    blob = call.hub.repos[call.args["repo"]].commit(call.args["rev"]).files[call.args["path"]]
    return Reply(200, blob.content, {"ETag": f'"{blob.etag}"'})
