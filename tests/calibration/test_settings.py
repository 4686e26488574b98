import dataclasses
import re

import pytest

from qvlm_hf.calibration.settings import COMPONENTS, CalibrationSettings, Precision, RangeCandidate
from qvlm_hf.format.scheme import QuantScheme


def dynamic():
    return RangeCandidate(granularity="dynamic_token")


def margin(granularity, value):
    return RangeCandidate(granularity=granularity, margin=value)


def percentile(granularity, value):
    return RangeCandidate(granularity=granularity, percentile=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 1}, "weight_bits=1 must be an integer from 2 to 8."),
        ({"weight_bits": "4"}, "weight_bits='4' must be an integer from 2 to 8."),
        (
            {"activation_bits": 2},
            "activation_bits=2 must be an integer from 3 to 8, or 16 for floating point.",
        ),
        (
            {"activation_bits": 9},
            "activation_bits=9 must be an integer from 3 to 8, or 16 for floating point.",
        ),
        *(
            (
                {"activation_bits": value},
                f"activation_bits={value!r} must be an integer from 3 to 8, or 16 for floating "
                f"point.",
            )
            for value in ("4", None)
        ),
        (
            {"group_size": 0},
            "group_size=0 must be -1 (whole row) or an integer from 8 to 1048576; 128 is usual.",
        ),
        ({"symmetric": "yes"}, "symmetric='yes' must be True or False."),
        *(
            ({name: value}, f"{name}={value!r} must be an integer of at least {low}.")
            for name, low in (
                ("num_samples", 1),
                ("batch_size", 1),
                ("seed", 0),
                ("max_block_depth", 1),
            )
            for value in (low - 1, 2.0, True, "3", None)
        ),
        *(
            (
                {"entropy_threshold": value},
                f"entropy_threshold={value!r} must be a number (in nats) or None for the segment's "
                f"mean.",
            )
            for value in ("1", float("nan"), float("inf"), True)
        ),
        *(
            (
                {"precision_budget": value},
                f"precision_budget={value!r} must be an average of 2 to 8 bits per weight, or a size "
                f"as in '3.9GB': or leave it out.",
            )
            for value in (1.99, 8.01, True, "4", "3.9", "0GB", "-1GB", "3.9 TB", float("nan"))
        ),
        *(
            (
                {"percentiles": value},
                f"percentiles={tuple(value)!r} must be numbers from 0.9 to 1.0, as in (1.0, "
                f"0.9999).",
            )
            for value in ((), (1.0, 0.89), (1.01,), ("1.0",), (True,), (float("nan"),), [0.5])
        ),
        *(
            (
                {"margins": value},
                f"margins={tuple(value)!r} must be factors above 1.0 and up to 2.0, as in (1.1, "
                f"1.25); () for none.",
            )
            for value in ((1.0,), (1.1, 2.1), (0.5,), ("1.1",), (float("inf"),), [True])
        ),
        *(
            ({name: value}, f"{name}={value!r} must be a list.")
            for name in ("percentiles", "margins", "modules_to_not_convert")
            for value in ("lm_head", 1.0)
        ),
        *(
            ({"lm_head_bits": value}, f"lm_head_bits={value!r} must be 8 or None (full precision).")
            for value in (4, 16, 8.0, "8", True)
        ),
        *(
            ({name: value}, f"{name}={value!r} must be True or False.")
            for name in ("quantize_vision", "quantize_projector", "strict")
            for value in (1, None, "no")
        ),
        *(
            (
                {"modules_to_not_convert": value},
                f"modules_to_not_convert={tuple(value)!r} must be a list of module names.",
            )
            for value in (
                ["lm_head", ""],
                [1],
                [None],
                ["*"],
                ["."],
                ["a..b"],
                ["q_proj\n"],
                ["a.*"],
            )
        ),
        (
            {"activation_granularity": {"vision": "channel", "text": "channel", "audio": "token"}},
            "activation_granularity={'vision': 'channel', 'text': 'channel', 'audio': 'token'} "
            "names the components "
            "['audio', 'text']: use vision, projector, language.",
        ),
        (
            {"activation_granularity": "tensor"},
            "activation_granularity='tensor' for vision must be 'channel', 'token', "
            "'dynamic_token' or 'dynamic_group'.",
        ),
        (
            {"activation_granularity": {"projector": "none"}},
            "activation_granularity='none' for projector must be 'channel', 'token', "
            "'dynamic_token' or 'dynamic_group'.",
        ),
        (
            {"activation_granularity": 4},
            "activation_granularity=4 for vision must be 'channel', 'token', 'dynamic_token' or "
            "'dynamic_group'.",
        ),
        *(
            (
                {"group_size": -1, "activation_granularity": value},
                "activation_granularity='dynamic_group' needs groups, and group_size=-1 is the "
                "whole row: give group_size=128, or take 'dynamic_token'.",
            )
            for value in ("dynamic_group", {"vision": "dynamic_group"})
        ),
        *(
            (
                {"activation_granularity": value},
                "activation_granularity='token' needs a fixed number of positions: give it per "
                "component, {'vision': 'token'}.",
            )
            for value in ("token", {"language": "token"})
        ),
        *(
            (
                {"activation_bits": 16, "activation_granularity": value},
                f"activation_granularity={value!r} has no meaning for 16-bit (floating point) "
                f"activations: leave it out.",
            )
            for value in ("channel", "dynamic_token", {"vision": "token"})
        ),
    ],
)
def test_validation_names_value_rule_and_remedy(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CalibrationSettings(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"percentiles": (0.9,)},
        {"percentiles": [1]},
        {"margins": ()},
        {"margins": [2.0]},
        {"entropy_threshold": 0},
        {"precision_budget": 2},
        {"precision_budget": 8},
        {"precision_budget": "3.9GB"},
        {"precision_budget": "350 MB"},
        {"entropy_threshold": -1.5},
        {"lm_head_bits": 8},
        {"seed": 0},
        {"num_samples": 1, "batch_size": 1, "max_block_depth": 1},
        {"group_size": -1, "symmetric": True},
        {"activation_granularity": {"vision": "token"}},
        {"activation_granularity": {}},
        {"modules_to_not_convert": ["lm_head"]},
    ],
)
def test_the_edges_of_the_rules_are_allowed(change):
    settings = CalibrationSettings(**change)
    for name, value in change.items():
        assert getattr(settings, name) == (tuple(value) if isinstance(value, list) else value)


