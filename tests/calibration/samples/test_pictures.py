"""Pictures: what every mode becomes, what is refused, and the hash of samples."""

import dataclasses
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sample_rows import GOOD, RED, refusal, sample_folder, write_lines

from qvlm_hf.calibration.samples import Sample, fingerprint, load_samples

folder = sample_folder


def asked(picture):
    return {"image": picture, "question": "q"}


def handmade(picture):
    """A sample that `load_samples` did not check."""
    part = {"type": "image", "image": picture}
    return Sample(messages=({"role": "user", "content": [part]},), origin="mine")


def gradient(mode):
    """12 x 4 pixels of any mode of 8 bits, from a colour gradient with transparency."""
    values = np.arange(12 * 4 * 4, dtype=np.uint8).reshape(4, 12, 4)
    if mode in ("CMYK", "RGBA", "RGBX"):
        return (
            Image.fromarray(values, mode="RGBA")
            if mode == "RGBA"
            else Image.frombytes(mode, (12, 4), values.tobytes())
        )
    if mode == "P with transparency":
        picture = Image.fromarray(values[..., :3]).convert("P")
        picture.info["transparency"] = 3
        return picture
    return Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"],
)
def test_pictures_of_8_bits_are_what_transformers_makes_of_them(mode):
    from transformers.image_utils import load_image

    picture = gradient(mode)
    (sample,) = load_samples([{"image": picture, "question": "q"}])
    expected = load_image(picture)
    (found,) = sample.images()
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())


@pytest.mark.parametrize(
    "kind", ["P with transparency", "P of an RGBA", "RGBA", "transparent", "LA"]
)
@pytest.mark.parametrize("ending", ["png", "webp"])
def test_files_with_transparency_are_what_transformers_makes_of_them(folder, kind, ending):
    from transformers.image_utils import load_image

    picture = gradient(kind if kind in ("P with transparency", "LA") else "RGBA")
    if kind == "P of an RGBA":
        picture = picture.quantize(16)
    if kind == "transparent":
        picture.putalpha(0)
    path = folder / f"seen.{ending}"
    picture.save(path, **({"lossless": True, "exact": True} if ending == "webp" else {}))
    (sample,) = load_samples([asked(path)])
    (found,) = sample.images()
    expected = load_image(str(path))
    assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes())


@pytest.mark.parametrize("name", ["a.png", "a.tiff", None, "big-endian"])
def test_pictures_of_16_bits_keep_their_content(folder, name):
    values = np.array([[0, 257, 300, 32896], [65535, 25700, 25828, 128]], dtype=np.uint16)
    picture = Image.fromarray(values)
    if name == "big-endian":
        picture = Image.frombytes("I;16B", (4, 2), values.byteswap().tobytes())
    elif name:
        picture.save(folder / name)
    (sample,) = load_samples(
        [{"image": folder / name if name in ("a.png", "a.tiff") else picture, "question": "q"}]
    )
    (found,) = sample.images()
    expected = [[0, 1, 1, 128], [255, 100, 100, 0]]
    assert found.mode == "RGB"
    assert np.asarray(found).tolist() == [[[v] * 3 for v in row] for row in expected]


