"""Families without a row, read by structure: quantized, saved, loaded again, and what is refused."""

import json

import pytest
import torch
from shrunken_families import tiny_model
from tiny_models import tiny_messages, tiny_processor
from transformers import AutoModelForImageTextToText

import qvlm_hf
from qvlm_hf.cli import main
from qvlm_hf.hf.saving import save_quantized
from qvlm_hf.models.by_structure import read_structure
from qvlm_hf.nn.replace import quantized_modules

# family -> percent of its weights that are quantized: embeddings are much of a tiny model
FAMILIES = {
    "hunyuan_vl": 56,  # packed patches, a merger with convolutions inside the tower
    "idefics": 71,  # cross-attention
    "blip-2": 69,  # a whole model without the attribute of its `base_model_prefix`
    "aria": 75,  # experts that have another name in files
    "glm4v_moe": 61,  # experts that Transformers would save one by one in its own way
}


def config(**changes):
    chosen = {"scheme": "W8A8", "activation_granularity": "dynamic_token"}
    return qvlm_hf.QVLMConfig(**(chosen | changes))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_saved_and_loaded(family, tmp_path):
    model = tiny_model(family)
    inputs = dict(read_structure(model).inputs)
    before = logits(model, inputs)
    report = qvlm_hf.quantize_model(model, config())
    found = report.provenance["coverage"]
    assert report.provenance["by_structure"] in ("model", "parts")
    assert found["percent"] == pytest.approx(FAMILIES[family], abs=1)
    assert found["percent"] + sum(found["kept"].values()) == pytest.approx(100, abs=0.6)
    assert report.warnings[0].startswith(f"only {found['percent']}% of the weights are quantized")
    expected = logits(model, inputs)
    assert 0 < (expected - before).norm() < 0.05 * before.norm()

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["provenance"]["coverage"] == found
    again = load(tmp_path)
    assert dict(quantized_modules(again)).keys() == report.modules.keys()
    assert torch.equal(logits(again, inputs), expected)

    again.save_pretrained(tmp_path / "again")  # what was loaded can be saved too
    assert torch.equal(logits(load(tmp_path / "again"), inputs), expected)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_quantized_while_loading(scheme, tmp_path):
    granularity = "dynamic_token" if scheme == "W8A8" else None
    chosen = config(scheme=scheme, activation_granularity=granularity)
    model = tiny_model("hunyuan_vl")
    inputs = dict(read_structure(model).inputs)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=chosen)
    qvlm_hf.quantize_model(model, chosen)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    texts = [one.generate(**inputs, max_new_tokens=4, do_sample=False) for one in (loaded, model)]
    assert torch.equal(*texts)


def test_card_and_inspect_say_it(tmp_path, capsys):
    model = tiny_model("hunyuan_vl")
    report = qvlm_hf.quantize_model(model, config())
    folder = save_quantized(model, None, tmp_path / "saved", report=report)
    percent = report.provenance["coverage"]["percent"]
    card = " ".join((folder / "README.md").read_text().split())
    assert f"{percent} % of the weights. It takes" in card
    assert "the model was read by structure" in card
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"read by structure: the family has no row\n{percent}% of the weights" in shown
    assert "vision" in shown


REFUSED = {
    "ranges to calibrate": {
        "dataset": tiny_messages(2), "scheme": "W4A4", "activation_granularity": None,
    },
    "data": {"dataset": tiny_messages(2)},
    "drawn data": {"dataset": "synthetic"},
    "rotation": {"rotation": "hadamard"},
    "equalization": {"dataset": tiny_messages(2), "equalization": True},
    "head": {"lm_head_bits": 8},
}  # fmt: skip


@pytest.mark.parametrize("asked", REFUSED)
def test_what_needs_a_row_is_refused(asked, tmp_path):
    chosen = config(**REFUSED[asked], processor=tiny_processor())
    model = tiny_model("hunyuan_vl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = "^family 'hunyuan_vl' has no row: only schemes without calibration, e.g. [^\n]*$"
    with pytest.raises(ValueError, match=message):
        qvlm_hf.quantize_model(model, chosen)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):  # it is refused before a weight is read
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=chosen)
