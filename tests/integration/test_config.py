"""`QVLMConfig`: validation, JSON, copies."""

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from qvlm_hf import QVLMConfig
from qvlm_hf.core.scheme import QuantScheme

SCHEME = QuantScheme(weight_bits=4, activation_bits=8, granularity="dynamic_token")


def test_defaults_are_the_contract() -> None:
    config = QVLMConfig()
    assert (config.weight_bits, config.activation_bits, config.group_size, config.symmetric) == (4, 4, 128, False)
    assert (config.num_samples, config.batch_size, config.seed, config.max_block_depth) == (64, 8, 0, 3)
    assert (config.percentiles, config.margins) == ((1.0, 0.9999, 0.9995, 0.999), (1.1, 1.25))
    assert config.settings().needs_data


def test_paper_has_the_papers_grid_and_takes_overrides() -> None:
    config = QVLMConfig.paper(scheme="W6A6", seed=3)
    assert config.percentiles == (1.0, 0.995, 0.99, 0.985, 0.98)
    assert config.margins == ()
    assert config.activation_granularity == {"vision": "token", "projector": "channel", "language": "channel"}
    assert (config.scheme, config.seed) == ("W6A6", 3)
    assert QVLMConfig.paper(margins=(1.5,)).margins == (1.5,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "W1A4"}, "scheme='W1A4' is not W"),
        ({"scheme": 4}, "scheme=4 is not W"),
        ({"group_size": 10**9}, "group_size=1000000000 must be -1"),
        ({"group_size": "128"}, "group_size='128' must be"),
        ({"symmetric": 1}, "symmetric=1 must be True or False"),
        ({"num_samples": 0}, "num_samples=0 must be an integer of at least 1"),
        ({"percentiles": (2.0,)}, "percentiles=.* must be numbers from 0.9 to 1.0"),
        ({"lm_head_bits": 4}, "lm_head_bits=4 must be 8 or None"),
        ({"activation_granularity": "row"}, "activation_granularity='row'"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' must be a list"),
        ({"strict": "yes"}, "strict='yes' must be True or False"),
        ({"callbacks": "x"}, "callbacks='x' must be a list of objects"),
        ({"callbacks": [object()]}, "must have on_step"),
        ({"bits": 4}, "QVLMConfig has no field 'bits': the fields are activation_granularity"),
        ({"quant_method": "gptq"}, "quant_method='gptq' must be 'qvlm'"),
        ({"optimize_vision": 0}, "optimize_vision=0 must be True, False or a VisionOptimization"),
        ({"optimize_vision": {"epoch": 3}}, "does not have the fields of VisionOptimization"),
        ({"optimize_vision": {"epochs": 0}}, "VisionOptimization: epochs=0 must be an integer of at least 1"),
        ({"weight_rounding": "best"}, "weight_rounding='best' must be 'nearest', 'gptq' or 'learned'"),
        ({"rotation": "givens"}, "rotation='givens' must be 'hadamard', None or 'auto'"),
        ({"precision_budget": 1.5}, "precision_budget=1.5 must be an average of 2 to 8 bits"),
        ({"guard": "yes"}, "guard='yes' must be True or False"),
        ({"resume_dir": "x"}, "resume_dir='x' is not available"),
        ({"push_to_hub": True}, "push_to_hub=True must know where: pass hub_model_id='owner/name'"),
        ({"push_to_hub": "a/b"}, "push_to_hub='a/b' must be True or False"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' must be 'owner/name' of letters, digits"),
        ({"hub_private": 1}, "hub_private=1 must be True, False or None"),
        ({"provenance": [1]}, "provenance=.* must be a mapping"),
        ({"provenance": {"x": object()}}, "provenance must hold what JSON can"),
        ({"modules": ["a"]}, "modules must be a mapping"),
        ({"modules": {"model..up": SCHEME}}, "'model..up' is no canonical module name"),
        ({"modules": {"a.(b+)+$": SCHEME}}, "is no canonical module name"),
        ({"modules": {"model.vision_tower.vision_model.fc": SCHEME}}, "is no canonical module name"),
        ({"modules": {"model.up": {"weight_bits": 4}}}, "modules: model.up: a module entry must have exactly the keys"),
        ({"modules": {"model.up": SCHEME.to_dict() | {"weight_bits": 10**9}}}, "modules: model.up: weight_bits=1000000000 must be"),
        ({"format_version": 2}, "format_version=2 is newer than 1, which this version reads: upgrade qvlm_hf"),
        ({"format_version": "1"}, "format_version='1' must be an integer"),
    ],
)
def test_a_wrong_value_is_a_one_line_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        QVLMConfig(**fields)
    assert "\n" not in str(caught.value)


