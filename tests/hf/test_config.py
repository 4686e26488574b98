"""`QVLMConfig`: validation, JSON, copies."""

import copy
import itertools
import json
import pickle
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from qvlm_hf import QVLMConfig, VisionOptimization, quantize_model
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.format.scheme import QuantScheme

SCHEME = QuantScheme(weight_bits=4, activation_bits=8, granularity="dynamic_token")
MANY_BITS = SCHEME.to_dict() | {"weight_bits": 10**9}
NOT, OBJECT = "modules_to_not_convert", "<object .*> is object, must be what JSON"


def test_defaults_are_the_contract() -> None:
    config = QVLMConfig()
    wanted = {"weight_bits": 4, "activation_bits": 4, "group_size": 128, "symmetric": False}
    wanted |= {"quantize_vision": True, "quantize_projector": True, "lm_head_bits": None}
    wanted |= {"activation_granularity": None, "modules_to_not_convert": (), "strict": False}
    wanted |= {"num_samples": 64, "batch_size": 8, "seed": 0, "max_block_depth": 3}
    wanted |= {"percentiles": (1.0, 0.9999, 0.9995, 0.999), "margins": (1.1, 1.25)}
    wanted |= {"entropy_threshold": None}
    for fields in (config.settings(), CalibrationSettings()):
        assert {name: getattr(fields, name) for name in wanted} == wanted
    wanted |= {"modules_to_not_convert": None}
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.settings().needs_data


def test_paper_has_the_papers_grid_and_takes_overrides() -> None:
    config = QVLMConfig.paper(scheme="W6A6", seed=3)
    assert config.percentiles == (1.0, 0.995, 0.99, 0.985, 0.98)
    assert config.margins == ()
    channel = {"projector": "channel", "language": "channel"}
    assert config.activation_granularity == {"vision": "token"} | channel
    assert (config.scheme, config.seed) == ("W6A6", 3)
    assert QVLMConfig.paper(margins=(1.5,)).margins == (1.5,)
    assert QVLMConfig.paper("W4A16").activation_granularity is None


def test_a_file_with_unknown_fields_is_newer_or_damaged() -> None:
    entry = QVLMConfig().to_dict() | {"speed": 11}
    message = r"unknown fields \['speed'\]: the file is damaged or from a newer qvlm_hf"
    with pytest.raises(ValueError, match=message):
        AutoQuantizationConfig.from_dict(entry)
    # the version explains the field
    with pytest.raises(ValueError, match="format_version=9 is newer"):
        QVLMConfig.from_dict(entry | {"format_version": 9})


def test_json_round_trip_holds_settings_and_results_only() -> None:
    config = QVLMConfig.paper(
        dataset=[1], processor=object(), strict=True, push_to_hub=True, hub_model_id="me/model",
        hub_private=True, modules={"model.up": SCHEME}, provenance={"samples": 3},
        modules_to_not_convert=("fc1",), resume_dir="stopped", scratch_dir="files",
    )  # fmt: skip
    text = json.dumps(config.to_dict())
    again = AutoQuantizationConfig.from_dict(json.loads(text))
    assert again == config
    assert again.modules == {"model.up": SCHEME}
    assert json.dumps(again.to_dict()) == text
    assert dict(config) == config.to_diff_dict() == config.to_dict()
    unsaved = "dataset processor callbacks strict resume_dir scratch_dir push_to_hub hub_model_id hub_private"
    assert not set(unsaved.split()) & set(config.to_dict())
    assert '"scheme": "W4A4"' in repr(config)
    assert config != QVLMConfig()
    assert config != "W4A4"
    assert config.get("quant_method") == "qvlm"
    assert config.get("nothing", 5) == 5


def test_from_dict_hands_back_what_it_does_not_use() -> None:
    given = {"return_unused_kwargs": True, "other": 1, "group_size": 64}
    config, unused = QVLMConfig.from_dict({"scheme": "W8A8"}, **given)
    assert (config.scheme, config.group_size, unused) == ("W8A8", 64, {"other": 1})
    with pytest.raises(ValueError, match="QVLMConfig has no field 'other'"):  # it would vanish
        QVLMConfig.from_dict({"scheme": "W8A8"}, other=1)


