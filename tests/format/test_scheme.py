import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.format.scheme import QuantScheme, parse_scheme


@st.composite
def schemes(draw):
    activation_bits = draw(st.sampled_from([3, 4, 5, 6, 7, 8, 16]))
    return QuantScheme(
        weight_bits=draw(st.integers(2, 8)),
        activation_bits=activation_bits,
        group_size=draw(st.one_of(st.just(-1), st.integers(8, 2**20))),
        symmetric=draw(st.booleans()),
        granularity="none"
        if activation_bits == 16
        else draw(st.sampled_from(["channel", "token", "dynamic_token"])),
        hadamard=draw(st.one_of(st.none(), st.integers(1, 12).map(lambda power: 2**power))),
    )


@pytest.mark.parametrize("weight_bits", range(2, 9))
@pytest.mark.parametrize("activation_bits", [3, 4, 5, 6, 7, 8, 16])
def test_parse_reads_every_scheme(weight_bits, activation_bits):
    assert parse_scheme(f"W{weight_bits}A{activation_bits}") == (weight_bits, activation_bits)
    assert parse_scheme(f"w{weight_bits}a{activation_bits}") == (weight_bits, activation_bits)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "W4",
        "A4",
        "W4A",
        "W1A4",
        "W9A4",
        "W4A2",
        "W4A9",
        "W4A15",
        "W4A17",
        "W16A16",
        " W4A4",
        "W4A4 ",
        "W4A4g128",
        "W-4A4",
        44,
        None,
    ],
)
def test_parse_names_value_rule_and_remedy(name):
    message = f"scheme={name!r} is not W{{2-8}}A{{3-8 or 16}}: write for example 'W4A4', 'W4A8' or 'W4A16'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_scheme(name)


