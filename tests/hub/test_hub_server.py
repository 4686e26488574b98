"""The Hub of the tests, asked by the real client: what the tests of publishing rely on."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
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


def test_a_folder_arrives_in_one_commit_and_a_second_push_sends_nothing(hub, api, folder, transfer):
    done = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    assert content(hub) == local(folder)
    lfs = {path for path, blob in hub.repo(REPO).tree().items() if blob.lfs}
    assert lfs == {"model.safetensors", "pictures/partition.png"}
    first, initial = hub.repo(REPO).history()
    assert (first.oid, first.title, first.author, initial.parent) == (done.oid, "First", "me", None)
    assert len(hub.calls("PUT", "^/upload/")) == (2 if transfer == "lfs" else 0)
    assert len(hub.calls("GET", "xet-write-token")) == (1 if transfer == "xet" else 0)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == done.oid
    assert not hub.calls("PUT", "") + hub.calls("POST", "/commit/")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*.safetensors")
    assert not hub.calls("PUT", "")  # the content is there
    assert content(hub) == local(folder)
    assert len(hub.repo(REPO).history()) == 3


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


def test_branches_and_pull_requests(hub, api, folder, transfer):
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("you"))
    with pytest.raises(HfHubHTTPError, match="no right to write to me/model"):
        stranger.upload_folder(repo_id=REPO, folder_path=folder)
    done = stranger.upload_folder(repo_id=REPO, folder_path=folder, create_pr=True)
    assert (done.pr_num, done.pr_revision, content(hub)) == (1, "refs/pr/1", {})
    assert content(hub, "refs/pr/1") == local(folder)
    api.create_branch(REPO, branch="w4a4/test")
    api.upload_folder(repo_id=REPO, folder_path=folder, revision="w4a4/test")
    assert (content(hub), content(hub, "w4a4/test")) == ({}, local(folder))
    downloaded = api.hf_hub_download(REPO, "config.json", revision="w4a4/test")
    assert Path(downloaded).read_bytes() == local(folder)["config.json"]
    for revision, kind in (("nowhere", RevisionNotFoundError), ("main", RemoteEntryNotFoundError)):
        with pytest.raises(kind):
            api.hf_hub_download(REPO, "config.json", revision=revision)


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


@pytest.mark.parametrize("fault", ["passing", "commit", "cut upload", "cut commit", "lost answer"])
def test_a_fault_leaves_the_branch_whole_and_a_repeat_completes_it(
    hub, api, folder, no_waiting, fault
):
    if fault == "passing":  # the client repeats it
        hub.fail("POST", "/preupload/", status=503, times=2)
        hub.fail("PUT", "^/upload/", times=1)
    else:
        {
            "commit": lambda: hub.fail("POST", "/commit/main"),
            "cut upload": lambda: hub.cut("^/upload/", after_bytes=100_000, times=None),
            "cut commit": lambda: hub.cut("/commit/main", after_bytes=50),
            "lost answer": lambda: hub.lose_answer("POST", "/commit/main"),
        }[fault]()
        with pytest.raises(Exception, match=r"500|Error while uploading|disconnected|reset|Broken"):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert content(hub) == (local(folder) if fault == "lost answer" else {})
    hub.heal()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert content(hub) == local(folder)
    assert len(hub.repo(REPO).history()) == 2


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, api, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.cut("model.safetensors", after_bytes=150_000)
    loaded = Path(api.hf_hub_download(REPO, "model.safetensors"))
    assert loaded.read_bytes() == local(folder)["model.safetensors"]
    first, second = hub.calls("GET", "^/objects/")
    assert (first.status, first.sent, second.status) == (None, 150_000, 206)


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