@pytest.mark.parametrize("bad", [None, 3, "W4A4", [("scheme", "W4A4")], torch.ones(2, 2)])
def test_from_dict_takes_a_mapping(bad: Any) -> None:
    message = r"\Aquantization_config=.* must be a mapping of fields, as to_dict\(\) gives it\.\Z"
    with pytest.raises(ValueError, match=message):
        QVLMConfig.from_dict(bad)


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = make(None)
    for _ in range(depth):
        value = make(value)
    return value


NESTED: dict[str, Callable[[Any], Any]] = {
    "list": lambda value: [value, value],
    "dict": lambda value: {"a": value},
    "iterator": lambda value: iter([value]),
    "array": lambda value: np.array([value, None], dtype=object),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize(
    "field", ["provenance", "modules", NOT, "activation_granularity", "optimize_vision", "seed"]
)
def test_values_nested_very_deep_are_refused_in_one_line(field: str, kind: str) -> None:
    depth = 5_000 if kind in ("list", "dict") else 300  # Python cannot free deeper others
    value = nested(depth, NESTED[kind])
    named = {"provenance": {"x": value}, "modules": {"model.up": value}}.get(field, value)
    said = "is nested more than 50 deep, or holds itself: give plain values"
    with pytest.raises(ValueError, match=rf"\A(modules: model.up: entry|{field}) {said}\.\Z"):
        QVLMConfig(**{field: named})


def test_values_that_hold_themselves_are_refused_and_40_levels_are_not() -> None:
    mapping: dict[str, Any] = {}
    mapping["self"] = mapping
    loop: list[Any] = []
    loop += [loop, loop]
    for value in (mapping, {"x": loop}):
        with pytest.raises(ValueError, match=r"^provenance is nested more than 50 deep, or hold"):
            QVLMConfig(provenance=value)
    with pytest.raises(ValueError, match=r"^callback \[\[.* must have on_step"):
        QVLMConfig(callbacks=[loop])
    with pytest.raises(ValueError, match=r"^callback a list nested too deep must have on_step"):
        QVLMConfig(callbacks=[nested(5_000, lambda value: [value])])
    deep = QVLMConfig(provenance=nested(40, lambda value: {"a": [1, value]} if value else {}))
    assert QVLMConfig.from_dict(json.loads(deep.to_json_string())) == copy.deepcopy(deep) == deep


class Part(Enum):
    HEAD = "lm_head"
    VISION = "vision"
    BITS = 8


NAMES = ["lm_head", "fc1"]
# What a user may give -> what the same in plain values is.
GIVEN: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "map": (lambda: {NOT: map(str, NAMES)}, {NOT: NAMES}),
    "generator": (lambda: {NOT: (name for name in NAMES)}, {NOT: NAMES}),
    "empty generator": (lambda: {NOT: iter(())}, {NOT: []}),
    "set": (lambda: {NOT: set(NAMES)}, {NOT: sorted(NAMES)}),
    "frozenset": (lambda: {NOT: frozenset(NAMES)}, {NOT: sorted(NAMES)}),
    "keys": (lambda: {NOT: dict.fromkeys(NAMES).keys()}, {NOT: NAMES}),
    "values": (lambda: {NOT: {1: "lm_head", 2: "fc1"}.values()}, {NOT: NAMES}),
    "deque": (lambda: {NOT: deque(NAMES)}, {NOT: NAMES}),
    "array of text": (lambda: {NOT: np.array(NAMES)}, {NOT: NAMES}),
    "enum and path": (lambda: {NOT: [Part.HEAD, Path("fc1")]}, {NOT: NAMES}),
    "text of NumPy": (lambda: {"scheme": np.str_("W8A8"), "rotation": np.str_("hadamard")}, {"scheme": "W8A8", "rotation": "hadamard"}),
    "integers of NumPy": (
        lambda: {name: np.int64(16) for name in ("group_size", "num_samples", "batch_size", "seed", "max_block_depth")},
        dict.fromkeys(("group_size", "num_samples", "batch_size", "seed", "max_block_depth"), 16),
    ),
    "integers of PyTorch": (lambda: {"seed": torch.tensor(3), "lm_head_bits": Part.BITS}, {"seed": 3, "lm_head_bits": 8}),
    "booleans of NumPy": (
        lambda: {name: np.bool_(True) for name in ("symmetric", "strict", "guard", "push_to_hub")} | {"hub_model_id": "a/b"},
        dict.fromkeys(("symmetric", "strict", "guard", "push_to_hub"), True) | {"hub_model_id": "a/b"},
    ),
    "booleans of PyTorch": (lambda: {"equalization": torch.tensor(False)}, {"equalization": False}),
    "array of floats": (lambda: {"percentiles": np.array([1.0, 0.99])}, {"percentiles": [1.0, 0.99]}),
    "long floats": (lambda: {"percentiles": np.array([1, 0.5 + 0.25 + 0.1875], np.longdouble)}, {"percentiles": [1.0, 0.9375]}),
    "tensor of floats": (lambda: {"margins": torch.tensor([1.5, 1.25])}, {"margins": [1.5, 1.25]}),
    "fractions": (lambda: {"percentiles": [Fraction(1), Fraction(9, 10)]}, {"percentiles": [1.0, 0.9]}),
    "decimals": (lambda: {"margins": [Decimal("1.1")]}, {"margins": [1.1]}),
    "float32": (lambda: {"entropy_threshold": np.float32(0.5)}, {"entropy_threshold": 0.5}),
    "float16": (lambda: {"precision_budget": np.float16(3.5)}, {"precision_budget": 3.5}),
    "a mapping": (
        lambda: {"activation_granularity": MappingProxyType({Part.VISION: np.str_("token")})},
        {"activation_granularity": {"vision": "token"}},
    ),
    "vision optimization": (
        lambda: {"optimize_vision": VisionOptimization(epochs=np.int32(3), learning_rate=Fraction(1, 4), error_weight=torch.tensor(2.0))},
        {"optimize_vision": {"epochs": 3, "learning_rate": 0.25, "error_weight": 2.0}},
    ),
    "true": (lambda: {"optimize_vision": np.bool_(True)}, {"optimize_vision": True}),
    "provenance": (
        lambda: {"provenance": {"samples": np.int64(3), "file": Path("a"), "kinds": {"b", "a"}}},
        {"provenance": {"samples": 3, "file": "a", "kinds": ["a", "b"]}},
    ),
    "modules": (
        lambda: {"modules": {"model.up": SCHEME.to_dict() | {"weight_bits": np.int64(4)}}},
        {"modules": {"model.up": SCHEME}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GIVEN)
def test_every_field_becomes_a_plain_value(kind: str) -> None:
    make, plain = GIVEN[kind]
    config, expected = QVLMConfig(**make()), QVLMConfig(**plain)
    assert config.__dict__ == expected.__dict__
    assert config.to_json_string() == expected.to_json_string()
    assert repr(config.settings()) == repr(expected.settings())
    assert config.settings() == config.settings()  # nothing is used up
    changed = QVLMConfig()
    assert changed.update(**make()) == {}
    assert changed.to_json_string() == expected.to_json_string()
    assert QVLMConfig.from_dict({}, **make()).to_json_string() == expected.to_json_string()


def test_a_value_is_kept_as_it_was_when_given() -> None:
    granularity, names = {"vision": "token"}, ["lm_head"]
    config = QVLMConfig(activation_granularity=granularity, modules_to_not_convert=names)
    granularity["language"] = "token"
    names.append(3)
    assert config.to_dict()["activation_granularity"] == {"vision": "token"}
    assert config.to_dict()["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheme": "W1A4"}, "scheme='W1A4' is not W"),
        ({"scheme": 4}, "scheme=4 is not W"),
        ({"callbacks": "x"}, "callbacks='x' must be a list of objects"),
        ({"callbacks": [object()]}, "must have on_step"),
        ({"callbacks": torch.tensor(1.0)}, r"callbacks=tensor\(1\.\) must be a list of objects"),
        ({"callbacks": torch.ones(2, 2)}, r"callback tensor\(\[1\., 1\.\]\) must have on_step"),
        ({"callbacks": torch.ones(2, device="meta")}, "callback tensor.* must have on_step"),
        ({"callbacks": itertools.repeat(torch)}, "callbacks=repeat.* must be a list of objects"),
        ({"callbacks": 3}, "callbacks=3 must be a list of objects"),
        ({"provenance": torch.ones(2, 2)}, r"provenance=tensor\(\[\[1\., .*\) must be a mapping"),
        ({"resume_dir": torch.ones(2, 2)}, "resume_dir=tensor.* must be the name of a directory"),
        ({"quant_method": np.ones((2, 2))}, "quant_method=array.* must be 'qvlm'"),
        ({"quant_method": "gptq"}, "quant_method='gptq' must be 'qvlm'"),
        ({"optimize_vision": 0}, "optimize_vision=0 must be True, False or a VisionOptimization"),
        ({"optimize_vision": {"epoch": 3}}, "does not have the fields of VisionOptimization"),
        ({"optimize_vision": {"epochs": 0}}, "Optimization: epochs=0 must be an integer of at"),
        ({"rotation": "givens"}, "rotation='givens' must be 'hadamard', None or 'auto'"),
        ({"resume_dir": ""}, "resume_dir='' must be the name of a directory"),
        ({"push_to_hub": True}, "push_to_hub=True must know where: pass hub_model_id='owner/name'"),
        ({"push_to_hub": "a/b"}, "push_to_hub='a/b' must be True or False"),
        ({"hub_model_id": "a/b/c"}, "hub_model_id='a/b/c': Repo id must be in the form 'repo_na"),
        ({"hub_private": 1}, "hub_private=1 must be True, False or None"),
        ({"provenance": [1]}, "provenance=.* must be a mapping"),
        ({"provenance": {"x": object()}}, f"provenance={OBJECT} can hold: a number, text, list or"),
        ({"provenance": {"x": [float("nan")]}}, "provenance must hold what JSON can: Out of rang"),
        ({"modules": ["a"]}, "modules must be a mapping"),
        ({"modules": {"model..up": SCHEME}}, "'model..up' is no canonical module name"),
        ({"modules": {"a.(b+)+$": SCHEME}}, "is no canonical module name"),
        ({"modules": {"model.vision_tower.vision_model.fc": SCHEME}}, "is no canonical module na"),
        ({"modules": {"model.up": {"weight_bits": 4}}}, "model.up: a module entry must have exact"),
        ({"modules": {"model.up": MANY_BITS}}, "modules: model.up: weight_bits=1000000000 must be"),
        ({"format_version": 2}, "format_version=2 is newer than 1, which this version reads: upg"),
        ({"format_version": "1"}, "format_version='1' must be an integer"),
        ({NOT: b"lm_head"}, f"{NOT}=b'lm_head' is bytes, must be what JSON can hold"),
        ({NOT: [object()]}, f"{NOT}={OBJECT}"),
        ({NOT: {"lm_head": 1}}, f"{NOT}={{'lm_head': 1}} must be a list"),
        ({NOT: {"a", 1}}, f"{NOT}={{.*}} cannot be sorted: give a list"),
        ({NOT: itertools.repeat("a")}, f"{NOT} has more than 100000 entries"),
        ({"percentiles": torch.ones(2, device="meta")}, "percentiles=tensor.* cannot be read:"),
        ({"percentiles": np.array([1.0 + 1j])}, "percentiles=.* is complex, must be what JSON can"),
        ({"percentiles": np.ones((1, 2))}, r"percentiles=\(\(1.0, 1.0\),\) must be numbers"),
        ({"entropy_threshold": Fraction(10**400)}, "entropy_threshold=inf must be a number"),
        ({"entropy_threshold": 10**400}, "entropy_threshold=10* must be a number"),
        ({"seed": np.float64(3)}, r"seed=3\.0 must be an integer"),
        ({"seed": torch.ones(2).int()}, r"seed=\(1, 1\) must be an integer"),
        ({"num_samples": Fraction(7, 2)}, r"num_samples=3\.5 must be an integer"),
        ({"group_size": object}, "group_size=<class 'object'> is type, must be what JSON"),
        ({"strict": np.int64(1)}, "strict=1 must be True or False"),
        ({"scheme": ["W4A4"]}, r"scheme=\('W4A4',\) is not W"),
        ({"optimize_vision": {"epochs": object()}}, f"optimize_vision={OBJECT}"),
        ({"hub_model_id": object(), "push_to_hub": True}, f"hub_model_id={OBJECT}"),
        ({"hub_private": np.int8(1)}, "hub_private=1 must be True, False or None"),
        ({"activation_granularity": "dynamic_token", "scheme": "W4A16"}, "token' has no meaning"),
    ],
)
def test_a_wrong_value_is_refused_wherever_it_is_given(fields: dict, message: str) -> None:
    config = QVLMConfig(seed=5)
    before = copy.deepcopy(config.__dict__)

    def assign() -> None:
        for name, value in fields.items():
            setattr(config, name, value)

    ways = (
        lambda: QVLMConfig(**fields),
        lambda: QVLMConfig.from_dict(config.to_dict(), **fields),
        lambda: config.update(**fields),
    )
    for way in (*ways, assign) if len(fields) == 1 else ways:
        with pytest.raises(ValueError, match=message) as caught:
            way()
        assert "\n" not in str(caught.value)
    assert config.__dict__ == before