GOOD = {"weight_bits": 4, "activation_bits": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 1}, "weight_bits=1 must be an integer from 2 to 8."),
        ({"weight_bits": 9}, "weight_bits=9 must be an integer from 2 to 8."),
        ({"weight_bits": 4.0}, "weight_bits=4.0 must be an integer from 2 to 8."),
        ({"weight_bits": "4"}, "weight_bits='4' must be an integer from 2 to 8."),
        (
            {"activation_bits": 2},
            "activation_bits=2 must be an integer from 3 to 8, or 16 for floating point.",
        ),
        (
            {"activation_bits": 12},
            "activation_bits=12 must be an integer from 3 to 8, or 16 for floating point.",
        ),
        (
            {"activation_bits": True},
            "activation_bits=True must be an integer from 3 to 8, or 16 for floating point.",
        ),
        (
            {"group_size": 0},
            "group_size=0 must be -1 (whole row) or an integer of at least 8; 128 is usual.",
        ),
        (
            {"group_size": -2},
            "group_size=-2 must be -1 (whole row) or an integer of at least 8; 128 is usual.",
        ),
        (
            {"group_size": 7},
            "group_size=7 must be -1 (whole row) or an integer of at least 8; 128 is usual.",
        ),
        (
            {"group_size": 2**20 + 1},
            "group_size=1048577 must be -1 (whole row) or an integer of at least 8; 128 is usual.",
        ),
        (
            {"group_size": 128.0},
            "group_size=128.0 must be -1 (whole row) or an integer of at least 8; 128 is usual.",
        ),
        ({"symmetric": 1}, "symmetric=1 must be True or False."),
        ({"symmetric": None}, "symmetric=None must be True or False."),
        (
            {"granularity": "tensor"},
            "granularity='tensor' must be one of channel, token, dynamic_token, none.",
        ),
        (
            {"granularity": "none"},
            "granularity='none' does not go with activation_bits=4: 'none' belongs to 16 bits and "
            "to 16 bits alone.",
        ),
        (
            {"activation_bits": 16, "granularity": "channel"},
            "granularity='channel' does not go with activation_bits=16: 'none' belongs to 16 bits "
            "and to 16 bits alone.",
        ),
        ({"hadamard": 0}, "hadamard=0 must be None or a power of two from 2 to 4096."),
        ({"hadamard": 1}, "hadamard=1 must be None or a power of two from 2 to 4096."),
        ({"hadamard": 12}, "hadamard=12 must be None or a power of two from 2 to 4096."),
        ({"hadamard": 8192}, "hadamard=8192 must be None or a power of two from 2 to 4096."),
        ({"hadamard": True}, "hadamard=True must be None or a power of two from 2 to 4096."),
        ({"hadamard": 8.0}, "hadamard=8.0 must be None or a power of two from 2 to 4096."),
    ],
)
def test_validation_names_value_and_rule(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuantScheme(**(GOOD | change))


def test_is_frozen_and_keyword_only():
    scheme = QuantScheme(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.weight_bits = 8
    with pytest.raises(TypeError):
        QuantScheme(4, 4)
    assert hash(scheme) == hash(QuantScheme(**GOOD))


def test_defaults_are_the_contract():
    assert QuantScheme(**GOOD) == QuantScheme(
        weight_bits=4,
        activation_bits=4,
        group_size=128,
        symmetric=False,
        granularity="channel",
        hadamard=None,
    )


def test_dict_is_the_entry_of_config_json():
    scheme = QuantScheme(
        weight_bits=3,
        activation_bits=8,
        group_size=64,
        symmetric=True,
        granularity="dynamic_token",
        hadamard=256,
    )
    assert scheme.to_dict() == {
        "weight_bits": 3,
        "activation_bits": 8,
        "group_size": 64,
        "symmetric": True,
        "granularity": "dynamic_token",
        "input_transform": {"hadamard": 256},
    }
    assert QuantScheme(**GOOD).to_dict()["input_transform"] is None


@given(schemes())
def test_dict_round_trip_through_json(scheme):
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "must have exactly the keys"),
        (
            {"input_transform": "hadamard"},
            "input_transform='hadamard' must be null or {'hadamard': b}.",
        ),
        (
            {"input_transform": {"hadamard": 8, "x": 1}},
            "input_transform={'hadamard': 8, 'x': 1} must be null or {'hadamard': b}.",
        ),
        ({"input_transform": {}}, "input_transform={} must be null or {'hadamard': b}."),
        ({"input_transform": {"hadamard": 3}}, "hadamard=3 must be None or a power of two"),
        ({"weight_bits": 44}, "weight_bits=44 must be an integer"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QuantScheme.from_dict(QuantScheme(**GOOD).to_dict() | change)


@pytest.mark.parametrize(
    "missing",
    ["weight_bits", "activation_bits", "group_size", "symmetric", "granularity", "input_transform"],
)
def test_from_dict_wants_every_key(missing):
    entry = QuantScheme(**GOOD).to_dict()
    del entry[missing]
    with pytest.raises(
        ValueError, match=r"exactly the keys .*: the checkpoint is damaged or newer\."
    ):
        QuantScheme.from_dict(entry)


def test_from_dict_wants_a_mapping():
    with pytest.raises(ValueError, match="found list"):
        QuantScheme.from_dict([1, 2])


def test_from_dict_leaves_its_argument_alone():
    entry = QuantScheme(**GOOD).to_dict()
    before = dict(entry)
    QuantScheme.from_dict(entry)
    assert entry == before


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups", "length"),
    [
        (128, 4096, 32, 128),
        (128, 344, 3, 128),
        (128, 100, 1, 100),
        (-1, 11008, 1, 11008),
        (64, 64, 1, 64),
        (64, 65, 2, 64),
    ],
)
def test_groups(group_size, in_features, groups, length):
    scheme = QuantScheme(**GOOD, group_size=group_size)
    assert (scheme.groups(in_features), scheme.group_length(in_features)) == (groups, length)


@given(schemes(), st.integers(1, 20000))
def test_words_hold_a_row_and_not_a_word_more(scheme, in_features):
    bits = in_features * scheme.weight_bits
    assert 32 * scheme.words(in_features) >= bits > 32 * (scheme.words(in_features) - 1)
