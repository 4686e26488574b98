"""The pages of docs/ whose blocks talk to the Hub run against the one of the tests, where "me" owns
the token.
"""

import pytest
from huggingface_hub.utils import _cache_assets
from test_docs import ROOT, WITH_HUB, run_blocks

pytestmark = pytest.mark.hub


@pytest.mark.parametrize("page", WITH_HUB)
def test_blocks_run(hub, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    run_blocks(ROOT / "docs" / page)
    assert {name: repo.private for name, repo in hub.repos.items()} == {
        "me/demo-w4a16": False,
        "me/demo-pushed": True,
    }
    assert hub.repo("me/demo-w4a16").files("dev").keys() == hub.repo("me/demo-w4a16").files().keys()