def test_fields_can_be_changed_together_and_one_by_one() -> None:
    config = QVLMConfig(activation_granularity="channel")
    with pytest.raises(ValueError, match="has no meaning for 16-bit"):
        config.scheme = "W4A16"
    changes = {"scheme": "W4A16", "activation_granularity": None}
    assert config.update(**changes, colour="red") == {"colour": "red"}
    assert (config.scheme, config.activation_granularity) == ("W4A16", None)
    config.modules_to_not_convert = iter(["lm_head"])
    assert config.to_dict()["modules_to_not_convert"] == ["lm_head"]
    config.note = object()  # what is like no field is nobody's business
    assert "note" not in config.to_dict()


MISSPELT = {"grup_size": "group_size", "Seed": "seed", "callback": "callbacks", "schema": "scheme"}


@pytest.mark.parametrize(
    ("name", "field"), [*MISSPELT.items(), ("module_to_not_convert", "modules_to_not")]
)
def test_a_misspelt_field_is_refused_wherever_it_is_given(name: str, field: str) -> None:
    config = QVLMConfig()
    before = dict(config.__dict__)
    ways = (
        lambda: setattr(config, name, 3),
        lambda: config.update(**{name: 3}),
        lambda: QVLMConfig(**{name: 3}),
    )
    for way in (*ways, lambda: QVLMConfig.from_dict({}, **{name: 3})):
        with pytest.raises(ValueError, match=f"^QVLMConfig has no field '{name}': is it '{field}"):
            way()
    assert config.__dict__ == before


