"""The Hub of the tests, asked by the real client: what test_publish.py relies on and does not see."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

pytestmark = pytest.mark.hub

REPO = "me/model"
CARD = (
    "---\nlicense: mit\nbase_model: org/base\nbase_model_relation: quantized\ntags: [qvlm]\n---\n"
)


@pytest.fixture
def api(api):
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path):
    """A card, a configuration, a file in a folder, an LFS file."""
    path = tmp_path / "local"
    (path / "pictures").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "pictures" / "partition.png").write_bytes(b"\x89PNG\0" + bytes(1000))
    save_file({"weight": torch.arange(100_000.0)}, path / "model.safetensors")
    return path


def local(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def content(hub, revision="main"):
    files = hub.repo(REPO).files(revision)
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def test_what_is_pushed_is_described_and_downloaded(hub, api, folder, transfer):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == hub.repo(REPO).history()[0].oid
    assert (info.card_data.license, info.card_data.base_model) == ("mit", "org/base")
    assert {"qvlm", "license:mit", "base_model:quantized:org/base"} <= set(info.tags)
    assert [entry.path for entry in api.list_repo_tree(REPO, "pictures")] == [
        "pictures/partition.png"
    ]
    hub.requests.clear()
    assert api.get_safetensors_metadata(REPO).parameter_count == {"F32": 100_000}
    assert [request.status for request in hub.calls("GET", "^/objects/")] == [206]  # a range
    snapshot = local(Path(api.snapshot_download(REPO)))
    assert {name: snapshot[name] for name in content(hub)} == local(folder)
    storage = [request for request in hub.requests if request.origin == "storage"]
    assert storage
    assert not any(request.had_authorization for request in storage)  # the token stays with the Hub
    assert not api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    hub.wrong_etag(r"model\.safetensors")
    wrong = api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    assert [found["path"] for found in wrong] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("asked", "got", "said"),
    [
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=8-", b"89", "bytes 8-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=5-99", b"56789", "bytes 5-9/10"),
    ],
)
def test_ranges(hub, api, asked, got, said):
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="digits.txt", repo_id=REPO)
    url = f"{hub.endpoint}/{REPO}/resolve/main/digits.txt"
    answer = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": asked}))
    assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, got, said)


def test_access(hub, api, folder):
    read, org = hub.add_user("me", role="read"), hub.add_user("me", orgs=("lab",))
    reader, member = (HfApi(endpoint=hub.endpoint, token=token) for token in (read, org))
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    member.create_repo("lab/model")
    for act, said in (
        (lambda: api.create_repo(REPO), "409"),
        (lambda: api.create_repo("lab/other"), 'under the namespace "lab"'),
        (lambda: reader.create_repo("me/other"), "403"),
        (lambda: reader.upload_folder(repo_id=REPO, folder_path=folder), "use a write token"),
        (lambda: reader.auth_check(REPO, write=True), "403"),
        (lambda: HfApi(endpoint=hub.endpoint, token="hf_no").whoami(), "Invalid user token"),
    ):
        with pytest.raises(HfHubHTTPError, match=said):
            act()
    api.create_repo("me/secret", private=True)
    assert reader.model_info("me/secret").private
    for token, status in ((False, 401), (hub.add_user("you"), 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            HfApi(endpoint=hub.endpoint, token=token).model_info("me/secret")
        assert caught.value.response.status_code == status


def test_the_second_origin_takes_no_token_and_no_unsigned_address(hub, api, folder):
    api.upload_folder(repo_id=REPO, folder_path=folder)
    path = f"/objects/{hub.repo(REPO).tree()['model.safetensors'].sha256}/model.safetensors"
    authorized = {"Authorization": f"Bearer {hub.token}"}
    for request, status in (
        (urllib.request.Request(hub.storage + path), 403),
        (urllib.request.Request(hub.signed(path), headers=authorized), 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status


def test_what_no_route_knows_is_reported(hub):
    with pytest.raises(HfHubHTTPError, match="404"):
        HfApi(endpoint=hub.endpoint).dataset_info("me/data")
    assert hub.problems == ["no route for GET /api/datasets/me/data"]
    hub.problems.clear()


def test_it_runs_as_a_program(tmp_path, hub):
    program = str(Path(__file__).parents[1] / "hub_server.py")
    command = [sys.executable, program, "--root", str(tmp_path / "program"), "--user", "her"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        variables = dict(word.split("=", 1) for word in process.stdout.readline().split()[1:])
        api = HfApi(endpoint=variables["HF_ENDPOINT"], token=variables["HF_TOKEN"])
        api.create_repo("her/model")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="her/model")
        assert api.list_repo_files("her/model") == [".gitattributes", "config.json"]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "stopped\n"
    assert process.returncode == 0
