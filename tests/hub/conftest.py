"""The Hub of tests/hub_server.py and a huggingface_hub that talks to it, here and in other
processes.
"""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants, hf_api
from huggingface_hub.utils import _cache_assets, _http
from transformers.utils import hub as transformers_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub, an empty HF_HOME and the token in HF_TOKEN: every client finds it.

    huggingface_hub reads its variables at import, so what it read is replaced. Large files go by
    LFS, where uploads can be seen and cut; see `transfer`.
    """
    with HubServer(tmp_path / "hub_server") as server:
        home = tmp_path / "hf_home"
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_PROGRESS_BARS": True,
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # of huggingface_hub.create_repo and its like
        monkeypatch.setattr(hf_api.api, "endpoint", server.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made at first use, and kept
        monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # proxies are read when a session starts
        yield server
        huggingface_hub.close_session()
        assert not server.problems


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of "me"."""
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture(params=["lfs", "xet"])
def transfer(
    request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Both ways in which large files travel, for tests that must hold for both."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")  # huggingface_hub brings it where there is a build
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once: the client would wait 1, 2, 4, 8, 8 seconds."""

    class Clock:
        sleep = staticmethod(lambda seconds: None)

    monkeypatch.setattr(_http, "time", Clock)
