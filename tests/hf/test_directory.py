"""Damaged directories: a line that names the file, where Transformers would end in a KeyError or a page of tensor names."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import save_tiny, tiny_llava
from transformers import AutoConfig, AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model, save_quantized
from qvlm_hf.cli import main
from qvlm_hf.format.files import weight_files
from qvlm_hf.hf.checkpoint import check_directory

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, processor):
    """Quantized, in several files."""
    model = tiny_llava()
    report = quantize_model(model, QVLMConfig(scheme="W4A16"))
    return save_quantized(
        model,
        processor,
        tmp_path_factory.mktemp("sharded") / "model",
        report=report,
        max_shard_size="60KB",
    )


@pytest.fixture
def damaged(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "damaged"))


def ask(folder, capsys):
    """What `qvlm ask` says of a model that it cannot load."""
    picture = folder.parent / "0.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert main(["ask", str(folder), "what colour ?", "--image", str(picture)]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("\xff", "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "model-00001-of-00005.safetensors"}}', "has no metadata"),
        (
            '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}',
            "names 'gone.safetensors', which is no file there",
        ),
    ],
)
def test_a_damaged_index(damaged, capsys, content, message):
    (damaged / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForImageTextToText.from_pretrained(damaged)
    assert str(caught.value).startswith(f"{damaged / INDEX}: ")
    assert str(caught.value).endswith(": download or quantize the model again.")
    assert "\n" not in str(caught.value)
    said = ask(damaged, capsys)
    assert said == f"qvlm: error: {caught.value}\n"


def test_a_damaged_index_of_a_model_to_be_quantized(tmp_path, capsys):
    tiny_llava().save_pretrained(tmp_path / "model", max_shard_size="100KB")
    index = tmp_path / "model" / INDEX
    index.write_text(index.read_text()[:-20])
    with pytest.raises(ValueError, match="is no JSON: download"):
        AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", quantization_config=QVLMConfig(scheme="W4A16")
        )


def test_an_index_beside_the_single_file_is_not_read(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / INDEX).write_text("{")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=QVLMConfig(scheme="W4A16")
    )
    assert model.is_quantized


def test_a_whole_directory_passes(sharded):
    check_directory(sharded, AutoConfig.from_pretrained(sharded))
    assert len(weight_files(sharded)) > 1
    assert all(Path(file).is_file() for file in weight_files(sharded))


def configured(folder, value):
    """The directory with another `quantization_config`; ... takes it out."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = value
    if value is ...:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("value", [None, {}, ...], ids=["null", "empty", "missing"])
def test_packed_weights_without_their_configuration(damaged, capsys, value):
    said = ask(configured(damaged, value), capsys)
    assert said.startswith(
        f"qvlm: error: {damaged}: its config.json has no quantization_config, but "
    )
    assert said.endswith(
        ".weight_scale is of a quantized model: download or quantize the model again.\n"
    )


def test_null_is_harmless_in_a_full_precision_model(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    configured(tmp_path / "model", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert (
        main(
            [
                "ask",
                str(tmp_path / "model"),
                "what colour ?",
                "--image",
                str(tmp_path / "0.png"),
                "--max-new-tokens",
                "1",
            ]
        )
        == 0
    )
