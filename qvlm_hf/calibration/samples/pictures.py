"""Pictures of a sample, from a file or in memory: checked, opened, hashed."""

import re
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qvlm_hf.calibration.samples.errors import first_line

__all__ = ["check_picture", "image_bytes", "open_image"]

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


class _UnusableError(ValueError):
    """A picture that PIL can read and nobody can use."""


def _image_error(path: object, key: str, origin: str, error: BaseException) -> ValueError:
    if isinstance(error, FileNotFoundError):
        folder = Path(str(path)).absolute().parent
        return ValueError(
            f'{origin}: key "{key}": no such picture: {path}; it was looked for in {folder}'
        )
    return ValueError(
        f'{origin}: key "{key}": unreadable picture {path} ({first_line(error)}); give another'
    )


def check_picture(value: Path | Image.Image, key: str, origin: str) -> None:
    """Checks that a picture can be used; of 8 bits as far as that is known without decoding it.

    Args:
        value: a file, or a picture in memory.
        key: of the picture in the source, for the message.
        origin: of the sample, for the message.

    Raises:
        ValueError: it is missing, unreadable or has no pixels; or nobody knows which value is
            white: it holds 32-bit integers or floats, or 16 bits of which the upper four are
            unused.
    """
    try:
        with nullcontext(value) if isinstance(value, Image.Image) else Image.open(value) as picture:
            deep = _is_deep(picture)
            _check_values(picture, key, origin)
            if not isinstance(value, Image.Image):
                picture.verify()
    except _UnusableError:
        raise
    except _UNREADABLE as error:
        raise _image_error(value, key, origin, error) from error
    if deep:
        open_image(value, key, origin)


def _is_deep(picture: Image.Image) -> bool:
    """Whether it has 16 bits, or had them in its file (known until it is decoded): PIL keeps the upper 8 of colours."""
    return picture.mode.startswith("I;16") or bool(re.search(r";16[BLN]$", _stored_mode(picture)))


def _stored_mode(picture: Image.Image) -> str:
    """PIL's name for the values in a file that is not decoded yet, "RGB;16B"; else "" ."""
    for tile in getattr(picture, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        return next((text for text in arguments if isinstance(text, str)), "")
    return ""


def _check_values(picture: Image.Image, key: str, origin: str) -> None:
    """Refuses what has no pixels, and values without a known range: PIL would take all above 255 for white."""
    if not all(picture.size):
        size = " x ".join(map(str, picture.size))
        raise _UnusableError(
            f'{origin}: key "{key}": the picture has no pixels ({size}); replace it or remove the '
            f"sample"
        )
    if picture.mode in _RANGELESS:
        kind = (
            f'{_RANGELESS[picture.mode]} (mode "{picture.mode}"), whose black and white are unknown'
        )
        raise _UnusableError(
            f'{origin}: key "{key}": the picture holds {kind}; scale it to 8 bits, 0 to 255, and '
            f'convert it to "RGB"'
        )


def open_image(value: Path | Image.Image, key: str, origin: str) -> Image.Image:
    """Opens a picture, upright and in RGB; arguments and errors as in `check_picture`.

    Of 8 bits it is what Transformers' `load_image` makes of it (transparency is dropped, not
    blended). Of 16 bits 65535 is white, as in scikit-image and in files; values that stay below
    4096 are refused, because they are probably of 10 or 12 bits.
    """
    memory = isinstance(value, Image.Image)
    try:
        with nullcontext(value) if isinstance(value, Image.Image) else Image.open(value) as picture:
            _check_values(picture, key, origin)
            deep, stored = _is_deep(picture), _stored_mode(picture)
            upright = ImageOps.exif_transpose(picture)
            made, brightest = (
                _scaled(upright, 4095 if stored == "I;12" else 65535)
                if deep
                else (upright.convert("RGB"), 255)
            )
    except _UnusableError:
        raise
    except _UNREADABLE as error:
        raise _image_error("in memory" if memory else value, key, origin, error) from error
    if brightest < 16:
        problem = (
            "the picture has 16 bits and no value of 4096 or more: almost black, if 65535 is white"
        )
        raise _UnusableError(
            f'{origin}: key "{key}": {problem}; if 1023 or 4095 is, scale it to 8 bits, 0 to 255'
        )
    return made


def _scaled(picture: Image.Image, white: int) -> tuple[Image.Image, float]:
    """A picture of 16 bits in 8-bit RGB, and its greatest value in 8 bits (255 where that says nothing)."""
    if not picture.mode.startswith("I;16"):  # PIL has dropped the lower 8 bits of colours
        rgb = picture.convert("RGB")
        return rgb, float(np.asarray(rgb).max())
    values = np.asarray(picture)  # PIL's own conversion makes everything above 255 white
    brightest = float(values.max()) / 256 if values.any() and white == 65535 else 255
    return Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8)).convert(
        "RGB"
    ), brightest


def image_bytes(key: str, value: Path | Image.Image, origin: str) -> bytes:
    """What to hash: a file's bytes, or mode, size and pixels of a picture in memory; arguments and errors as in `check_picture`."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}\0".encode() + value.tobytes()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise _image_error(value, key, origin, error) from error
