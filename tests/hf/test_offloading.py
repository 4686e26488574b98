"""Models that lie on CPU and disk are quantized to the same bits as those in memory."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import save_tiny, tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model

load = AutoModelForImageTextToText.from_pretrained


def config():
    return QVLMConfig(
        recipe="fixed",
        dataset=tiny_messages(4),
        processor=tiny_processor(),
        group_size=32,
        num_samples=4,
        max_block_depth=1,
    )


TIED = pytest.param(True, marks=pytest.mark.slow, id="tied")


@pytest.fixture(scope="module", params=[pytest.param(False, id="untied"), TIED])
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return save_tiny(folder, torch.bfloat16, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def expected(source):
    return load(source, quantization_config=config()).state_dict()


def check(model, expected, tmp_path):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


SPREAD = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu"} | {
    "model.language_model": "disk",
    "lm_head": "disk",
}


@pytest.mark.parametrize("device_map", ["auto", {"": "disk"}, SPREAD], ids=str)
def test_from_pretrained_with_a_device_map(source, expected, tmp_path, device_map):
    model = load(
        source,
        quantization_config=config(),
        device_map=device_map,
        offload_folder=tmp_path / "offload",
    )
    check(model, expected, tmp_path)


@pytest.mark.parametrize("way", ["device_map", "disk_offload", "cpu_offload"])
def test_a_model_that_was_offloaded_before(source, expected, tmp_path, way):
    if way == "device_map":
        model = load(source, device_map=SPREAD, offload_folder=tmp_path / "offload")
    else:
        model = load(source)
        if way == "disk_offload":
            disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))
        else:
            cpu_offload(model)
    assert any(parameter.is_meta for parameter in model.parameters())
    quantize_model(model, config())
    check(model, expected, tmp_path)
