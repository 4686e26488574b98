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


def tensor(rows, length, dtype=torch.uint8):
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), length)


def words_of(row, bits):
    """The layout of docs/format.md with one Python integer for the whole bit stream: int32 words of a row."""
    stream = 0
    for k, value in enumerate(row):
        for i in range(bits):
            stream |= ((value >> i) & 1) << (k * bits + i)
    count = (len(row) * bits + 31) // 32
    unsigned = [(stream >> (32 * i)) % 2**32 for i in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


@given(rows_of_values())
def test_pack_is_the_bit_stream_of_the_contract(case):
    bits, length, rows = case
    packed = pack(tensor(rows, length), bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(rows), (length * bits + 31) // 32)
    assert packed.is_contiguous()
    assert packed.tolist() == [words_of(row, bits) for row in rows]


@given(rows_of_values())
def test_unpack_reads_the_bit_stream_of_the_contract(case):
    bits, length, rows = case
    words = torch.tensor([words_of(row, bits) for row in rows], dtype=torch.int32).reshape(
        len(rows), (length * bits + 31) // 32
    )
    values = unpack(words, bits, length)
    assert values.dtype == torch.uint8
    assert values.shape == (len(rows), length)
    assert values.is_contiguous()
    assert values.tolist() == rows


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_round_trip_of_any_integer_dtype(bits, dtype):
    values = torch.randint(0, 2**bits, (7, 333)).to(dtype)
    before = values.clone()
    assert torch.equal(unpack(pack(values, bits), bits, 333).to(dtype), values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_and_a_transposed_view(bits):
    values = torch.full((65, 3), 2**bits - 1, dtype=torch.uint8).T
    assert not values.is_contiguous()
    assert torch.equal(unpack(pack(values, bits), bits, 65), values)


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
    ("values", "bits"), [([[16]], 4), ([[-1]], 4), ([[0, 256]], 8), ([[2]], 1), ([[0, 3, 8]], 3)]
)
def test_pack_refuses_values_that_do_not_fit(values, bits):
    low, high = min(values[0]), max(values[0])
    with pytest.raises(
        ValueError, match=f"^values from {low} to {high} do not fit into {bits} bits\\.$"
    ):
        pack(torch.tensor(values), bits)


@pytest.mark.parametrize("shape", [(8,), (2, 2, 2), ()])
def test_pack_wants_a_matrix(shape):
    with pytest.raises(
        ValueError, match=re.escape(f"values of shape {shape} must be [rows, in_features].")
    ):
        pack(torch.zeros(shape, dtype=torch.int32), 4)


@pytest.mark.parametrize(
    ("shape", "bits", "length", "words"),
    [((2, 3), 4, 16, 2), ((2, 1), 4, 9, 2), ((2, 2), 3, 22, 3), ((4,), 8, 16, 4)],
)
def test_unpack_refuses_another_number_of_words(shape, bits, length, words):
    message = f"a packed weight of shape {shape} does not hold {length} values of {bits} bits ({words} words a row)."
    with pytest.raises(ValueError, match=re.escape(message)):
        unpack(torch.zeros(shape, dtype=torch.int32), bits, length)
