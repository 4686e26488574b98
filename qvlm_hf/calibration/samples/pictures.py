"""Pictures of a sample, from a file or in memory: checked, opened, hashed."""

import struct
from pathlib import Path

from PIL import Image, ImageOps

from qvlm_hf.calibration.samples.errors import first_line

__all__ = ["image_bytes", "open_image", "verify_image"]

# What PIL raises for a file that is no picture or is cut short.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, Image.DecompressionBombError)


def _image_error(path: object, key: str, origin: str, error: BaseException) -> ValueError:
    if isinstance(error, FileNotFoundError):
        return ValueError(f'{origin}: key "{key}": no such picture: {path}; paths are relative to the dataset file')
    return ValueError(f'{origin}: key "{key}": unreadable picture {path} ({first_line(error)}); replace it or remove the sample')


def verify_image(path: Path, key: str, origin: str) -> None:
    """Checks that a file starts like a picture, without decoding it.

    Args:
        path: of the file.
        key: of the picture in the source, for the message.
        origin: of the sample, for the message.

    Raises:
        ValueError: it is missing or unreadable.
    """
    try:
        with Image.open(path) as picture:
            picture.verify()
    except _UNREADABLE as error:
        raise _image_error(path, key, origin, error) from error


def open_image(value: Path | Image.Image, key: str, origin: str) -> Image.Image:
    """Opens a picture, upright and in RGB; arguments and errors as in `verify_image`."""
    try:
        if isinstance(value, Image.Image):
            return ImageOps.exif_transpose(value).convert("RGB")
        with Image.open(value) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except _UNREADABLE as error:
        raise _image_error("in memory" if isinstance(value, Image.Image) else value, key, origin, error) from error


def image_bytes(key: str, value: Path | Image.Image, origin: str) -> bytes:
    """What to hash: a file's bytes, or mode, size and pixels of a picture in memory; arguments and errors as in `verify_image`."""
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size}\0".encode() + value.tobytes()
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise _image_error(value, key, origin, error) from error
