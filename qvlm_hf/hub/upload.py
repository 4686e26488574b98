"""Publishing a saved directory: may we, one upload, and does the Hub now hold what we sent?

`check_target` asks before hours of work and creates nothing. `upload` makes repository and branch,
then ONE commit that also deletes stale weights, and reads back what arrived. The commit comes last,
so an upload that was cut short changes nothing that a reader sees; repeating it sends the rest.
"""

import glob
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from qvlm_hf.hub.errors import explained
from qvlm_hf.hub.payload import STALE, Payload, check_secret, check_secrets
from qvlm_hf.hub.saved import SavedModel

__all__ = ["Published", "Target", "check_target", "fetch_card", "upload", "verify"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish and how: the arguments of `publish`, and whose token it is.

    `check_target` finds the user.
    """

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
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


def check_target(api: HfApi, target: Target) -> Target:
    """Asks the Hub whether the token may publish there. Creates nothing.

    What it cannot foresee: whether a fine-grained token may create repositories, and whether the
    Hub takes the name of a branch. Returns the target with user and owner.

    Raises:
        ValueError: a name or licence is none that the Hub takes, the message holds a token, or the
            repository is public and should be private or the reverse.
        OSError: as `explained`.
    """
    repo_id, create_pr = target.repo_id, target.create_pr
    validate_repo_id(repo_id)
    if target.base_model is not None:
        validate_repo_id(target.base_model)
    if target.revision is not None and create_pr:
        raise ValueError(
            f"create_pr=True opens a pull request against main: leave out "
            f"revision={target.revision!r}."
        )
    check_secret("commit_message", target.commit_message or "", _token(api))
    with explained(repo_id):
        account = api.whoami()
        user = account["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if target.license not in (None, "other"):  # which needs a name and a link besides
            ModelCard(f"---\nlicense: {target.license}\n---\n").validate()
        try:
            there = api.model_info(repo_id)
        except RepositoryNotFoundError:
            if create_pr:
                raise
            there = None
        if there is not None and not create_pr and not (target.revision or "").startswith("refs/"):
            api.auth_check(repo_id, write=True)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PermissionError(
            f"{repo_id}: the token may only read: make one with write permission at "
            f"huggingface.co/settings/tokens."
        )
    owners = [user, *(organization["name"] for organization in account.get("orgs", []))]
    if there is None and (owner := repo_id.split("/")[0]) not in owners:
        raise PermissionError(
            f"{repo_id}: the token's user may not make repositories for {owner!r}: name one of "
            f"{', '.join(owners)}."
        )
    if there is not None and target.private not in (None, there.private):
        raise ValueError(
            f"{repo_id}: is {'private' if there.private else 'public'} on the Hub already, and "
            f"private={target.private} was asked for: change it in its settings, or leave it out."
        )
    return replace(target, repo_id=repo_id, user=user)


def upload(api: HfApi, folder: Path, target: Target, payload: Payload) -> Published:
    """Sends the files in one upload and checks what arrived.

    Raises:
        ValueError: a file holds a token, or the Hub refuses the card.
        OSError: as `explained`, or the Hub holds something else than was sent.
    """
    check_secrets(folder, payload.files, _token(api))
    title = f"Upload a model that qvlm_hf quantized to {SavedModel(folder).quantization['scheme']}"
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
            commit_message=target.commit_message or title,
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
    """Compares names and hashes of a commit with the directory that it was made from.

    Raises:
        OSError: the Hub holds something else.
    """
    found = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    wrong = {*found.extra_paths, *(one["path"] for one in found.mismatches)} & set(payload.files)
    there = api.list_repo_files(repo_id, revision=revision)
    weights = {name for name in there if name.endswith((".safetensors", ".bin"))}
    wrong |= weights - set(payload.weights)  # these would be loaded instead
    if wrong:
        raise OSError(
            f"{repo_id}: the Hub does not hold what was sent ({min(wrong)} is missing, another or "
            f"left over): repeat the command; if it stays, delete that file there first."
        )


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


def _token(api: HfApi) -> str | None:
    """The token in use."""
    return api.token if isinstance(api.token, str) else get_token()
