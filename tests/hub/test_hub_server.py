import pytest
from huggingface_hub import HfApi

pytestmark = pytest.mark.hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


def test_push(hub, api, transfer, tmp_path):
    d = tmp_path / "m"
    d.mkdir()
    (d / "config.json").write_text("{}")
    (d / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (d / "README.md").write_text("---\nlicense: mit\n---\nhi")
    print(api.whoami())
    api.create_repo("me/model")
    api.create_repo("me/model", exist_ok=True)
    print(api.upload_folder(repo_id="me/model", folder_path=d))
    print(hub.repo("me/model").files().keys())
    print(api.model_info("me/model", files_metadata=True))
    print(api.snapshot_download("me/model"))
    for r in hub.requests:
        print(r)