def test_defaults_are_the_table_of_the_contract():
    table = {
        "weight_bits": 4,
        "activation_bits": 4,
        "group_size": 128,
        "symmetric": False,
        "activation_granularity": None,
        "quantize_vision": True,
        "quantize_projector": True,
        "lm_head_bits": None,
        "modules_to_not_convert": (),
        "num_samples": 64,
        "batch_size": 8,
        "seed": 0,
        "max_block_depth": 3,
        "entropy_threshold": None,
        "percentiles": (1.0, 0.9999, 0.9995, 0.999),
        "margins": (1.1, 1.25),
        "strict": False,
    }
    defaults = dataclasses.asdict(CalibrationSettings())
    assert {
        name: defaults[name] for name in table
    } == table  # other fields start at what was measured best


@pytest.mark.parametrize("value", ["best", None, 4])
def test_unknown_weight_rounding_raises(value):
    with pytest.raises(ValueError, match=rf"^weight_rounding={value!r} must be 'nearest'"):
        CalibrationSettings(weight_rounding=value)


def test_is_keyword_only_and_keeps_tuples():
    settings = CalibrationSettings(percentiles=[1.0], margins=[1.5], modules_to_not_convert=["a"])
    kept = (settings.percentiles, settings.margins, settings.modules_to_not_convert)
    assert kept == ((1.0,), (1.5,), ("a",))
    assert CalibrationSettings().modules_to_not_convert == ()
    with pytest.raises(TypeError):
        CalibrationSettings(4, 4)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("activation_bits", "expected"),
    [
        (3, ("channel", "dynamic_token")),
        (4, ("channel", "dynamic_token")),
        (5, ("channel", "dynamic_token")),
        (6, ("dynamic_token", "channel")),
        (7, ("dynamic_token", "channel")),
        (8, ("dynamic_token", "channel")),
        (16, ("none",)),
    ],
)
def test_default_granularities_follow_the_bits(component, activation_bits, expected):
    settings = CalibrationSettings(activation_bits=activation_bits)
    assert settings.granularities(component) == expected
    assert settings.start_granularity(component) == expected[0]


def test_an_asked_granularity_is_the_only_one():
    for granularity in ("channel", "dynamic_token", "dynamic_group"):
        settings = CalibrationSettings(activation_granularity=granularity)
        assert [settings.granularities(component) for component in COMPONENTS] == [
            (granularity,)
        ] * 3
    mapped = CalibrationSettings(
        activation_granularity={"vision": "token", "language": "dynamic_token"}
    )
    assert mapped.granularities("vision") == ("token",)
    assert mapped.granularities("projector") == ("channel", "dynamic_token")
    assert mapped.granularities("language") == ("dynamic_token",)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"activation_bits": 8}, True),
        ({"activation_bits": 16}, False),
        ({"activation_granularity": "channel"}, True),
        ({"activation_granularity": "dynamic_token"}, False),
        ({"activation_granularity": "dynamic_group"}, False),
        ({"activation_bits": 8, "activation_granularity": "dynamic_token"}, False),
        (
            {"activation_granularity": {"vision": "dynamic_token", "language": "dynamic_token"}},
            True,
        ),
        ({"activation_granularity": dict.fromkeys(COMPONENTS, "dynamic_token")}, False),
        (
            {
                "activation_granularity": {
                    "vision": "token",
                    "projector": "dynamic_token",
                    "language": "dynamic_token",
                }
            },
            True,
        ),
    ],
)
def test_needs_data(change, expected):
    assert CalibrationSettings(**change).needs_data is expected