def test_bits_come_from_the_scheme() -> None:
    config = QVLMConfig()
    for name in ("weight_bits", "activation_bits"):
        for way in (
            lambda name=name: setattr(config, name, 8),
            lambda name=name: QVLMConfig(**{name: 8}),
            lambda name=name: config.update(**{name: 8}),
        ):
            with pytest.raises(ValueError, match=f"^{name} comes from the scheme: give scheme, "):
                way()


def test_attributes_that_frameworks_set_are_carried_along_and_not_saved() -> None:
    config = QVLMConfig()
    before = config.to_json_string()
    # Transformers' own quantizers set the first four, loading attributes and others' tools the
    # rest.
    names = "dequantize tokenizer gguf_file _marked use_cuda_fp16 skip_modules pre_quantized bits"
    for name in (*names.split(), "desc_act"):
        setattr(config, name, [name])
    assert config.to_json_string() == before
    for twin in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        assert twin.__dict__ == config.__dict__
        assert twin.gguf_file is not config.gguf_file
    with pytest.raises(ValueError, match=r"^QVLMConfig has no field 'bits': the fields are act"):
        QVLMConfig(bits=4)
    config.modules_to_not_convert = ["fc1"]  # as Transformers' FP8 quantizer does
    assert config.to_dict()["modules_to_not_convert"] == ["fc1"]


