"""The full-precision model's name in the provenance: a Hub id only with evidence, never a path."""

import shutil

import pytest
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.calibration.samples import dataset_name
from qvlm_hf.hf.origin import origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, source):
    """A cache as the Hub's client leaves it, with one model."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_model_of_the_hub_is_named_with_its_commit(cache):
    config = QVLMConfig(scheme="W4A16")
    model = AutoModelForImageTextToText.from_pretrained(
        "me/tiny", cache_dir=cache, quantization_config=config
    )
    found = model.config.quantization_config.provenance
    assert (found["base_model"], found["base_model_revision"]) == ("me/tiny", COMMIT)
    assert model.hf_quantizer.report.provenance == found


def test_a_directory_is_named_without_its_path(source):
    model = AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=QVLMConfig(scheme="W4A16")
    )
    assert model.hf_quantizer.report.provenance["base_directory"] == source.name
    assert "base_model" not in model.hf_quantizer.report.provenance


def test_a_model_in_memory_needs_evidence_for_a_hub_id(cache, monkeypatch):
    model = tiny_llava()
    assert "base_model" not in quantize_model(model, QVLMConfig(scheme="W4A16")).provenance
    other = tiny_llava()
    for name, expected in (("gone/model", "model"), ("../gone/model", "model"), ("", None)):
        other.config.name_or_path = name
        assert origin(other) == ({} if expected is None else {"base_directory": expected})
    other.config.name_or_path = "me/tiny"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    assert origin(other) == {"base_model": "me/tiny"}


def test_data_sets_are_named_without_their_path(tmp_path):
    (tmp_path / "scienceqa").mkdir()
    (tmp_path / "a.jsonl").write_text("{}")
    assert dataset_name(tmp_path / "a.jsonl") == "a.jsonl"
    assert dataset_name(f"{tmp_path}/scienceqa") == "scienceqa"
    assert dataset_name(f"{tmp_path}/scienceqa:minival") == "scienceqa:minival"
    assert dataset_name("me/data:train") == "me/data:train"
    assert dataset_name("synthetic") == "synthetic"
    assert dataset_name([{}]) == "list in memory"
