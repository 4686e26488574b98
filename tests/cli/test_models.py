"""Names of models that are not here: one quick line, and nothing asked of the Hub that the cache knows."""

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http
from PIL import Image
from tiny_models import tiny_llava

from qvlm_hf.cli import main
from qvlm_hf.cli.models import read_config


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Online by its settings, an empty cache, nobody at the Hub's address; waiting for a second try is an error."""

    class Clock:
        sleep = staticmethod(lambda seconds: pytest.fail(f"waits {seconds} s"))

    endpoint = "http://127.0.0.1:9"
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_http, "time", Clock)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield tmp_path
    close_session()


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "here", "--dataset", "none.jsonl", "--against", "me/missing"],
        ["evaluate", "me/missing", "--dataset", "{f}/samples.jsonl"],
        ["quantize", "me/missing", "--method", "rtn", "--output", "{f}/out"],
        ["ask", "me/missing", "what ?", "--image", "{f}/0.png"],
    ],
    ids=["against", "evaluate", "quantize", "ask"],
)
def test_a_hub_out_of_reach_is_asked_once(no_network, capsys, arguments):
    Image.new("RGB", (8, 8)).save(no_network / "0.png")
    (no_network / "samples.jsonl").write_text(
        '{"image": "0.png", "question": "what ?", "answer": "red"}'
    )
    assert main([word.replace("{f}", str(no_network)) for word in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "qvlm: error: me/missing: is no directory here, and the Hub cannot be reached ("
    )
    assert said.endswith("): check the name and the network.\n")
    assert said.count("\n") == 1


def test_a_cached_model_needs_no_hub(no_network):
    folder = no_network / "models--me--tiny"
    commit = "0" * 40
    tiny_llava().config.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert read_config("me/tiny").model_type == "llava"
