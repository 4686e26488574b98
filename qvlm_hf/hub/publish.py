"""Publishing a saved directory: may we, one upload, and does the Hub now hold what we sent?

    check_target -> Target      token, name and permission, before hours of work; nothing is created yet
    upload -> Published         repository and branch, ONE upload_folder that deletes stale weights with the same commit, then `verify`

An upload that was cut short changes nothing that a reader sees, because the commit comes last;
repeating it sends what is missing, because content is addressed by its hash. Knows folders and an
`HfApi` that is passed in; models and Transformers are hf/publishing.py's.
"""

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelInfo, RepoFile, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from yaml import YAMLError

from qvlm_hf.hub.errors import explained, one_line
from qvlm_hf.hub.payload import STALE, Payload, check_secrets, check_text, read_header

__all__ = [
    "Published",
    "Target",
    "check_message",
    "check_repo_id",
    "check_revision",
    "check_target",
    "fetch_card",
    "upload",
    "verify",
]

# What git refuses (git-check-ref-format), and what git or the Hub would take for a commit or for a
# reference that is no branch.
_NO_BRANCH = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/]|(?:^|/)\.|\.lock(?:/|$)|[./]$|^$|^(?:@|HEAD|refs(?:/.*)?|[0-9a-fA-F]{40})$"
)
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish, found fit for it.

    Attributes:
        repo_id: "owner/name".
        user: whose token it is.
        private: for a repository that is made; None is the owner's default.
        revision: branch, or "refs/pr/N"; None is main.
        create_pr: open a pull request instead of writing to main.
    """

    repo_id: str
    user: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is on the Hub now.

    Attributes:
        repo_id: "owner/name", what `from_pretrained` takes.
        revision: hash of the commit.
        commit_url: its page.
        pull_request_url: page of the pull request that was opened; None where there is none.
        files: what the repository got, or had already.
        left_out: names in the local directory that were not sent.
        folder: the local directory; None if it was temporary and is gone.
    """

    repo_id: str
    revision: str
    commit_url: str
    pull_request_url: str | None
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    folder: Path | None


def check_repo_id(repo_id: object, *, field: str = "repo_id") -> None:
    """Checks the form of a repository's name.

    Raises:
        ValueError: it is no "name" or "owner/name" that the Hub would accept.
    """
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("it is no text")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{field}={repo_id!r} must be 'owner/name' of letters, digits, '-', '_' and '.' "
            f"({one_line(error)})."
        ) from error


def check_revision(revision: str | None) -> None:
    """Checks that a name can be a branch's, or is a pull request's.

    Raises:
        ValueError: it is neither.
    """
    if (
        revision is not None
        and not _PULL_REQUEST.fullmatch(revision)
        and _NO_BRANCH.search(revision)
    ):
        raise ValueError(
            f"revision={revision!r} is no branch name: take letters, digits, '-', '_', '.' and "
            f"'/', as in 'dev', or 'refs/pr/N'."
        )


def check_message(api: HfApi, message: str) -> None:
    """Checks the message of a commit.

    Raises:
        ValueError: it holds a Hub token. The error does not show it.
    """
    check_text("commit_message", message, _token(api))


