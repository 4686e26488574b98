"""The Hub of the tests, asked by the real client: what publish() and the Hub tests build on."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file
from tiny_models import tiny_llava, tiny_processor
from transformers import AutoProcessor, LlavaForConditionalGeneration

pytestmark = pytest.mark.hub

TESTS = Path(__file__).parents[1]
REPO = "me/model"
CARD = "---\nlicense: mit\nbase_model: org/base\nbase_model_relation: quantized\ntags: [qvlm]\n---\n# A card\n"


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The owner's client, and a repository."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model: a card, a configuration, a file in a folder, an LFS file."""
    path = tmp_path / "local"
    (path / "pictures").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "pictures" / "partition.png").write_bytes(b"\x89PNG\0" + bytes(1000))
    save_file({"weight": torch.arange(100_000.0)}, path / "model.safetensors")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def published(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    return {
        path: content
        for path, content in hub.repo(REPO).files(revision).items()
        if path != ".gitattributes"
    }


# Uploads


def test_a_folder_arrives_in_one_commit(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    done = api.upload_folder(
        repo_id=REPO, folder_path=folder, commit_message="First", commit_description="Why"
    )
    assert published(hub) == contents(folder)
    assert {path: blob.lfs for path, blob in hub.repo(REPO).tree().items()} == {
        ".gitattributes": False,
        "README.md": False,
        "config.json": False,
        "model.safetensors": True,
        "pictures/partition.png": True,
    }
    first, initial = hub.repo(REPO).history()
    assert (first.oid, first.title, first.description, first.author) == (
        done.oid,
        "First",
        "Why",
        "me",
    )
    assert initial.parent is None
    assert len(hub.calls("PUT", "^/upload/")) == (2 if transfer == "lfs" else 0)
    assert len(hub.calls("GET", "xet-write-token")) == (1 if transfer == "xet" else 0)


def test_a_second_push_changes_and_sends_nothing(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert not hub.calls("PUT", "")
    assert not hub.calls("POST", "/commit/")
    assert len(hub.repo(REPO).history()) == 2


def test_an_lfs_file_that_is_there_already_is_committed_without_an_upload(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    (folder / "model.safetensors").rename(folder / "again.safetensors")
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert not hub.calls("PUT", "")
    assert published(hub)["again.safetensors"] == published(hub)["model.safetensors"]


def test_delete_patterns_remove_stale_files_in_the_same_commit(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    api.upload_folder(repo_id=REPO, folder_path=folder, delete_patterns="*.safetensors")
    assert published(hub) == contents(folder)
    assert len(hub.repo(REPO).history()) == 3


def test_a_folder_of_the_repository_can_be_deleted(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    api.delete_folder("pictures", REPO)
    assert set(published(hub)) == {"README.md", "config.json", "model.safetensors"}


def test_a_commit_is_all_or_nothing(hub: HubServer, api: HfApi, folder: Path) -> None:
    head = hub.repo(REPO).refs["refs/heads/main"]
    operations = [
        CommitOperationAdd("config.json", folder / "config.json"),
        CommitOperationDelete("missing.txt"),
    ]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(REPO, operations, commit_message="Half of it")
    assert hub.repo(REPO).refs["refs/heads/main"] == head
    assert published(hub) == {}


def test_a_commit_on_an_old_parent_is_refused(hub: HubServer, api: HfApi, folder: Path) -> None:
    old = hub.repo(REPO).history()[0].oid
    api.upload_folder(repo_id=REPO, folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.delete_file("config.json", REPO, parent_commit=old)
    assert "config.json" in published(hub)


def test_a_card_with_broken_metadata_is_refused(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md\.\n- YAML: "):
        api.upload_file(
            path_or_fileobj=b"---\ntags: [a\n---\n", path_in_repo="README.md", repo_id=REPO
        )
    with pytest.raises(ValueError, match=r"/data/model.* is not valid"):
        ModelCard("---\nlicense: mit\nbase_model: /data/model\n---\n").validate()
    ModelCard(CARD).validate()
    assert published(hub) == {}


# Revisions and pull requests


def test_branches_tags_and_commits_are_revisions(hub: HubServer, api: HfApi, folder: Path) -> None:
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="w4a4/test")
    api.create_branch(REPO, branch="w4a4/test", exist_ok=True)
    api.upload_file(
        path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, revision="w4a4/test"
    )
    api.upload_file(path_or_fileobj=b"[]", path_in_repo="config.json", repo_id=REPO)
    read = {
        rev: Path(api.hf_hub_download(REPO, "config.json", revision=rev)).read_text()
        for rev in ("main", "v1", "w4a4/test", first.oid)
    }
    assert read == {
        "main": "[]",
        "v1": '{"model_type": "llama"}',
        "w4a4/test": "{}",
        first.oid: '{"model_type": "llama"}',
    }
    assert api.list_repo_commits(REPO, revision="v1")[0].commit_id == first.oid
    refs = api.list_repo_refs(REPO)
    assert ([one.name for one in refs.branches], [one.name for one in refs.tags]) == (
        ["main", "w4a4/test"],
        ["v1"],
    )
    api.delete_branch(REPO, branch="w4a4/test")
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")
    with pytest.raises(HfHubHTTPError, match="default branch"):
        api.delete_branch(REPO, branch="main")


def test_an_upload_to_a_missing_branch_is_refused(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    with pytest.raises(RevisionNotFoundError):
        api.upload_folder(repo_id=REPO, folder_path=folder, revision="nowhere")


def test_a_stranger_opens_a_pull_request_and_the_owner_merges_it(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    stranger = HfApi(endpoint=hub.endpoint, token=hub.add_user("you"))
    with pytest.raises(HfHubHTTPError, match="no right to write to me/model") as caught:
        stranger.upload_folder(repo_id=REPO, folder_path=folder)
    assert caught.value.response.status_code == 403
    done = stranger.upload_folder(
        repo_id=REPO, folder_path=folder, create_pr=True, commit_message="Better weights"
    )
    assert (done.pr_num, done.pr_revision, published(hub)) == (1, "refs/pr/1", {})
    assert published(hub, "refs/pr/1") == contents(folder)
    assert (
        Path(api.hf_hub_download(REPO, "config.json", revision="refs/pr/1")).read_bytes()
        == contents(folder)["config.json"]
    )

    details = api.get_discussion_details(REPO, 1)
    assert (details.title, details.author, details.conflicting_files) == (
        "Better weights",
        "you",
        [],
    )
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.merge_pull_request(REPO, 1)
    if details.status == "draft":
        with pytest.raises(HfHubHTTPError, match="only an open one can be merged"):
            api.merge_pull_request(REPO, 1)
        api.change_discussion_status(REPO, 1, new_status="open")
    api.merge_pull_request(REPO, 1)
    assert published(hub) == contents(folder)
    merged = api.get_discussion_details(REPO, 1)
    assert (merged.status, merged.merge_commit_oid) == ("merged", hub.repo(REPO).history()[0].oid)


def test_changes_of_the_same_file_conflict(hub: HubServer, api: HfApi) -> None:
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="a.txt", repo_id=REPO, create_pr=True)
    api.upload_file(path_or_fileobj=b"other", path_in_repo="b.txt", repo_id=REPO)
    assert api.get_discussion_details(REPO, 1).conflicting_files == []
    api.upload_file(path_or_fileobj=b"ours", path_in_repo="a.txt", repo_id=REPO)
    assert api.get_discussion_details(REPO, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match=r"Merge conflicts in a\.txt"):
        api.merge_pull_request(REPO, 1)
    assert [one.num for one in api.get_repo_discussions(REPO)] == [1]


# Access


def test_tokens_say_who_one_is(hub: HubServer, api: HfApi) -> None:
    reader = hub.add_user("me", role="read", orgs=("lab",))
    said = HfApi(endpoint=hub.endpoint, token=reader).whoami()
    assert (said["name"], said["orgs"][0]["name"], said["auth"]["accessToken"]["role"]) == (
        "me",
        "lab",
        "read",
    )
    assert re.fullmatch("hf_[A-Za-z]{34}", reader)
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        HfApi(endpoint=hub.endpoint, token="hf_wrong").whoami()
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.endpoint, token="hf_wrong").model_info(REPO)


def test_a_repository_is_made_once_and_in_ones_own_namespace(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo(REPO, exist_ok=True) == f"{hub.endpoint}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="409") as caught:
        api.create_repo(REPO)
    assert caught.value.response.json()["url"] == f"{hub.endpoint}/{REPO}"
    with pytest.raises(HfHubHTTPError, match='under the namespace "lab"'):
        api.create_repo("lab/model")
    HfApi(endpoint=hub.endpoint, token=hub.add_user("me", orgs=("lab",))).create_repo("lab/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.endpoint, token=hub.add_user("me", role="read")).create_repo("me/other")
    api.delete_repo(REPO)
    assert set(hub.repos) == {"lab/model"}


def test_a_private_repository_does_not_exist_for_others(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.create_repo("me/secret", private=True)
    api.upload_folder(repo_id="me/secret", folder_path=folder)
    for token, status in ((False, 401), (hub.add_user("you"), 404)):
        other = HfApi(endpoint=hub.endpoint, token=token)
        for ask in (other.model_info, other.list_repo_files, other.auth_check):
            with pytest.raises(RepositoryNotFoundError) as caught:
                ask("me/secret")
            assert caught.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download("me/secret", "config.json")
        assert [one.id for one in other.list_models()] == [REPO]
    reader = HfApi(endpoint=hub.endpoint, token=hub.add_user("me", role="read"))
    assert reader.model_info("me/secret").private
    with pytest.raises(HfHubHTTPError, match="you must use a write token"):
        reader.upload_folder(repo_id="me/secret", folder_path=folder)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.auth_check("me/secret", write=True)
    api.update_repo_settings("me/secret", private=False)
    assert not HfApi(endpoint=hub.endpoint, token=False).model_info("me/secret").private


def test_a_gated_repository_is_listed_and_gives_no_files(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    api.update_repo_settings(REPO, gated="manual")
    other = HfApi(endpoint=hub.endpoint, token=hub.add_user("you"))
    assert other.model_info(REPO).gated == "manual"
    with pytest.raises(GatedRepoError):
        other.hf_hub_download(REPO, "config.json")
    assert api.hf_hub_download(REPO, "config.json")


def test_the_second_origin_takes_no_token_and_no_unsigned_address(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    path = f"/objects/{hub.repo(REPO).tree()['model.safetensors'].sha256}/model.safetensors"
    refused = {
        urllib.request.Request(hub.storage + path): 403,
        urllib.request.Request(
            hub.signed(path), headers={"Authorization": f"Bearer {hub.token}"}
        ): 400,
    }
    for request, status in refused.items():
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
    assert urllib.request.urlopen(hub.signed(path)).read() == contents(folder)["model.safetensors"]


# Listings and downloads


def test_listings_describe_files_and_folders(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First")
    api.upload_file(
        path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO, commit_message="Second"
    )
    listed = {one.path: one for one in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert set(listed) == {*published(hub), ".gitattributes", "pictures"}
    assert (listed["config.json"].last_commit.title, listed["pictures"].last_commit.title) == (
        "Second",
        "First",
    )
    assert listed["model.safetensors"].lfs.size == (folder / "model.safetensors").stat().st_size
    assert [one.path for one in api.list_repo_tree(REPO, "pictures")] == ["pictures/partition.png"]
    assert "pictures/partition.png" not in [one.path for one in api.list_repo_tree(REPO)]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "missing"))
    assert {
        one.path for one in api.get_paths_info(REPO, ["config.json", "pictures", "missing"])
    } == {"config.json", "pictures"}


def test_model_info_has_the_card_and_the_tags_that_follow_from_it(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == hub.repo(REPO).history()[0].oid
    assert (info.card_data.license, info.card_data.base_model) == ("mit", "org/base")
    assert set(info.tags) == {
        "qvlm",
        "license:mit",
        "base_model:org/base",
        "base_model:quantized:org/base",
    }
    assert {one.rfilename for one in info.siblings if one.lfs} == {
        "model.safetensors",
        "pictures/partition.png",
    }
    assert [one.id for one in api.list_models(filter="base_model:quantized:org/base")] == [REPO]
    assert not list(api.list_models(filter="base_model:finetune:org/base"))


def test_a_snapshot_is_equal_and_a_second_one_loads_nothing(
    hub: HubServer, api: HfApi, folder: Path, transfer: str
) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert {
        path: content
        for path, content in contents(Path(snapshot_download(REPO))).items()
        if path in published(hub)
    } == contents(folder)
    storage = [request for request in hub.requests if request.origin == "storage"]
    assert storage
    assert not any(request.had_authorization for request in storage)
    assert all(request.had_authorization for request in hub.requests if request.origin == "hub")
    hub.requests.clear()
    api.snapshot_download(REPO)
    assert not hub.calls("GET", "/resolve/|/objects/")


def test_headers_of_safetensors_are_read_by_range(hub: HubServer, api: HfApi, folder: Path) -> None:
    save_file({"weight": torch.zeros(1_000_000)}, folder / "model.safetensors")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.requests.clear()
    metadata = api.get_safetensors_metadata(REPO)
    assert metadata.parameter_count == {"F32": 1_000_000}
    assert [request.status for request in hub.calls("GET", "^/objects/")] == [206]
    assert sum(request.sent for request in hub.requests) < 110_000


@pytest.mark.parametrize(
    ("asked", "got", "said"),
    [
        ("bytes=0-3", b"0123", "bytes 0-3/10"),
        ("bytes=8-", b"89", "bytes 8-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=5-99", b"56789", "bytes 5-9/10"),
        ("bytes=10-", None, "bytes */10"),
    ],
)
def test_ranges(hub: HubServer, api: HfApi, asked: str, got: bytes | None, said: str) -> None:
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="digits.txt", repo_id=REPO)
    request = urllib.request.Request(
        f"{hub.endpoint}/{REPO}/resolve/main/digits.txt", headers={"Range": asked}
    )
    if got is None:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert (caught.value.code, caught.value.headers["Content-Range"]) == (416, said)
    else:
        answer = urllib.request.urlopen(request)
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, got, said)


def test_a_missing_file_is_remembered_by_the_client(hub: HubServer, api: HfApi) -> None:
    for _ in range(2):
        with pytest.raises(RemoteEntryNotFoundError):
            hf_hub_download(REPO, "missing.json", revision=hub.repo(REPO).history()[0].oid)
    marks = list((Path(os.environ["HF_HOME"]) / "hub").rglob(".no_exist/*/missing.json"))
    assert [path.parent.name for path in marks] == [hub.repo(REPO).history()[0].oid]


def test_transformers_finds_it(hub: HubServer, transfer: str) -> None:
    model = tiny_llava()
    model.push_to_hub(REPO, private=True, max_shard_size="300KB")
    tiny_processor().push_to_hub(REPO)
    model.push_to_hub(REPO, revision="other")
    assert {"model.safetensors.index.json", "processor_config.json", "README.md"} <= set(
        published(hub)
    )
    assert "model.safetensors" in published(hub, "other")
    assert hub.repo(REPO).private
    loaded = LlavaForConditionalGeneration.from_pretrained(REPO).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    assert AutoProcessor.from_pretrained(REPO).chat_template == tiny_processor().chat_template


# Faults


def test_an_error_that_passes_is_retried(
    hub: HubServer, api: HfApi, folder: Path, no_waiting: None
) -> None:
    hub.fail("POST", "/preupload/", status=503, times=2)
    hub.fail("PUT", "^/upload/", times=1)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == contents(folder)
    assert [request.status for request in hub.calls("POST", "/preupload/")] == [503, 503, 200]
    assert sorted(request.status for request in hub.calls("PUT", "^/upload/")) == [200, 200, 500]


def test_a_failed_commit_leaves_the_branch_and_a_repeat_sends_no_content_again(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    hub.fail("POST", "/commit/main")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == {}
    assert len(hub.calls("PUT", "^/upload/")) == 2
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == contents(folder)
    assert not hub.calls("PUT", "")


def test_an_upload_that_is_cut_leaves_nothing_and_its_repeat_is_complete(
    hub: HubServer, api: HfApi, folder: Path, no_waiting: None
) -> None:
    hub.cut("^/upload/", after_bytes=100_000, times=None)  # the picture is smaller and passes
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == {}
    cut = [request for request in hub.calls("PUT", "^/upload/") if request.status is None]
    assert {request.received for request in cut} == {100_000}
    assert (
        len(list(hub.store.objects.iterdir())) == 2
    )  # .gitattributes and the picture: no half of a file
    hub.heal()
    hub.requests.clear()
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == contents(folder)
    assert len(hub.calls("PUT", "^/upload/")) == 1


def test_a_commit_that_is_cut_changes_nothing(hub: HubServer, api: HfApi, folder: Path) -> None:
    hub.cut("/commit/main", after_bytes=50)
    with pytest.raises(Exception, match=r"(disconnected|reset|Broken pipe)"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == {}
    assert not hub.problems


def test_a_commit_whose_answer_is_lost_has_happened_and_its_repeat_adds_none(
    hub: HubServer, api: HfApi, folder: Path
) -> None:
    hub.lose_answer("POST", "/commit/main")
    with pytest.raises(Exception, match="disconnected"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert published(hub) == contents(folder)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.repo(REPO).history()) == 2


def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: HubServer, api: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 50_000
    )  # 10 MB: what came before the first full chunk is loaded again
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.cut("model.safetensors", after_bytes=150_000)
    loaded = api.hf_hub_download(REPO, "model.safetensors")
    assert Path(loaded).read_bytes() == contents(folder)["model.safetensors"]
    first, second = hub.calls("GET", "^/objects/")
    assert (first.status, first.sent, second.status) == (None, 150_000, 206)
    assert second.sent == (folder / "model.safetensors").stat().st_size - 150_000


def test_a_wrong_hash_is_seen_by_who_compares(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert not api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    hub.wrong_etag(r"model\.safetensors")
    right = hub.repo(REPO).tree()["model.safetensors"].sha256
    assert (
        api.get_hf_file_metadata(url=f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors").etag
        != right
    )
    assert [
        one["path"] for one in api.verify_repo_checksums(REPO, local_dir=folder).mismatches
    ] == ["model.safetensors"]
    assert {one.rfilename: one.lfs for one in api.model_info(REPO, files_metadata=True).siblings}[
        "model.safetensors"
    ].sha256 != right


def test_a_slow_answer_runs_into_the_clients_limit(hub: HubServer, api: HfApi) -> None:
    hub.slow("/api/models/me/model$", seconds=0.5)
    with pytest.raises(Exception, match="timed out"):
        api.model_info(REPO, timeout=0.1)
    assert api.model_info(REPO, timeout=5).id == REPO


def test_what_no_route_knows_is_reported(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="404"):
        HfApi(endpoint=hub.endpoint).dataset_info("me/data")
    assert hub.problems == ["no route for GET /api/datasets/me/data"]
    hub.problems.clear()


# Other processes


PULL = """
import sys, torch
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("me/model")
torch.save(model(input_ids=torch.arange(5, 25)[None]).logits, sys.argv[1])
"""
PUSH = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo("me/model")
upload_folder(repo_id="me/model", folder_path=sys.argv[1])
"""


def run(code: str, *arguments: object, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_model_pushed_here_answers_the_same_in_a_fresh_process(
    hub: HubServer, tmp_path: Path
) -> None:
    model = tiny_llava()
    model.push_to_hub(REPO)
    assert len(hub.calls("PUT", r"^/upload/")) == 1
    run(PULL, tmp_path / "logits.pt", environment=hub.environment(tmp_path / "empty", token=""))
    logits = torch.load(tmp_path / "logits.pt")
    assert torch.equal(logits, model(input_ids=torch.arange(5, 25)[None]).logits)
    assert logits.isfinite().all()
    pulled = hub.calls("GET", r"^/objects/.*model\.safetensors")
    assert [request.had_authorization for request in pulled] == [False]


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_a_folder_pushed_by_another_process_is_read_here(
    hub: HubServer, folder: Path, tmp_path: Path, xet: bool
) -> None:
    if xet:
        pytest.importorskip("hf_xet")
    run(PUSH, folder, environment=hub.environment(tmp_path / "empty", xet=xet))
    assert bool(hub.calls("GET", "xet-write-token")) == xet
    assert bool(hub.calls("PUT", "^/upload/")) != xet
    assert (
        Path(hf_hub_download(REPO, "model.safetensors")).read_bytes()
        == contents(folder)["model.safetensors"]
    )


def test_it_runs_as_a_program(tmp_path: Path, hub: HubServer) -> None:
    command = [
        sys.executable,
        str(TESTS / "hub_server.py"),
        "--root",
        str(tmp_path / "program"),
        "--user",
        "her",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.readline()
        variables = dict(word.split("=", 1) for word in printed.split()[1:])
        api = HfApi(endpoint=variables["HF_ENDPOINT"], token=variables["HF_TOKEN"])
        api.create_repo("her/model")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="her/model")
        assert api.list_repo_files("her/model") == [".gitattributes", "config.json"]
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=30)[0] == "stopped\n"
        finally:
            process.kill()
    assert process.returncode == 0
