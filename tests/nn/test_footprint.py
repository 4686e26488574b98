"""The size formula against the bytes of saved files."""

from pathlib import Path

import pytest
import torch
from packing_by_hand import pack_linear
from tiny_models import tiny_llava
from transformers import LlavaForConditionalGeneration

from qvlm_hf import QVLMConfig, quantize_model
from qvlm_hf.bench.shapes import shape_config
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.files import tensor_headers, weight_files
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.hf.round_on_load import planned_report
from qvlm_hf.hub.saved import empty_model
from qvlm_hf.nn.footprint import count_parameters, footprint
from qvlm_hf.nn.replace import replace_modules


def saved_bytes(folder: Path) -> int:
    return sum(header.nbytes for file in weight_files(folder) for header in tensor_headers(file))


def pack_by_hand(model: LlavaForConditionalGeneration, modules: dict[str, QuantScheme]) -> None:
    for name, scheme in modules.items():
        linear = model.get_submodule(name)
        x = torch.rand(1, 5, linear.in_features)
        replace_modules(model, {name: pack_linear(linear, scheme, x)})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 128, False), (3, 24, True), (6, -1, False)]
)
def test_the_formula_is_the_saved_file_to_the_byte(
    tmp_path: Path, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, tied: bool
) -> None:
    model = tiny_llava(dtype=dtype, tie_word_embeddings=tied)
    granularities = {"vision": "channel", "projector": "dynamic_token", "language": "channel"}
    settings = CalibrationSettings(
        weight_bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_granularity=granularities,
    )
    modules = planned_report(model, settings).modules
    modules["model.language_model.layers.1.mlp.up_proj"] = QuantScheme(
        weight_bits=8, activation_bits=16, granularity="none"
    )
    assert {scheme.granularity for scheme in modules.values()} == {
        "dynamic_token",
        "channel",
        "none",
    }
    predicted = footprint(model, modules, dtype=dtype)
    model.save_pretrained(tmp_path / "full")
    count = sum(parameter.numel() for parameter in model.parameters())
    pack_by_hand(model, modules)
    model.save_pretrained(tmp_path / "packed")
    assert predicted.total.full_precision_bytes == saved_bytes(tmp_path / "full")
    assert predicted.total.quantized_bytes == saved_bytes(tmp_path / "packed")
    assert predicted.total.parameters == count == count_parameters(model)
    assert [row.component for row in predicted.rows] == [
        "vision",
        "projector",
        "language",
        "embeddings",
        *([] if tied else ["head"]),
    ]


def test_a_model_from_the_quantizer_agrees_too(tmp_path: Path) -> None:
    model = tiny_llava()
    config = QVLMConfig(scheme="W5A8", activation_granularity="dynamic_token", lm_head_bits=8)
    predicted = footprint(
        model, planned_report(model, config.settings()).modules, dtype=torch.float32
    )
    quantize_model(model, config)
    model.save_pretrained(tmp_path)
    assert predicted.total.quantized_bytes == saved_bytes(tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters", "ratio"),
    [("llava-1.5-7b", 7_063_427_072, 3.4), ("llava-1.5-13b", 13_351_494_656, 3.5)],
)
def test_w4a4_shrinks_the_published_models(name: str, parameters: int, ratio: float) -> None:
    model = empty_model(shape_config(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    sizes = footprint(model, planned_report(model, CalibrationSettings()).modules)
    assert sizes.total.parameters == parameters  # of the safetensors of llava-hf/llava-1.5-*-hf
    assert sizes.total.full_precision_bytes == 2 * parameters
    assert ratio <= sizes.total.ratio < 3.8
    rows = {row.component: row for row in sizes.rows}
    assert rows["embeddings"].ratio == rows["head"].ratio == 1.0
    assert rows["language"].ratio > 3.8
    assert str(sizes).splitlines()[-1].split()[0] == "total"
    assert len(str(sizes).splitlines()) == len(sizes.rows) + 2


def test_one_module_by_hand() -> None:
    # 64 x 100 at 3 bits: 10 words a row; 4 groups of 32 with a bf16 scale and a uint8 zero point
    scheme = QuantScheme(weight_bits=3, activation_bits=4, group_size=32)
    assert scheme.module_bytes(64, 100) == 64 * 10 * 4 + 64 * 4 * 3 + 100 * 8


def test_mistakes() -> None:
    model = tiny_llava()
    scheme = QuantScheme(weight_bits=4, activation_bits=4, granularity="token")
    with pytest.raises(ValueError, match=r"'model.nothing' is no linear module"):
        footprint(model, {"model.nothing": scheme})
    message = "'token': the calibrated positions are known to files alone"
    with pytest.raises(ValueError, match=message):
        footprint(model, {"model.vision_tower.encoder.layers.0.mlp.fc1": scheme})
    message = r"shape 'gpt' is unknown: this version has demo-1b, llava-1.5-7b, llava-1.5-13b"
    with pytest.raises(ValueError, match=message):
        shape_config("gpt")