def test_candidates_start_first_and_wide_first():
    settings = CalibrationSettings(percentiles=(0.999, 1.0), margins=(1.1, 1.25))
    static = (
        margin("channel", 1.25),
        margin("channel", 1.1),
        percentile("channel", 1.0),
        percentile("channel", 0.999),
    )
    assert settings.candidates("language") == (*static, dynamic())
    assert dataclasses.replace(settings, activation_bits=8).candidates("language") == (
        dynamic(),
        *static,
    )
    assert dataclasses.replace(settings, activation_bits=16).candidates("language") == (
        RangeCandidate(granularity="none"),
    )


def test_candidates_of_an_asked_granularity():
    settings = CalibrationSettings(
        percentiles=(1.0,),
        margins=(),
        activation_granularity={"vision": "token", "language": "dynamic_token"},
    )
    assert settings.candidates("vision") == (percentile("token", 1.0),)
    assert settings.candidates("projector") == (percentile("channel", 1.0), dynamic())
    assert settings.candidates("language") == (dynamic(),)


def test_candidates_are_distinct_and_belong_to_the_settings():
    for bits in (4, 8):
        settings = CalibrationSettings(activation_bits=bits)
        candidates = settings.candidates("vision")
        assert len(set(candidates)) == len(candidates) == 7
        assert candidates[0].granularity == settings.start_granularity("vision")


@pytest.mark.parametrize(
    ("granularity", "static"),
    [
        *(("channel", True), ("token", True)),
        *((granularity, False) for granularity in ("dynamic_token", "dynamic_group", "none")),
    ],
)
def test_static_candidates(granularity, static):
    assert RangeCandidate(granularity=granularity).static is static


def test_scheme_carries_bits_groups_and_transform():
    settings = CalibrationSettings(weight_bits=3, activation_bits=6, group_size=64, symmetric=True)
    expected = QuantScheme(
        weight_bits=3, activation_bits=6, group_size=64, symmetric=True, granularity="channel"
    )
    assert settings.module_scheme("channel") == expected
    assert settings.module_scheme("channel", 8) == dataclasses.replace(expected, hadamard=8)
    lifted = Precision(weight_bits=8, activation_bits=7)
    assert settings.module_scheme("channel", None, lifted) == dataclasses.replace(
        expected, weight_bits=8, activation_bits=7
    )
    assert settings.precision == Precision(weight_bits=3, activation_bits=6)


@pytest.mark.parametrize(
    ("fields", "rotation"),
    [
        ({"activation_bits": 4}, None),
        ({"activation_bits": 5}, None),
        ({"activation_bits": 6}, None),
        ({"activation_bits": 7}, "auto"),  # as the model allows
        ({"activation_bits": 8}, "auto"),
        ({"activation_bits": 16}, None),
        (
            {"activation_bits": 8, "activation_granularity": "dynamic_token"},
            None,
        ),  # rounded while loading: never whole in memory
        ({"activation_bits": 8, "rotation": None}, None),
        ({"activation_bits": 4, "rotation": "hadamard"}, "hadamard"),
    ],
)
def test_what_auto_rotation_means(fields, rotation):
    settings = CalibrationSettings(recipe="fixed", **fields)
    assert settings.rotation == rotation
    assert dataclasses.replace(settings, weight_bits=3).rotation == rotation
    for rotatable, decided in ((True, "hadamard"), (False, None)):
        expected = decided if rotation == "auto" else rotation
        assert settings.for_model(rotatable=rotatable).rotation == expected


def test_head_scheme():
    assert CalibrationSettings().head_scheme() is None
    settings = CalibrationSettings(lm_head_bits=8, group_size=64, symmetric=True)
    expected = QuantScheme(
        weight_bits=8, activation_bits=8, group_size=64, symmetric=True, granularity="dynamic_token"
    )
    assert settings.head_scheme() == expected
    floating = dataclasses.replace(expected, activation_bits=16, granularity="none")
    assert dataclasses.replace(settings, activation_bits=16).head_scheme() == floating


def test_files_from_before_recipes_have_none():
    assert CalibrationSettings(recipe=None).recipe == "fixed"


def test_a_seed_that_no_generator_takes_is_refused_at_once():
    with pytest.raises(ValueError, match="must be below 2"):
        CalibrationSettings(seed=2**63)
    assert CalibrationSettings(seed=2**63 - 1).seed == 2**63 - 1
