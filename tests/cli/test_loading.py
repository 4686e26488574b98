"""Names of models that are not here: one quick line, and no question to the Hub that is cached."""

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http
from PIL import Image
from tiny_models import tiny_llava

from qvlm_hf.cli import main
from qvlm_hf.cli.loading import read_config


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Online by its settings, an empty cache, nobody at the Hub's address; a second try fails."""

    class Clock:
        sleep = staticmethod(lambda seconds: pytest.fail(f"waits {seconds} s"))

    endpoint = "http://127.0.0.1:9"
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(_http, "time", Clock)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield tmp_path
    close_session()


@pytest.mark.parametrize(
    "words",
    [
        "evaluate here --dataset none.jsonl --against me/missing",
        "evaluate me/missing --dataset {f}/samples.jsonl",
        "quantize me/missing --method rtn --output {f}/out",
        "ask me/missing what? --image {f}/0.png",
    ],
)
def test_a_hub_out_of_reach_is_asked_once(no_network, capsys, words):
    Image.new("RGB", (8, 8)).save(no_network / "0.png")
    record = '{"image": "0.png", "question": "what ?", "answer": "red"}'
    (no_network / "samples.jsonl").write_text(record)
    assert main(words.replace("{f}", str(no_network)).split()) == 1
    said = capsys.readouterr().err
    told = "me/missing: is no directory here, and the Hub cannot be reached ("
    assert said.startswith(f"qvlm: error: {told}")
    assert said.endswith("): check the name and the network.\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["nope", "me/missing"])
@pytest.mark.parametrize(
    "command",
    [
        "quantize {} --method rtn --output out",
        "ask {} what? --image {f}/0.png",
        "evaluate {} --dataset {f}/samples.jsonl",
    ],
)
def test_offline_mode_is_named_with_the_model(no_network, monkeypatch, capsys, name, command):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(no_network)
    Image.new("RGB", (8, 8)).save("0.png")
    (no_network / "samples.jsonl").write_text('{"image": "0.png", "question": "q", "answer": "a"}')
    words = command.replace("{f}", ".").replace("{}", name)
    assert main(words.split()) == 1
    told = f"{name}: is no directory here and not in the cache, and offline mode is on "
    remedy = "(HF_HUB_OFFLINE): check the name, or unset it."
    assert capsys.readouterr().err == f"qvlm: error: {told}{remedy}\n"


def test_a_cached_model_needs_no_hub(no_network):
    folder = no_network / "models--me--tiny"
    commit = "0" * 40
    tiny_llava().config.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert read_config("me/tiny").model_type == "llava"
