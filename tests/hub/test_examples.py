"""The examples of docs/examples run as a reader runs them, one after the other."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SAID = {  # in order: the first writes what the others read
    "calibrate.py": "agrees with full precision",
    "load.py": "activation_bits  granularity",
    "evaluate.py": "full precision: accuracy",
    "publish.py": "/me/qvlm-example/commit/",
    "lora.py": "loss ",
}


@pytest.mark.slow
def test_every_example_runs(hub, tmp_path, monkeypatch, capsys):
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAID)
    monkeypatch.chdir(tmp_path)
    for name, words in SAID.items():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert words in capsys.readouterr().out, name
    assert hub.repo("me/qvlm-example").private
    assert Path("adapter", "adapter_config.json").is_file()
