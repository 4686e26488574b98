"""Weights that Transformers splits on loading and joins on saving, as packed ones cannot be."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family
from transformers import AutoModelForImageTextToText

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.nn.replace import quantized_modules

load = AutoModelForImageTextToText.from_pretrained
LAYER = "model.vision_tower.layers.0.attention"  # of Qianfan-OCR: files hold q/k/v as one


def config(*kept):
    return QVLMConfig(
        scheme="W8A8", activation_granularity="dynamic_token", modules_to_not_convert=kept or None
    )


def model():
    return tiny_family("qianfan_ocr", "qianfan_ocr", "qwen3")


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def keys(folder):
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("kept", [(), ("q_proj",), ("k_proj", "v_proj")], ids=str)
def test_rounded_while_loading_and_saved_apart(kept, tmp_path):
    whole = model()
    whole.save_pretrained(tmp_path / "full")
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in keys(tmp_path / "full")
    loaded = load(tmp_path / "full", quantization_config=config(*kept))
    quantize_model(whole, config(*kept))
    assert same(loaded, whole)
    for number, one in enumerate((loaded, whole)):
        one.save_pretrained(tmp_path / str(number))
        assert keys(tmp_path / str(number)) == one.state_dict().keys()
        assert same(load(tmp_path / str(number)), whole)


def test_names_of_the_hub_are_kept_where_they_lead_back(tmp_path):
    whole = tiny_family("internvl", "internvl", "qwen2")  # the same layers, their names changed
    quantize_model(whole, config())
    whole.save_pretrained(tmp_path)
    assert keys(tmp_path).isdisjoint(f"{name}.weight" for name, _ in quantized_modules(whole))
    assert same(load(tmp_path), whole)


def test_in_full_precision_again_they_are_joined(tmp_path):
    whole = model()
    quantize_model(whole, config())
    whole.dequantize()
    whole.save_pretrained(tmp_path)
    assert "vision_model.encoder.layers.0.attn.qkv.weight" in keys(tmp_path)
    assert same(load(tmp_path), whole)


@pytest.mark.parametrize("kept", [(), ("k_proj",)], ids=str)
def test_a_weight_of_another_shape_is_named(kept, tmp_path):
    model().save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.k_proj.weight"] = torch.zeros(32, 16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    message = rf"^{LAYER}.k_proj.weight: is \[32, 16\] in the files, must be \[32, 32\]"
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, quantization_config=config(*kept))
    assert "\n" not in str(caught.value)
