"""Pictures of a sample, from a file or in memory: checked, opened, hashed."""

import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qvlm_hf.calibration.samples.errors import first_line

__all__ = ["check_mode", "image_bytes", "open_image", "verify_image"]

_RANGELESS = {"I": "32-bit integers", "F": "floats"}  # modes of PIL
# What PIL raises for a file that is no picture or is cut short.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, Image.DecompressionBombError)


def _image_error(path: object, key: str, origin: str, error: BaseException) -> ValueError:
    if isinstance(error, FileNotFoundError):
        folder = Path(str(path)).absolute().parent
        return ValueError(f'{origin}: key "{key}": no such picture: {path}; it was looked for in {folder}')
    return ValueError(f'{origin}: key "{key}": unreadable picture {path} ({first_line(error)}); give another')


def verify_image(path: Path, key: str, origin: str) -> None:
    """Checks that a file starts like a picture of values that can be used, without decoding it.

    Args:
        path: of the file.
        key: of the picture in the source, for the message.
        origin: of the sample, for the message.

    Raises:
        ValueError: it is missing or unreadable, or as `check_mode`.
    """
    try:
        with Image.open(path) as picture:
            picture.verify()
    except _UNREADABLE as error:
        raise _image_error(path, key, origin, error) from error
    check_mode(picture, key, origin)


def check_mode(picture: Image.Image, key: str, origin: str) -> None:
    """Refuses values without a known range: nobody knows which of them is white, and PIL would take all above 255 for it.

    Raises:
        ValueError: the picture holds 32-bit integers or floats.
    """
    if picture.mode in _RANGELESS:
        raise _mode_error(picture, key, origin)


def _mode_error(picture: Image.Image, key: str, origin: str) -> ValueError:
    kind = f'{_RANGELESS[picture.mode]} (mode "{picture.mode}"), whose black and white are unknown'
    return ValueError(f'{origin}: key "{key}": the picture holds {kind}; scale it to 8 bits, 0 to 255, and convert it to "RGB"')


def open_image(value: Path | Image.Image, key: str, origin: str) -> Image.Image:
    """Opens a picture, upright and in RGB; arguments and errors as in `verify_image`.

    Of 8 bits it is what Transformers' `load_image` makes of it (transparency is dropped, not blended); 16 bits are scaled to 8.
    """
    memory = isinstance(value, Image.Image)
    try:
        with nullcontext(value) if isinstance(value, Image.Image) else Image.open(value) as picture:
            if picture.mode not in _RANGELESS:
                return _to_rgb(ImageOps.exif_transpose(picture))
    except _UNREADABLE as error:
        raise _image_error("in memory" if memory else value, key, origin, error) from error
    raise _mode_error(picture, key, origin)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # PIL's own conversion makes everything above 255 white
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    return picture.convert("RGB")


def image_bytes(key: str, value: Path | Image.Image, origin: str) -> bytes:
    """What to hash: a file's bytes, or mode, size and pixels of a picture in memory; arguments and errors as in `verify_image`."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}\0".encode() + value.tobytes()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise _image_error(value, key, origin, error) from error
