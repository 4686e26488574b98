"""Publishing a saved directory: may we, one upload, and does the Hub now hold what we sent?

`check_target` asks before hours of work and creates nothing. `upload` makes repository and branch,
then ONE commit that also deletes stale weights, and reads back what arrived. The commit comes last,
so an upload that was cut short changes nothing that a reader sees; repeating it sends the rest.
"""

import glob
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id
from yaml import YAMLError

from qvlm_hf.errors import first_line
from qvlm_hf.format.files import read_header
from qvlm_hf.hub.errors import explained
from qvlm_hf.hub.payload import STALE, Payload, check_secrets, check_text
from qvlm_hf.hub.saved import SavedModel

__all__ = ["Published", "Target", "check_repo_id", "check_target", "fetch_card", "upload", "verify"]

# What git refuses (git-check-ref-format), and what git or the Hub would take for a commit or for a
# reference that is no branch.
_NO_BRANCH = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[-/]|(?:^|/)\.|\.lock(?:/|$)|[./]$|^$"
    r"|^(?:@|HEAD|refs(?:/.*)?|[0-9a-fA-F]{40})$"
)
_PULL_REQUEST = re.compile(r"refs/pr/[1-9][0-9]*")


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish and how.

    Attributes:
        repo_id: "owner/name"; a bare name belongs to the token's user.
        private: for a repository that is made; None is the owner's default.
        revision: branch, made where it is missing, or "refs/pr/N"; None is main.
        create_pr: open a pull request instead of writing to main.
        message: of the commit; None names the scheme.
        base_model: Hub id of the full-precision model; None takes what quantizing recorded.
        license: identifier of a licence; None copies that of the base model.
        user: whose token it is; `check_target` finds it.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    base_model: str | None = None
    license: str | None = None
    user: str = ""


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
        validate_repo_id(repo_id if isinstance(repo_id, str) else "")
    except HFValidationError as error:
        raise ValueError(
            f"{field}={repo_id!r} must be 'owner/name' of letters, digits, '-', '_' and '.' "
            f"({first_line(error)})."
        ) from error


def check_target(api: HfApi, target: Target) -> Target:
    """Asks the Hub whether the token may publish there. Creates nothing.

    What it cannot foresee: whether a fine-grained token may create repositories.

    Returns:
        The target, with user and owner.

    Raises:
        ValueError: a field breaks a rule, or the repository is public and should be private or the
            reverse.
        OSError: as `explained`.
    """
    repo_id, revision = target.repo_id, target.revision
    check_repo_id(repo_id)
    check_text("commit_message", target.message or "", _token(api))
    if target.base_model is not None:
        check_repo_id(target.base_model, field="base_model")
    if revision is not None and target.create_pr:
        raise ValueError(
            f"create_pr=True opens a pull request against main: leave out revision={revision!r}."
        )
    is_known = revision is None or _PULL_REQUEST.fullmatch(revision)
    if not is_known and _NO_BRANCH.search(str(revision)):
        raise ValueError(
            f"revision={revision!r} is no branch name: take letters, digits, '-', '_', '.' and "
            f"'/', as in 'dev', or 'refs/pr/N'."
        )
    with explained(repo_id):
        account = api.whoami()
        if target.license not in (None, "other"):  # which needs a name and a link besides
            _ask_validator(api, ModelCardData(license=target.license))
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"{repo_id}: the token may only read: make one with write permission at "
            f"huggingface.co/settings/tokens."
        )
    full = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
    target = replace(target, repo_id=full, user=account["name"])
    _check_repository(api, target, [org["name"] for org in account.get("orgs", [])])
    return target