def test_a_mapping_changed_in_place_is_checked_before_it_is_used() -> None:
    granularity, modules = {"vision": "token"}, {"model.up": SCHEME}
    config = QVLMConfig(
        provenance={"file": "a"}, activation_granularity=granularity, modules=modules
    )
    config.provenance["kinds"] = {"b"}
    assert config.to_dict()["provenance"] == {"file": "a", "kinds": ["b"]}
    assert copy.deepcopy(config).provenance == {"file": "a", "kinds": ["b"]}
    assert json.loads(config.to_json_string())["provenance"] == {"file": "a", "kinds": ["b"]}
    positions = "^activation_granularity='token' needs a fixed number of positions"
    for mapping, key, bad, message in (
        (config.provenance, "x", object(), f"^provenance={OBJECT} can hold"),
        (config.activation_granularity, "language", "token", positions),
        (config.modules, "model..down", SCHEME, "^modules: 'model..down' is no canonical module"),
    ):
        mapping[key] = bad
        # the copy is what loading and quantize_model begin with: nothing is calibrated first
        ways = (lambda: copy.deepcopy(config), lambda: quantize_model(tiny_llava(), config))
        for way in (config.to_dict, config.to_json_string, *ways):
            with pytest.raises(ValueError, match=message):
                way()
        del mapping[key]
    assert config.to_dict()


