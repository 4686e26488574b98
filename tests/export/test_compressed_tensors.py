"""What the format can say: which schemes, how wide, in which groups."""

import pytest
import torch

from qvlm_hf.export.compressed_tensors import (
    Stored,
    convert,
    quantization_config,
    stored_as,
    with_one_group_size,
)
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.format.weight_grid import quantize_weight
from qvlm_hf.nn.linear import packed_tensors


def scheme(**fields):
    return QuantScheme(
        **{
            "weight_bits": 4,
            "activation_bits": 16,
            "granularity": "none",
            "symmetric": True,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "in_features", "bits", "group_size"),
    [
        ({}, 256, 4, 128),
        ({}, 96, 4, -1),  # a row shorter than a group
        ({}, 128, 4, -1),
        ({}, 4304, 4, 16),  # 33.6 groups of 128 become 269 of 16
        ({"group_size": -1}, 4304, 4, -1),
        ({"weight_bits": 2}, 256, 2, 128),
        ({"weight_bits": 3}, 256, 4, 128),
        ({"weight_bits": 5}, 256, 8, 128),
        ({"weight_bits": 8}, 256, 8, 128),
    ],
)
def test_stored_as(fields, in_features, bits, group_size):
    assert stored_as("m", scheme(**fields), in_features) == Stored(
        weight_bits=bits, group_size=group_size, symmetric=True, quantized_input=False
    )


@pytest.mark.parametrize("granularity", ["channel", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_ranges_are_refused(granularity, bits):
    where = "input channel" if granularity == "channel" else "position"
    with pytest.raises(
        ValueError,
        match=f"^m: its static activation ranges have a zero point per {where}, which no consumer "
        f"reads: quant",
    ):
        stored_as(
            "m",
            scheme(weight_bits=bits, activation_bits=bits, granularity=granularity, group_size=-1),
            64,
        )


def test_stored_input_scales_are_refused():
    with pytest.raises(ValueError, match="divided by stored scales, which no consumer does"):
        stored_as("m", scheme(), 64, has_input_scale=True)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 8), (6, 6), (8, 4), (8, 7)])
def test_other_quantized_inputs_are_refused(weight_bits, activation_bits):
    with pytest.raises(
        ValueError,
        match=f"no consumer runs W{weight_bits}A{activation_bits} with one scale per row and no "
        "zero points: quantize with scheme='W8A8', group_size=-1 and symmetric=True",
    ):
        stored_as(
            "m",
            scheme(
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                granularity="dynamic_token",
                group_size=-1,
            ),
            64,
        )


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "in_features"), [(32, 88), (-1, 40), (8, 24)])
def test_no_weight_changes(weight_bits, symmetric, group_size, in_features):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    kind = scheme(weight_bits=weight_bits, symmetric=symmetric, group_size=group_size)
    quantized = quantize_weight(torch.randn(24, in_features), kind)
    stored = stored_as("m", kind, in_features)
    tensors = convert(
        packed_tensors(quantized, kind, None), kind, stored, in_features, torch.float32
    )
    group = quantization_config({"m": stored}, [])["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    weight = compressor.decompress(tensors, QuantizationScheme.model_validate(group))["weight"]
    assert torch.equal(weight, quantized.dequantize())


def test_zero_points_bring_one_group_size():
    rows = Stored(weight_bits=4, group_size=-1, symmetric=False, quantized_input=False)
    groups = Stored(weight_bits=4, group_size=64, symmetric=False, quantized_input=False)
    together = with_one_group_size({"a": rows, "b": groups}, {"a": 96, "b": 128})
    assert {kind.group_size for kind in together.values()} == {32}
    assert with_one_group_size({"a": rows}, {"a": 96}) == {"a": rows}


def test_symmetric_modules_keep_their_own_groups():
    rows = Stored(weight_bits=4, group_size=-1, symmetric=True, quantized_input=False)
    groups = Stored(weight_bits=8, group_size=64, symmetric=True, quantized_input=False)
    assert with_one_group_size({"a": rows, "b": groups}, {"a": 96, "b": 128}) == {
        "a": rows,
        "b": groups,
    }


def test_patterns_fit_both_programs():
    import re

    vision = Stored(weight_bits=8, group_size=-1, symmetric=True, quantized_input=False)
    language = Stored(weight_bits=4, group_size=-1, symmetric=True, quantized_input=False)
    modules = {
        "model.language_model.layers.0.mlp.up_proj": language,
        "model.language_model.layers.1.mlp.up_proj": language,
        "model.vision_tower.encoder.layers.1.mlp.fc1": vision,
    }
    config = quantization_config(modules, ["lm_head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    (pattern,) = config["config_groups"]["group_1"]["targets"]
    for name in (
        "model.vision_tower.encoder.layers.1.mlp.fc1",
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1",
    ):
        assert re.match(pattern.removeprefix("re:"), name)
    for name in (
        "model.vision_tower.encoder.layers.11.mlp.fc1",
        "model.vision_tower.encoder.layers.1.mlp.fc12",
    ):
        assert not re.match(pattern.removeprefix("re:"), name)
    (ignored,) = config["ignore"]
    assert all(
        re.match(ignored.removeprefix("re:"), name)
        for name in ("lm_head", "language_model.lm_head")
    )
