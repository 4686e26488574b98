import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvlm_hf.format.packing import pack, unpack


@st.composite
def rows_of_values(draw):
    """(bits, length, rows): lists of Python ints."""
    bits = draw(st.integers(1, 8))
    length = draw(st.integers(0, 100))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=length, max_size=length)
    return bits, length, draw(st.lists(row, max_size=4))


def words_of(row, bits):
    """docs/format.md with one Python integer for the bit stream of a row: its int32 words."""
    stream = sum(value << (k * bits) for k, value in enumerate(row))
    unsigned = [(stream >> (32 * i)) % 2**32 for i in range((len(row) * bits + 31) // 32)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


@given(rows_of_values())
def test_both_ways_are_the_bit_stream_of_the_contract(case):
    bits, length, rows = case
    shape = (len(rows), (length * bits + 31) // 32)
    words = torch.tensor([words_of(row, bits) for row in rows], dtype=torch.int32).reshape(shape)
    values = torch.tensor(rows, dtype=torch.uint8).reshape(len(rows), length)
    for made, expected in ((pack(values, bits), words), (unpack(words, bits, length), values)):
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
        assert made.is_contiguous()
        assert torch.equal(made, expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_round_trip_of_any_integer_dtype_and_of_views(bits, dtype):
    for values in (torch.randint(0, 2**bits, (7, 333)), torch.full((333, 3), 2**bits - 1).T):
        values = values.to(dtype)
        before = values.clone()
        assert torch.equal(unpack(pack(values, bits), bits, 333).to(dtype), values)
        assert torch.equal(values, before)


def signed(word):
    return word - 2**32 if word >= 2**31 else word


def test_golden_words():
    four = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 15, 10]]), 4)
    assert four.tolist() == [[signed(0x87654321), 0x000000AF]]
    eight = pack(torch.tensor([[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF, 0xFF]]), 8)
    assert eight.tolist() == [[0x67452301, signed(0xEFCDAB89), 0x000000FF]]
    # v5 = 0b101101 lies across two words: its low 2 bits end word 0, its high 4 bits begin word 1
    six = pack(torch.tensor([[0, 0, 0, 0, 0, 0b101101, 0b111111]]), 6)
    assert six.tolist() == [[0b01 << 30, 0b1011 | 0b111111 << 4]]


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        ([[16]], 4, "values from 16 to 16 do not fit into 4 bits."),
        ([[-1]], 4, "values from -1 to -1 do not fit into 4 bits."),
        ([[0, 256]], 8, "values from 0 to 256 do not fit into 8 bits."),
        ([[2]], 1, "values from 2 to 2 do not fit into 1 bits."),
        ([[0, 3, 8]], 3, "values from 0 to 8 do not fit into 3 bits."),
        ([1], 4, "values of shape (1,) must be [rows, in_features]."),
        ([[[1]]], 4, "values of shape (1, 1, 1) must be [rows, in_features]."),
        (1, 4, "values of shape () must be [rows, in_features]."),
    ],
)
def test_pack_refuses_what_does_not_fit(values, bits, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pack(torch.tensor(values), bits)


@pytest.mark.parametrize(
    ("shape", "bits", "length", "words"),
    [((2, 3), 4, 16, 2), ((2, 1), 4, 9, 2), ((2, 2), 3, 22, 3), ((4,), 8, 16, 4)],
)
def test_unpack_refuses_another_number_of_words(shape, bits, length, words):
    message = f"weight of shape {shape} does not hold {length} values of {bits} bits ({words} words"
    with pytest.raises(ValueError, match=re.escape(message)):
        unpack(torch.zeros(shape, dtype=torch.int32), bits, length)
