"""The Hub of the tests, asked by the real client: what test_publish.py relies on and does not see."""

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save_file

pytestmark = pytest.mark.hub

REPO = "me/model"


@pytest.fixture
def folder(api, tmp_path):
    """An empty repository, and a configuration and an LFS file for it."""
    api.create_repo(REPO)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.arange(100_000.0)}, tmp_path / "local" / "model.safetensors")
    return tmp_path / "local"


def test_what_is_pushed_is_downloaded_and_the_token_stays_with_the_hub(hub, api, folder, transfer):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    local = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repo(REPO).files() == local
    for name, content in local.items():
        with open(api.hf_hub_download(REPO, name), "rb") as file:
            assert file.read() == content
    storage = [request for request in hub.requests if request.is_storage]
    assert storage
    assert not any(request.had_authorization for request in storage)
    assert not api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    hub.wrong_etag(r"model\.safetensors")
    wrong = api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    assert [found["path"] for found in wrong] == ["model.safetensors"]


def test_access(hub, api, folder):
    read, org = hub.add_user("me", role="read"), hub.add_user("me", orgs=("lab",))
    reader = HfApi(token=read)
    HfApi(token=org).create_repo("lab/model")
    api.create_repo("me/secret", private=True)
    assert reader.model_info("me/secret").private
    for act, status in (
        (lambda: api.create_repo(REPO), 409),
        (lambda: api.create_repo("lab/other"), 403),
        (lambda: reader.create_repo("me/other"), 403),
        (lambda: reader.upload_folder(repo_id=REPO, folder_path=folder), 403),
        (lambda: reader.auth_check(REPO, write=True), 403),
        (lambda: HfApi(token="hf_no").whoami(), 401),
        (lambda: HfApi(token=False).model_info("me/secret"), 401),
        (lambda: HfApi(token=hub.add_user("you")).model_info("me/secret"), 404),
    ):
        with pytest.raises((HfHubHTTPError, RepositoryNotFoundError)) as caught:
            act()
        assert caught.value.response.status_code == status


def test_what_no_route_knows_is_reported(hub, api):
    with pytest.raises(HfHubHTTPError, match="404"):
        api.dataset_info("me/data")
    assert hub.problems == ["no route for GET /api/datasets/me/data"]
    hub.problems.clear()