def test_excluded_modules_of_an_iterator_stay_in_full_precision() -> None:
    model = tiny_llava()
    quantize_model(model, QVLMConfig(scheme="W4A16", modules_to_not_convert=map(str, ["fc1"])))
    names = set(model.config.quantization_config.modules)
    assert any(name.endswith("fc2") for name in names)
    assert not any(name.endswith("fc1") for name in names)


def test_copies_share_what_belongs_to_the_process_and_pickles_drop_it() -> None:
    def collate() -> None: ...

    class Callback:
        on_step = staticmethod(lambda name, done, total: None)

    own = {"dataset": (n for n in range(3)), "processor": collate, "callbacks": [Callback()]}
    config = QVLMConfig(**own, provenance={"a": [1]})
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
        model = AutoModelForImageTextToText.from_pretrained(
            path, quantization_config=QVLMConfig(scheme="W8A8", dataset=[1])
        )
    assert model.config.quantization_config.scheme == "W4A16"
    assert model.hf_quantizer.quantization_config.dataset is None
    with pytest.raises(ValueError, match="quantized with QVLMConfig but you are passing a GPTQCon"):
        AutoModelForImageTextToText.from_pretrained(path, quantization_config=GPTQConfig(bits=4))


def test_learned_rounding_is_in_saved_files_alone():
    with pytest.raises(ValueError, match=r"weight_rounding='learned' was removed, .*: take 'gptq'"):
        QVLMConfig(weight_rounding="learned")
    modules = {"lm_head": SCHEME.to_dict()}
    config = QVLMConfig.from_dict({"weight_rounding": "learned", "modules": modules})
    assert config.to_dict()["weight_rounding"] == "learned"


def test_without_data_only_rounding_is_recorded():
    config = QVLMConfig(scheme="W4A16")
    config.settle_without_data()
    names = ("weight_rounding", "equalization", "token_importance", "guard")
    assert [getattr(config, name) for name in names] == ["nearest", False, False, False]


NEEDING = {"optimize_vision": True, "precision_budget": 3.0, "resume_dir": "a", "scratch_dir": "a"}


@pytest.mark.parametrize(("name", "value"), NEEDING.items())
def test_without_data_nothing_else_can_be_asked_for(name, value):
    with pytest.raises(ValueError, match=f"^{name}.* needs calibration data"):
        QVLMConfig(scheme="W4A16", **{name: value}).settle_without_data()
