import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.format.scheme import GRANULARITIES, QuantScheme, parse_scheme

GOOD = {"weight_bits": 4, "activation_bits": 4}
ENTRY = QuantScheme(**GOOD).to_dict()


@st.composite
def schemes(draw):
    activation_bits = draw(st.sampled_from([3, 4, 5, 6, 7, 8, 16]))
    inputs = GRANULARITIES[-1:] if activation_bits == 16 else GRANULARITIES[:-1]
    return QuantScheme(
        weight_bits=draw(st.integers(2, 8)),
        activation_bits=activation_bits,
        group_size=draw(st.one_of(st.just(-1), st.integers(8, 2**20))),
        symmetric=draw(st.booleans()),
        granularity=draw(st.sampled_from(inputs)),
        hadamard=draw(st.one_of(st.none(), st.integers(1, 12).map(lambda power: 2**power))),
    )


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [3, 4, 5, 6, 7, 8, 16])
def test_parse_reads_every_scheme(weight_bits, activation_bits):
    for name in (f"W{weight_bits}A{activation_bits}", f"w{weight_bits}a{activation_bits}"):
        assert parse_scheme(name) == (weight_bits, activation_bits)


@pytest.mark.parametrize(
    "name",
    [
        *["", "W4", "A4", "W4A", "W1A4", "W9A4", "W4A2", "W4A9", "W4A15", "W4A17", "W16A16"],
        *[" W4A4", "W4A4 ", "W4A4g128", "W-4A4", "W٤A4", "W4A٨", 44, None],
    ],
)
def test_parse_names_value_rule_and_remedy(name):
    rule = f"scheme={name!r} is not W{{2-8}}A{{3-8 or 16}}: "
    remedy = "write for example 'W4A4', 'W4A8' or 'W4A16'."
    with pytest.raises(ValueError, match=f"^{re.escape(rule + remedy)}$"):
        parse_scheme(name)


RULES = {  # field -> rule, values that break it
    "weight_bits": ("an integer from 2 to 8", [1, 9, 4.0, "4"]),
    "activation_bits": ("an integer from 3 to 8, or 16 for floating point", [2, 12, True]),
    "group_size": (
        "-1 (whole row) or an integer from 8 to 1048576; 128 is usual",
        [0, -2, 7, 2**20 + 1, 128.0],
    ),
    "symmetric": ("True or False", [1, None]),
    "granularity": (f"one of {', '.join(GRANULARITIES)}", ["tensor"]),
    "hadamard": ("None or a power of two from 2 to 4096", [0, 1, 12, 8192, True, 8.0, -2]),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, (_, bad) in RULES.items() for value in bad]
)
def test_validation_names_value_and_rule(name, value):
    message = f"{name}={value!r} must be {RULES[name][0]}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuantScheme(**(GOOD | {name: value}))


@pytest.mark.parametrize(("granularity", "bits"), [("none", 4), ("channel", 16)])
def test_floating_point_inputs_have_16_bits_and_no_others_have(granularity, bits):
    message = f"granularity='{granularity}' does not go with activation_bits={bits}: 'none' belongs"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} to 16 bits and to 16 bits alone"):
        QuantScheme(weight_bits=4, activation_bits=bits, granularity=granularity)


def test_is_frozen_and_keyword_only():
    scheme = QuantScheme(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.weight_bits = 8
    with pytest.raises(TypeError):
        QuantScheme(4, 4)
    assert hash(scheme) == hash(QuantScheme(**GOOD))


def test_dict_is_the_entry_of_config_json():
    assert ENTRY == GOOD | {  # the defaults are the contract
        "group_size": 128,
        "symmetric": False,
        "granularity": "channel",
        "input_transform": None,
    }
    other = {
        "weight_bits": 3,
        "activation_bits": 8,
        "group_size": 64,
        "symmetric": True,
        "granularity": "dynamic_token",
    }
    entry = QuantScheme(**other, hadamard=256).to_dict()
    assert entry == other | {"input_transform": {"hadamard": 256}}


@given(schemes())
def test_dict_round_trip_through_json(scheme):
    entry = json.loads(json.dumps(scheme.to_dict()))
    before = dict(entry)
    assert QuantScheme.from_dict(entry) == scheme
    assert entry == before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([1, 2], "found list"),
        (ENTRY | {"extra": 1}, "must have exactly the keys"),
        (ENTRY | {"input_transform": "hadamard"}, "input_transform='hadamard' must be null or"),
        (
            ENTRY | {"input_transform": {"hadamard": 8, "x": 1}},
            "input_transform={'hadamard': 8, 'x': 1} must be null or {'hadamard': b}.",
        ),
        (ENTRY | {"input_transform": {}}, "input_transform={} must be null or {'hadamard': b}."),
        (ENTRY | {"input_transform": {"hadamard": 3}}, "hadamard=3 must be None or a power of two"),
        (ENTRY | {"weight_bits": 44}, "weight_bits=44 must be an integer"),
        *(
            ({name: value for name, value in ENTRY.items() if name != gone}, "damaged or newer.")
            for gone in ENTRY
        ),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantScheme.from_dict(entry)


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups", "length"),
    [
        *[(128, 4096, 32, 128), (128, 344, 3, 128), (128, 100, 1, 100)],
        *[(-1, 11008, 1, 11008), (64, 64, 1, 64), (64, 65, 2, 64)],
    ],
)
def test_groups(group_size, in_features, groups, length):
    scheme = QuantScheme(**GOOD, group_size=group_size)
    assert (scheme.groups(in_features), scheme.group_length(in_features)) == (groups, length)


@given(schemes(), st.integers(1, 20000))
def test_words_hold_a_row_and_not_a_word_more(scheme, in_features):
    bits = in_features * scheme.weight_bits
    assert 32 * scheme.words(in_features) >= bits > 32 * (scheme.words(in_features) - 1)