def upload(api: HfApi, folder: Path, target: Target, payload: Payload) -> Published:
    """Sends the files in one upload and checks what arrived.

    Raises:
        ValueError: a file holds a token, or the Hub refuses the card.
        OSError: as `explained`, or the Hub holds something else than was sent.
    """
    check_secrets(folder, payload.files, _token(api))
    scheme = SavedModel(folder).quantization["scheme"]
    with explained(target.repo_id):
        if not target.create_pr:
            api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        if target.revision not in (None, "main") and not target.revision.startswith("refs/"):
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=folder,
            revision=target.revision,
            create_pr=target.create_pr,
            commit_message=target.message or f"Upload a model that qvlm_hf quantized to {scheme}",
            allow_patterns=[glob.escape(name) for name in payload.files],
            delete_patterns=list(STALE),
        )
        verify(api, folder, payload, repo_id=target.repo_id, revision=commit.oid)
    return Published(
        repo_id=target.repo_id,
        revision=commit.oid,
        commit_url=commit.commit_url,
        pull_request_url=commit.pr_url,
        files=payload.files,
        left_out=payload.left_out,
        folder=folder,
    )


def verify(api: HfApi, folder: Path, payload: Payload, *, repo_id: str, revision: str) -> None:
    """Compares a commit with the directory it was made from: names, hashes, headers of weights.

    Only the headers are downloaded, which shows that what the Hub hands out is what it tells.

    Raises:
        OSError: the Hub holds something else.
    """

    def differs(what: str) -> OSError:
        return OSError(
            f"{repo_id}: the Hub does not hold what was sent ({what}): repeat the command; if it "
            f"stays, delete that file there first."
        )

    there = api.list_repo_files(repo_id, revision=revision)
    if missing := sorted(set(payload.files) - set(there)):
        raise differs(missing[0])
    hashes = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    if wrong := {found["path"] for found in hashes.mismatches} & set(payload.files):
        raise differs(f"the hash of {min(wrong)}")
    weights = {name for name in there if name.endswith((".safetensors", ".bin"))}
    if stale := weights - set(payload.weights):
        raise differs(f"{min(stale)} is left over")
    try:
        headers = api.get_safetensors_metadata(repo_id, revision=revision).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise differs(first_line(error)) from error
    for name in payload.weights:
        tensors = headers[name].tensors if name in headers else {}
        found = {
            key: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": list(t.data_offsets)}
            for key, t in tensors.items()
        }
        expected = json.loads(read_header(folder / name))
        expected.pop("__metadata__", None)
        if found != expected:
            raise differs(f"the header of {name}")


def fetch_card(api: HfApi, model_id: str | None) -> ModelCardData | None:
    """Reads the front matter of a model's card on the Hub.

    Returns:
        None where there is no such model or card, or nobody answers: licence and language are then
        left to whoever publishes.
    """
    if model_id is None:
        return None
    try:
        file = Path(api.hf_hub_download(model_id, "README.md"))
        data = ModelCard(file.read_text(encoding="utf-8")).data
    except (HTTPError, OSError, YAMLError, ValueError):  # HTTPError alone is the network's
        return None
    return data if isinstance(data, ModelCardData) else None


def _ask_validator(api: HfApi, data: ModelCardData) -> None:
    """Has the Hub check front matter, as it does again when a README.md arrives."""
    body = {"repoType": "model", "content": f"---\n{data.to_yaml()}\n---\n"}
    hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=body))


def _check_repository(api: HfApi, target: Target, organizations: list[str]) -> None:
    """One that is there must be writable; another must be one that the user may make."""
    repo_id, owners = target.repo_id, [target.user, *organizations]
    with explained(repo_id):
        try:
            there = api.model_info(repo_id)
        except RepositoryNotFoundError:
            there = None
    if there is None:
        if target.create_pr:
            raise FileNotFoundError(
                f"{repo_id}: there is no such repository to open a pull request in: check its name."
            )
        if (owner := repo_id.split("/")[0]) not in owners:
            raise PermissionError(
                f"{repo_id}: the token's user may not make repositories for {owner!r}: name one "
                f"of {', '.join(owners)}."
            )
        return
    if target.private is not None and there.private != target.private:
        raise ValueError(
            f"{repo_id}: is {'private' if there.private else 'public'} on the Hub already, and "
            f"private={target.private} was asked for: change it in its settings, or leave it out."
        )
    if not target.create_pr and not (target.revision or "").startswith("refs/pr/"):
        with explained(repo_id):
            api.auth_check(repo_id, write=True)


def _token(api: HfApi) -> str | None:
    """The token in use."""
    return api.token if isinstance(api.token, str) else get_token()