def png_of_16_bit_colours(values):
    """A PNG of 16-bit RGB, which PIL can read and not write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff_of_12_bits(values):
    """A TIFF that says 12 bits; an even number of values in a row."""
    height, width = values.shape
    bits = "".join(f"{value:012b}" for value in values.flat)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = {
        256: width,
        257: height,
        258: 12,
        259: 1,
        262: 1,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        278: height,
        279: len(data),
    }
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
        for tag, value in tags.items()
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + data


@pytest.mark.parametrize("top", [1, 255, 1023, 4095])
@pytest.mark.parametrize("kind", ["gray.png", "gray.tiff", "memory", "colour.png"])
def test_16_bit_pictures_of_fewer_bits_are_refused(folder, kind, top):
    values = np.linspace(0, top, 8).astype(np.uint16).reshape(2, 4)
    value = folder / kind
    if kind == "colour.png":
        value.write_bytes(png_of_16_bit_colours(np.stack([values] * 3, axis=2)))
    elif kind == "memory":
        value = Image.fromarray(values)
    else:
        Image.fromarray(values).save(value)
    expected = (
        'dataset[0]: key "image": the picture has 16 bits and no value of 4096 or more: almost '
        "black, if 65535 is white; "
        "if 1023 or 4095 is, scale it to 8 bits, 0 to 255"
    )
    assert refusal([{"image": value, "question": "q"}]) == expected
    with pytest.raises(ValueError, match=r"^mine: .* the picture has 16 bits"):
        handmade(value).images()


def test_dark_pictures_of_16_bits_stay_what_they_are(folder):
    dark, black = np.array([[0, 257, 4096, 2570]], np.uint16), np.zeros((1, 4), np.uint16)
    (folder / "colour.png").write_bytes(png_of_16_bit_colours(np.stack([dark] * 3, axis=2)))
    rows = [
        {"image": value, "question": "q"}
        for value in (Image.fromarray(dark), Image.fromarray(black), folder / "colour.png")
    ]
    found = [
        np.asarray(picture)[0, :, 0].tolist()
        for sample in load_samples(rows)
        for picture in sample.images()
    ]
    assert found == [[0, 1, 16, 10], [0, 0, 0, 0], [0, 1, 16, 10]]


def test_files_that_say_12_bits_are_scaled_from_12_bits(folder):
    (folder / "a.tiff").write_bytes(
        tiff_of_12_bits(np.array([[0, 4095, 2048, 16], [0, 161, 1, 4095]]))
    )
    (sample,) = load_samples([{"image": folder / "a.tiff", "question": "q"}])
    assert np.asarray(sample.images()[0])[..., 1].tolist() == [[0, 255, 128, 1], [0, 10, 0, 255]]


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels_are_named(mode, size):
    picture = Image.new(mode, size)
    message = f"the picture has no pixels ({size[0]} x {size[1]}); replace it or remove the sample"
    assert (
        refusal([{"image": RED, "question": "q"}, {"image": picture, "question": "q"}])
        == f'dataset[1]: key "image": {message}'
    )
    with pytest.raises(ValueError, match=r"^mine: .* has no pixels"):
        handmade(picture).images()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pictures_without_a_known_range_are_refused(folder, dtype, kind):
    picture = Image.fromarray(np.full((4, 4), 0.5).astype(dtype))
    problem = f'the picture holds {kind} (mode "{picture.mode}"), whose black and white are unknown'
    expected = f'key "image": {problem}; scale it to 8 bits'
    assert refusal([{"image": picture, "question": "q"}]).startswith(f"dataset[0]: {expected}")
    picture.save(folder / "a.tiff")
    path = write_lines(folder, GOOD, {**GOOD, "image": "a.tiff"})
    assert refusal(path).startswith(f"data.jsonl:2: {expected}")
    (sample,) = load_samples(write_lines(folder, GOOD))
    picture.save(folder / "a.png", format="TIFF")  # the file changes after it was checked
    with pytest.raises(ValueError, match="whose black and white are unknown"):
        sample.images()


def test_picture_cut_short_is_named_when_opened(folder):
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    data = (folder / "cut.png").read_bytes()
    (sample,) = load_samples(write_lines(folder, {**GOOD, "image": "a.png"}))
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r'data.jsonl:1: key "image": unreadable picture .*a\.png'):
        sample.images()
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r'data.jsonl:1: key "image": no such picture'):
        fingerprint([sample])


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_picture_cut_short_is_named_before_anything_is_loaded(folder, ending):
    Image.effect_noise((64, 64), 50).save(whole := folder / f"whole.{ending}")
    (folder / f"cut.{ending}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    message = refusal(write_lines(folder, GOOD, {**GOOD, "image": f"cut.{ending}"}))
    assert message.startswith(f'data.jsonl:2: key "image": unreadable picture {folder}/cut.')


def test_only_files_are_opened(folder):
    os.mkfifo(folder / "pipe")  # which would wait for a writer
    (folder / "a").mkdir()
    for name in ("pipe", "a", "/dev/zero"):
        message = refusal(write_lines(folder, {**GOOD, "image": name}))
        where = f'data.jsonl:1: key "image": unreadable picture {folder / name}'
        assert message == f"{where} (no regular file); give another"


def test_a_picture_as_text_is_told_in_a_short_line(folder):
    message = refusal(write_lines(folder, {**GOOD, "image": "iVBORw0KGgoAAAANSUhEUg/A" * 1000}))
    assert message.startswith('data.jsonl:1: key "image": 24')
    assert message.endswith("no path of a picture; write the picture to a file and give its path")
    assert len(message) < 200


def test_pictures_are_upright_rgb(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("L", (8, 6), 100).save(folder / "turned.jpg", exif=exif)
    (sample,) = load_samples(write_lines(folder, {**GOOD, "image": "turned.jpg"}))
    (picture,) = sample.images()
    assert (picture.size, picture.mode) == ((6, 8), "RGB")


# ---- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_depends_on_text_picture_and_order(folder):
    def of(*records):
        return fingerprint(
            load_samples([{**record, "image": folder / record["image"]} for record in records])
        )

    other = {**GOOD, "question": "which ?"}
    assert of(GOOD) == of(dict(GOOD))
    assert len(of(GOOD)) == 64
    different = [
        of(GOOD),
        of(other),
        of(GOOD, other),
        of(other, GOOD),
        of({**GOOD, "image": "b.png"}),
        of({**GOOD, "answer": "re"}),
    ]
    assert len(set(different)) == len(different)
    before = of(GOOD)
    Image.new("RGB", (8, 6), "green").save(folder / "a.png")
    assert of(GOOD) != before


def test_fingerprint_counts_pixels_in_memory_and_not_origins():
    def of(picture):
        return fingerprint(load_samples([{"image": picture, "question": "q"}]))

    changed = RED.copy()
    changed.putpixel((0, 0), (254, 0, 0))
    assert of(RED) == of(RED.copy()) != of(changed)
    (sample,) = load_samples([{"image": RED, "question": "q"}])
    assert fingerprint([dataclasses.replace(sample, origin="elsewhere")]) == fingerprint([sample])
