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


NAMES = (["lm_head", ""], [1], [None], ["*"], ["."], ["a..b"], ["q_proj\n"], ["a.*"])
FRACTIONS = ((), (1.0, 0.89), (1.01,), ("1.0",), (True,), (float("nan"),), [0.5])
FACTORS = ((1.0,), (1.1, 2.1), (0.5,), ("1.1",), (float("inf"),), [True])
BUDGETS = (1.99, 8.01, True, "4", "3.9", "0GB", "-1GB", "3.9 TB", float("nan"))
OTHER_SIZES = ("1.1mb", "1100KB", "1.1MiB", "\u0661MB", "1e3MB", "9" * 13 + "GB")
NO_NUMBERS = ("1", float("nan"), float("inf"), True)
WIDTH, GROUP = "an integer from 3 to 8, or 16 for floating point", "-1 (whole row) or an integer"
AVERAGE = (
    "a number of 2 to 8 bits per weight, or a size in MB or GB (decimal units, in capitals) as in "
    "'350MB': or leave it out"
)
# fields, values that they refuse, what they must be
RULES = [
    ("weight_bits", (1, "4"), "an integer from 2 to 8"),
    ("activation_bits", (2, 9, "4", None), WIDTH),
    ("group_size", (0, -7, 2**20 + 1, "128"), f"{GROUP} from 8 to 1048576; 128 is usual"),
    (
        "num_samples batch_size max_block_depth",
        (0, 2.0, True, "3", None),
        "an integer of at least 1",
    ),
    ("seed", (-1, 2.0, True, "3", None), "an integer of at least 0"),
    ("entropy_threshold", NO_NUMBERS, "a number (in nats) or None for the segment's mean"),
    ("precision_budget", BUDGETS + OTHER_SIZES, AVERAGE),
    ("percentiles", FRACTIONS, "numbers from 0.9 to 1.0, as in (1.0, 0.9999)"),
    ("margins", FACTORS, "factors above 1.0 and up to 2.0, as in (1.1, 1.25); () for none"),
    ("percentiles margins modules_to_not_convert", ("lm_head", 1.0), "a list"),
    ("modules_to_not_convert", NAMES, "a list of module names"),
    ("lm_head_bits", (4, 16, 8.0, "8", True), "8 or None (full precision)"),
    ("symmetric quantize_vision quantize_projector strict guard", (1, None, "no"), "True or False"),
]
REFUSED = [(n, value, rule) for names, all_, rule in RULES for n in names.split() for value in all_]


@pytest.mark.parametrize(("name", "value", "rule"), REFUSED)
def test_validation_names_value_rule_and_remedy(name, value, rule):
    shown = tuple(value) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}={shown!r} must be {rule}.')}$"):
        CalibrationSettings(**{name: value})


@pytest.mark.parametrize("digits", [400, 5000])
def test_no_message_holds_hundreds_of_digits(digits):
    for value in (10**digits, "9" * digits + "MB"):
        with pytest.raises(ValueError, match=r"^precision_budget=.* must be a number") as error:
            CalibrationSettings(precision_budget=value)
        assert len(str(error.value)) < 300


KINDS = "must be 'channel', 'token', 'dynamic_token' or 'dynamic_group'."
OTHERS = {"vision": "channel", "text": "channel", "audio": "token"}
UNKNOWN = f"={OTHERS} names the components ['audio', 'text']: use vision, projector, language."
NO_GROUPS = "needs groups, and group_size=-1 is the whole row: give group_size=128, or take"
NO_POSITIONS = "needs a fixed number of positions: give it per component, {'vision': 'token'}."
FLOATS = "has no meaning for 16-bit (floating point) activations: leave it out."
GROUPS, FLOATING = {"group_size": -1}, {"activation_bits": 16}


@pytest.mark.parametrize(
    ("granularity", "message", "others"),
    [
        (OTHERS, UNKNOWN, {}),
        ("tensor", f"='tensor' for vision {KINDS}", {}),
        ({"projector": "none"}, f"='none' for projector {KINDS}", {}),
        (4, f"=4 for vision {KINDS}", {}),
        ("dynamic_group", f"='dynamic_group' {NO_GROUPS} 'dynamic_token'.", GROUPS),
        ({"vision": "dynamic_group"}, f"='dynamic_group' {NO_GROUPS} 'dynamic_token'.", GROUPS),
        ("token", f"='token' {NO_POSITIONS}", {}),
        ({"language": "token"}, f"='token' {NO_POSITIONS}", {}),
        ("channel", f"='channel' {FLOATS}", FLOATING),
        ("dynamic_token", f"='dynamic_token' {FLOATS}", FLOATING),
        ({"vision": "token"}, f"={{'vision': 'token'}} {FLOATS}", FLOATING),
    ],
)
def test_granularities_that_do_not_fit_say_why(granularity, message, others):
    with pytest.raises(ValueError, match=f"^activation_granularity{re.escape(message)}$"):
        CalibrationSettings(activation_granularity=granularity, **others)


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
        *((bits, ("channel", "dynamic_token")) for bits in (3, 4, 5)),
        *((bits, ("dynamic_token", "channel")) for bits in (6, 7, 8)),
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
        assert {settings.granularities(component) for component in COMPONENTS} == {(granularity,)}
    asked = {"vision": "token", "language": "dynamic_token"}
    mapped = CalibrationSettings(activation_granularity=asked)
    assert mapped.granularities("vision") == ("token",)
    assert mapped.granularities("projector") == ("channel", "dynamic_token")
    assert mapped.granularities("language") == ("dynamic_token",)


ALL_DYNAMIC = dict.fromkeys(COMPONENTS, "dynamic_token")


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
        ({"activation_granularity": dict.fromkeys(("vision", "language"), "dynamic_token")}, True),
        ({"activation_granularity": ALL_DYNAMIC}, False),
        ({"activation_granularity": ALL_DYNAMIC | {"vision": "token"}}, True),
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
        # rounded while loading: never whole in memory
        ({"activation_bits": 8, "activation_granularity": "dynamic_token"}, None),
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
