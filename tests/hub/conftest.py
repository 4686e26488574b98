"""The Hub of tests/fake_hub.py, and huggingface_hub's client that finds it."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _cache_assets, _http, _xet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub, an empty HF_HOME and the token in HF_TOKEN: every client finds it.

    huggingface_hub reads its variables at import, so what it read is replaced. Large files go by
    LFS, where uploads can be seen and cut; see `transfer`.
    """
    home, hub = tmp_path / "hf_home", FakeHub()
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    huggingface_hub.set_client_factory(hub.client)
    yield hub
    huggingface_hub.set_client_factory(_http.default_client_factory)
    assert not hub.problems


@pytest.fixture
def api(hub: FakeHub) -> HfApi:
    """The client of "me"."""
    return HfApi(token=hub.token)


@pytest.fixture(params=["lfs", "xet"])
def transfer(request: pytest.FixtureRequest, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which large files travel, for tests that must hold for both."""
    if request.param == "xet":
        hf_xet = pytest.importorskip("hf_xet")  # huggingface_hub brings it where there is a build
        monkeypatch.setattr(hf_xet, "XetSession", lambda: hub)
        monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once: the client would wait 1, 2, 4, 8, 8 seconds."""

    class Clock:
        sleep = staticmethod(lambda seconds: None)

    monkeypatch.setattr(_http, "time", Clock)
