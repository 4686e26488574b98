"""The reader of shard indexes and safetensors headers: what it tells, and its line on each damage."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from qvlm_hf.format.files import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorHeader,
    read_header,
    tensor_headers,
    weight_files,
)

AGAIN = "download or quantize the model again."


def write(folder, *names):
    for name in names:
        save_file(
            {f"{name}.a": torch.zeros(2, 3), f"{name}.b": torch.zeros(4, dtype=torch.uint8)},
            folder / name,
            metadata={"format": "pt"},
        )


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_headers_tell_dtype_shape_and_bytes(tmp_path):
    write(tmp_path, SINGLE_NAME)
    headers = {header.key: header for header in tensor_headers(tmp_path / SINGLE_NAME)}
    assert headers == {
        f"{SINGLE_NAME}.{key}": TensorHeader(
            file=SINGLE_NAME, key=f"{SINGLE_NAME}.{key}", dtype=dtype, shape=shape, nbytes=nbytes
        )
        for key, dtype, shape, nbytes in (("a", "F32", (2, 3), 24), ("b", "U8", (4,), 4))
    }
    assert headers[f"{SINGLE_NAME}.b"].where == f"{SINGLE_NAME}: {SINGLE_NAME}.b"
    assert json.loads(read_header(str(tmp_path / SINGLE_NAME)))["__metadata__"] == {"format": "pt"}


def test_the_single_file_comes_before_an_index(tmp_path):
    write(tmp_path, "2.safetensors", "1.safetensors")
    write_index(tmp_path, {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    assert weight_files(str(tmp_path)) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    write(tmp_path, SINGLE_NAME)
    (tmp_path / INDEX_NAME).write_text("{")
    assert weight_files(tmp_path) == [tmp_path / SINGLE_NAME]


def test_no_weights(tmp_path):
    write(tmp_path, "other.safetensors")
    with pytest.raises(ValueError, match=f"^{tmp_path}: holds no {SINGLE_NAME}: {AGAIN}$"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("\xff", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "has no weight_map"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "has no weight_map"),
        ('{"weight_map": {"a": "1.safetensors"}}', "has no metadata"),
        ('{"metadata": {}, "weight_map": {"a": "gone"}}', "names 'gone', which is no file there"),
    ],
)
def test_a_damaged_index(tmp_path, content, message):
    (tmp_path / INDEX_NAME).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as caught:
        weight_files(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / INDEX_NAME}: ")
    assert str(caught.value).endswith(f": {AGAIN}")


@pytest.mark.parametrize("outside", ["../1.safetensors", "sub/1.safetensors", "absolute"])
def test_an_index_must_stay_in_its_directory(tmp_path, outside):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        write(place, "1.safetensors")
    name = str(tmp_path / "1.safetensors") if outside == "absolute" else outside
    write_index(folder, {"a": name})
    with pytest.raises(ValueError, match=rf"other directories \({re.escape(name)}\): do not trust"):
        weight_files(folder)


@pytest.mark.parametrize("read", [read_header, tensor_headers])
@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x40" + bytes(7) + b"{}"])
def test_no_safetensors_file(tmp_path, read, content):
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{SINGLE_NAME}: is no .* safetensors file.*: {AGAIN}"):
        read(tmp_path / SINGLE_NAME)


def test_a_file_whose_end_is_missing(tmp_path):
    write(tmp_path, SINGLE_NAME)
    (tmp_path / SINGLE_NAME).write_bytes((tmp_path / SINGLE_NAME).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is no readable safetensors file \(.*\): download"):
        tensor_headers(tmp_path / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"is no readable safetensors file \(.*gone.*\)"):
        tensor_headers(tmp_path / "gone.safetensors")
