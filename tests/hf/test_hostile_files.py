"""Damaged and hostile files end in one error that names them, or load as the model they describe.

The cases are drawn from a seed: a value, key or length of quantization_config or of the safetensors
header is changed, bytes are flipped, or the file ends early.
"""

import copy
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from spoiled import spoil
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

SAVED = Path(__file__).parent.parent / "golden" / "saved"
DIRECTORIES = sorted(path.name for path in SAVED.iterdir())


def spoil_config(folder, rng):
    config = json.loads((folder / "config.json").read_text())
    method = config["quantization_config"].pop("quant_method")  # by which Transformers finds us
    said = spoil(config["quantization_config"], rng)
    config["quantization_config"]["quant_method"] = method
    (folder / "config.json").write_text(json.dumps(config))
    return f"config.json: {said}"


def spoil_weights(folder, rng):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    match rng.choice(["header", "header", "byte", "end"]):
        case "header":
            header = json.loads(content[8:end])
            said = spoil(header, rng)
            written = json.dumps(header).encode()
            content = len(written).to_bytes(8, "little") + written + content[end:]
        case "byte":
            at = rng.randrange(end)
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
            said = f"byte {at} is {content[at]}"
        case _:
            content = content[: rng.randrange(len(content))]
            said = f"ends behind {len(content)} bytes"
    file.write_bytes(content)
    return f"model.safetensors: {said}"


@functools.cache
def sound_config(name):
    """Read once: damaged weights do not change it."""
    return AutoConfig.from_pretrained(SAVED / name)


def try_damaged(folder, seed):
    """Loads one damaged copy; raises AssertionError unless it fails cleanly or works."""
    rng = random.Random(seed)
    name = rng.choice(DIRECTORIES)
    shutil.copytree(SAVED / name, folder)
    spoil_file = rng.choice([spoil_config, spoil_weights])
    said = spoil_file(folder, rng)
    options = {} if spoil_file is spoil_config else {"config": copy.deepcopy(sound_config(name))}
    before = {path.name for path in folder.parent.iterdir()}
    logits = message = None
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
        with torch.no_grad():  # a range per position may be of another number of them
            logits = model(input_ids=torch.tensor([[1, 2, 3, 4]])).logits
    except (ValueError, OSError) as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"seed {seed}, {said}: {type(error).__name__}: {error}") from error
    assert {path.name for path in folder.parent.iterdir()} == before  # nothing written outside
    if logits is None:
        assert len(message.splitlines()) == 1, f"seed {seed}, {said}: {message}"
        return False
    assert torch.isfinite(logits).all(), f"seed {seed}, {said}"
    return True


def try_many(seeds, tmp_path):
    loaded = 0
    for seed in seeds:
        loaded += try_damaged(tmp_path / "model", seed)
        shutil.rmtree(tmp_path / "model")
    return loaded


@pytest.fixture(autouse=True)
def _unwritten_configs(monkeypatch):
    """Transformers writes each configuration out five times for a log that nobody reads."""
    monkeypatch.setattr(PreTrainedConfig, "__repr__", object.__repr__)


@pytest.mark.parametrize("start", range(0, 200, 100))
def test_a_damaged_model_fails_in_one_line_or_works(start, tmp_path):
    assert try_many(range(start, start + 100), tmp_path) < 50  # most damage is noticed


@pytest.mark.slow
def test_ten_thousand_damaged_models(tmp_path):
    assert try_many(range(500, 10_500), tmp_path) < 5_000