def check_target(
    api: HfApi,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Target:
    """Asks the Hub whether the token may publish there. Creates nothing.

    What it cannot foresee: whether a fine-grained token may create repositories.

    Args:
        api: with the token.
        repo_id: "owner/name"; a bare name belongs to the token's user.
        private: of the repository; None takes it as it is.
        revision: branch, made where it is missing, or "refs/pr/N".
        create_pr: open a pull request.

    Raises:
        ValueError: the arguments break a rule, or the repository is public and should be private or
            the reverse.
        OSError: as `explained`.
    """
    check_repo_id(repo_id)
    check_revision(revision)
    if create_pr and revision is not None:
        raise ValueError(
            f"create_pr=True opens a pull request against main: leave out revision={revision!r}."
        )
    with explained(repo_id):
        account = api.whoami()
    user, role = account["name"], account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PermissionError(
            f"{repo_id}: the token may only read: make one with write permission at "
            f"huggingface.co/settings/tokens."
        )
    full = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    target = Target(
        repo_id=full, user=user, private=private, revision=revision, create_pr=create_pr
    )
    there = _find(api, full)
    if there is None:
        _check_new(target, [user, *(org["name"] for org in account.get("orgs", []))])
        return target
    if private is not None and there.private != private:
        state = "private" if there.private else "public"
        raise ValueError(
            f"{full}: is {state} on the Hub already, and private={private} was asked for: change "
            f"it in its settings, or leave it out."
        )
    if not create_pr and not (revision or "").startswith("refs/pr/"):
        with explained(full):
            api.auth_check(full, write=True)
    return target


def upload(
    api: HfApi, folder: Path, target: Target, payload: Payload, *, message: str
) -> Published:
    """Sends the files in one upload and checks what arrived.

    Args:
        api: with the token.
        folder: where the files are.
        target: of `check_target`.
        payload: of `choose_files`.
        message: of the commit.

    Raises:
        ValueError: a file holds a token, or the Hub refuses the card.
        OSError: as `explained`, or the Hub holds something else than was sent.
    """
    check_secrets(folder, payload.files, _token(api))
    with explained(target.repo_id):
        if not target.create_pr:
            api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if target.revision not in (None, "main") and not str(target.revision).startswith("refs/"):
            api.create_branch(target.repo_id, branch=str(target.revision), exist_ok=True)
        commit = api.upload_folder(
            repo_id=target.repo_id, folder_path=folder, revision=target.revision, create_pr=target.create_pr, commit_message=message,
            allow_patterns=[glob.escape(name) for name in payload.files], delete_patterns=list(STALE),
        )  # fmt: skip
        verify(api, folder, payload, repo_id=target.repo_id, revision=commit.oid)
    return Published(
        repo_id=target.repo_id, revision=commit.oid, commit_url=commit.commit_url, pull_request_url=commit.pr_url, files=payload.files,
        left_out=payload.left_out, folder=folder,
    )  # fmt: skip


def verify(api: HfApi, folder: Path, payload: Payload, *, repo_id: str, revision: str) -> None:
    """Compares a commit with the directory it was made from: names, sizes and hashes as the Hub tells them, and the headers of the weights.

    Only the headers are downloaded, which shows that what the Hub hands out is what it tells.

    Raises:
        OSError: the Hub holds something else.
    """

    def differs(what: str) -> OSError:
        return OSError(
            f"{repo_id}: the Hub does not hold what was sent ({what}): repeat the command; if it "
            f"stays, delete that file there first."
        )

    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }
    for name in payload.files:
        if name not in there or there[name].size != (folder / name).stat().st_size:
            raise differs(name)
        if not _same_hash(there[name], folder / name):
            raise differs(f"the hash of {name}")
    if stale := sorted(
        name
        for name in there
        if name.endswith((".safetensors", ".bin")) and name not in payload.weights
    ):
        raise differs(f"{stale[0]} is left over")
    try:
        headers = api.get_safetensors_metadata(repo_id, revision=revision).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise differs(one_line(error)) from error
    for name in payload.weights:
        expected = json.loads(read_header(folder / name))
        expected.pop("__metadata__", None)
        tensors = headers[name].tensors if name in headers else {}
        found = {
            key: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for key, t in tensors.items()
        }
        if found != expected:
            raise differs(f"the header of {name}")


def fetch_card(api: HfApi, model_id: str | None) -> ModelCardData | None:
    """Front matter of a model's card on the Hub; None where there is no such model or card, or nobody answers.

    A missing card should not stop a publication: licence and language are then left to whoever
    publishes.
    """
    if model_id is None:
        return None
    try:
        data = ModelCard(
            Path(api.hf_hub_download(model_id, "README.md")).read_text(encoding="utf-8")
        ).data
    except (HTTPError, OSError, YAMLError, ValueError):  # HTTPError alone is the network's
        return None
    return data if isinstance(data, ModelCardData) else None


def _find(api: HfApi, repo_id: str) -> ModelInfo | None:
    """What the Hub says of a repository; None where there is none that the token may see."""
    with explained(repo_id):
        try:
            return api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None


def _check_new(target: Target, owners: list[Any]) -> None:
    """A repository that is to be made must be for the user or one of the user's organizations."""
    if target.create_pr:
        raise FileNotFoundError(
            f"{target.repo_id}: there is no such repository to open a pull request in: check its "
            f"name."
        )
    if (owner := target.repo_id.split("/")[0]) not in owners:
        raise PermissionError(
            f"{target.repo_id}: the token's user may not make repositories for {owner!r}: name one "
            f"of {', '.join(owners)}."
        )


def _token(api: HfApi) -> str | None:
    """The token in use."""
    return api.token if isinstance(api.token, str) else get_token()


def _same_hash(entry: RepoFile, file: Path) -> bool:
    """Whether a file of a commit has the content of a local one: large files are known by SHA-256, others by git's hash."""
    if entry.lfs is None:
        return entry.blob_id == git_hash(file.read_bytes())
    with file.open("rb") as opened:
        return entry.lfs.sha256 == sha_fileobj(opened).hex()