def test_a_file_with_unknown_fields_is_newer_or_damaged() -> None:
    entry = QVLMConfig().to_dict() | {"speed": 11}
    with pytest.raises(ValueError, match=r"unknown fields \['speed'\]: the file is damaged or from a newer qvlm_hf"):
        AutoQuantizationConfig.from_dict(entry)
    with pytest.raises(ValueError, match="format_version=9 is newer"):  # the version explains the field
        QVLMConfig.from_dict(entry | {"format_version": 9})


def test_json_round_trip_holds_settings_and_results_only() -> None:
    config = QVLMConfig.paper(
        dataset=[1],
        processor=object(),
        strict=True,
        push_to_hub=True,
        hub_model_id="me/model",
        hub_private=True,
        modules={"model.up": SCHEME},
        provenance={"samples": 3},
        modules_to_not_convert=("fc1",),
    )
    text = json.dumps(config.to_dict())
    again = AutoQuantizationConfig.from_dict(json.loads(text))
    assert again == config
    assert again.modules == {"model.up": SCHEME}
    assert json.dumps(again.to_dict()) == text
    assert dict(config) == config.to_diff_dict() == config.to_dict()
    assert not {"dataset", "processor", "callbacks", "strict", "resume_dir", "push_to_hub", "hub_model_id", "hub_private"} & set(
        config.to_dict()
    )
    assert '"scheme": "W4A4"' in repr(config)
    assert config != QVLMConfig()
    assert config != "W4A4"
    assert config.get("quant_method") == "qvlm"
    assert config.get("nothing", 5) == 5


def test_from_dict_hands_back_what_it_does_not_use() -> None:
    config, unused = QVLMConfig.from_dict({"scheme": "W8A8"}, return_unused_kwargs=True, other=1)
    assert (config.scheme, unused) == ("W8A8", {"other": 1})


def test_copies_share_what_belongs_to_the_process_and_pickles_drop_it() -> None:
    def collate() -> None: ...

    class Callback:
        on_step = staticmethod(lambda name, done, total: None)

    config = QVLMConfig(dataset=(n for n in range(3)), processor=collate, callbacks=[Callback()], provenance={"a": [1]})
    for twin in (copy.deepcopy(config), copy.copy(config)):
        assert twin.dataset is config.dataset
        assert twin.processor is collate
        assert twin.callbacks[0] is config.callbacks[0]
        assert twin.provenance is not config.provenance
        assert twin == config
    pickled = pickle.loads(pickle.dumps(config))
    assert pickled == config
    assert (pickled.dataset, pickled.processor, pickled.callbacks) == (None, None, ())


def test_a_checkpoint_keeps_its_own_configuration(saved: dict) -> None:
    path: Path = saved["rounded", "float32"].path
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForImageTextToText.from_pretrained(path, quantization_config=QVLMConfig(scheme="W8A8", dataset=[1]))
    assert model.config.quantization_config.scheme == "W4A16"
    assert model.hf_quantizer.quantization_config.dataset is None
    with pytest.raises(ValueError, match="quantized with QVLMConfig but you are passing a GPTQConfig"):
        AutoModelForImageTextToText.from_pretrained(path, quantization_config=GPTQConfig(bits=4))


def test_without_data_only_rounding_is_recorded():
    config = QVLMConfig(scheme="W4A16")
    config.settle_without_data()
    assert (config.weight_rounding, config.equalization, config.token_importance, config.guard) == ("nearest", False, False, False)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"weight_rounding": "learned"}, "weight_rounding='learned'"),
        ({"optimize_vision": True}, "optimize_vision"),
        ({"precision_budget": 3.0}, "precision_budget"),
    ],
)
def test_without_data_nothing_else_can_be_asked_for(fields, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)} needs calibration data"):
        QVLMConfig(scheme="W4A16", **fields).settle_without_data()


def test_the_papers_settings_fit_weight_only_schemes_too():
    assert QVLMConfig.paper("W4A16").activation_granularity is None
