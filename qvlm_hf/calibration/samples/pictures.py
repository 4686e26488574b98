"""Pictures of a sample, from a file or in memory: checked, opened, hashed.

`where` opens every message: 'data.jsonl:3: key "image"' (see errors.place).
"""

import errno
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qvlm_hf.calibration.samples.errors import sample_error
from qvlm_hf.errors import first_line

__all__ = ["image_bytes", "open_image"]

_RANGELESS = {"I": "32-bit integers", "F": "floats"}  # modes of PIL
# What PIL raises for a file that is no picture or is cut short.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


def open_image(value: Path | Image.Image, where: str) -> Image.Image:
    """Opens a picture, upright and in RGB.

    Of 8 bits it is what Transformers' `load_image` makes of it (transparency is dropped, not
    blended). Of 16 bits 65535 is white, as in scikit-image and in files; values that stay below
    4096 are refused, because they are probably of 10 or 12 bits.

    Raises:
        ValueError: it is missing, unreadable or has no pixels; or its white is unknown: it holds
            32-bit integers or floats, or 16 bits of which the upper four are unused.
    """
    with _opened(value, where) as picture:
        problem = _unusable(picture)
        if problem is None:
            deep, stored = _is_deep(picture), _stored_mode(picture)
            upright = ImageOps.exif_transpose(picture)
            if not deep:
                return upright.convert("RGB")
            rgb, brightest = _to_8_bits(upright, 4095 if stored == "I;12" else 65535)
            if brightest >= 16:
                return rgb
            problem = (
                "the picture has 16 bits and no value of 4096 or more: almost black, if 65535 is "
                "white",
                "if 1023 or 4095 is, scale it to 8 bits, 0 to 255",
            )
    raise sample_error(f"{where}:", *problem)


def image_bytes(value: Path | Image.Image, where: str) -> bytes:
    """Input of a hash: a file's bytes, or mode, size and pixels of a picture in memory.

    Raises:
        ValueError: the file is missing or unreadable.
    """
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}\0".encode() + value.tobytes()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise _image_error(value, where, error) from error


@contextmanager
def _opened(value: Path | Image.Image, where: str) -> Iterator[Image.Image]:
    """The picture; whatever PIL raises inside becomes an error that names it."""
    try:
        if (
            not isinstance(value, Image.Image)
            and os.path.exists(value)
            and not os.path.isfile(value)
        ):
            raise OSError("no regular file")  # reading a pipe would wait for its writer
        with nullcontext(value) if isinstance(value, Image.Image) else Image.open(value) as picture:
            yield picture
    except _UNREADABLE as error:
        name = "in memory" if isinstance(value, Image.Image) else value
        raise _image_error(name, where, error) from error


def _image_error(path: object, where: str, error: BaseException) -> ValueError:
    if isinstance(error, FileNotFoundError):
        folder = Path(str(path)).absolute().parent
        return sample_error(
            f"{where}:", f"no such picture: {path}", f"it was looked for in {folder}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # mostly base64
        problem = f"{len(str(path))} characters are no path of a picture"
        return sample_error(f"{where}:", problem, "write the picture to a file and give its path")
    problem = f"unreadable picture {path} ({first_line(error)})"
    return sample_error(f"{where}:", problem, "give another")


def _is_deep(picture: Image.Image) -> bool:
    """Whether it has 16 bits, or had them in its file: PIL keeps the upper 8 bits of colours."""
    return picture.mode.startswith("I;16") or bool(re.search(r";16[BLN]$", _stored_mode(picture)))


def _stored_mode(picture: Image.Image) -> str:
    """PIL's name for the values in a file that is not decoded yet, "RGB;16B"; else ""."""
    for tile in getattr(picture, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        return next((text for text in arguments if isinstance(text, str)), "")
    return ""


def _unusable(picture: Image.Image) -> tuple[str, str] | None:
    """Problem and remedy of a picture without pixels, or of values without a known range."""
    if not all(picture.size):
        size = " x ".join(map(str, picture.size))
        return f"the picture has no pixels ({size})", "replace it or remove the sample"
    if picture.mode in _RANGELESS:
        kind = f'{_RANGELESS[picture.mode]} (mode "{picture.mode}")'
        problem = f"the picture holds {kind}, whose black and white are unknown"
        return problem, 'scale it to 8 bits, 0 to 255, and convert it to "RGB"'
    return None


def _to_8_bits(picture: Image.Image, white: int) -> tuple[Image.Image, float]:
    """A picture of 16 bits in 8-bit RGB, and its greatest value (255 where that says nothing)."""
    if not picture.mode.startswith("I;16"):  # PIL has dropped the lower 8 bits of colours
        rgb = picture.convert("RGB")
        return rgb, float(np.asarray(rgb).max())
    values = np.asarray(picture)  # PIL's own conversion makes everything above 255 white
    brightest = float(values.max()) / 256 if values.any() and white == 65535 else 255
    gray = Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8))
    return gray.convert("RGB"), brightest
