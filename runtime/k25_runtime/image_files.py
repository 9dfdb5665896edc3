"""An image from whatever a caller has, as upright 8-bit RGB: a file, bytes, a data URL, an array, a Pillow image.

Everything that comes in is foreign: the size is checked before anything is decoded, only formats that Pillow decodes
by itself are tried (never one that starts a program), and whatever goes wrong inside is an `InputError`.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from k25_plugins.errors import BackendMissingError, InputError, K25Error, mismatch

if TYPE_CHECKING:
    from PIL.Image import Image

#: A path, the bytes of a file, a `data:` URL, an array (uint8 or uint16, [H, W] or [H, W, 1, 3 or 4]), a Pillow image.
ImageSource: TypeAlias = "str | Path | bytes | npt.NDArray[Any] | Image"

#: Images of more pixels are refused before they are decoded (400 MB as RGB).
MAX_PIXELS = 2**27

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
#: Formats whose mode "I" holds 16-bit values.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")


def rgb_image(source: ImageSource, *, where: str = "image") -> Image:
    """The image in mode RGB, turned as its EXIF orientation says; the first frame of an animation.

    Colours are converted as the official processor does, by Pillow's `convert("RGB")`: transparency is dropped, not
    blended. 16-bit values keep their upper byte. `where` names the image in errors, besides its file.
    Raises `InputError` for what is no image, too large, empty, truncated or of a kind that has no 8-bit RGB form.
    """
    with opened_image(source, where=where) as (image, name), decoding(name):
        return rgb_frame(image, name)


@contextmanager
def opened_image(source: ImageSource, *, where: str = "image") -> Iterator[tuple[Image, str]]:
    """The image with its header read and its size checked, not yet decoded, and its name for errors."""
    pillow = require_pillow()
    if isinstance(source, np.ndarray):
        yield _image_from_array(source, where), where
    elif isinstance(source, pillow.Image):
        _require_size(source, where)
        yield source, where
    else:
        with _file_of(source, where) as (file, name):
            with decoding(name):
                image = pillow.open(file, formats=FORMATS)
                _require_size(image, name)
            yield image, name


def rgb_frame(image: Image, name: str) -> Image:
    """The current frame of an opened image in mode RGB, upright."""
    from PIL import ImageOps

    frame = ImageOps.exif_transpose(_eight_bit(image, name))
    if frame.mode == "P" and "transparency" in frame.info:
        frame = frame.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return frame.convert("RGB")


def require_pillow() -> Any:
    """Pillow's `Image` module, or `BackendMissingError` with the install line."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendMissingError("images need Pillow, which is not installed: pip install pillow") from error
    return Image


@contextmanager
def _file_of(source: object, where: str) -> Iterator[tuple[Any, str]]:
    is_name = isinstance(source, str | Path)
    if is_name and str(source).startswith(("http:/", "https:/")):  # a Path has made one of the two slashes
        raise mismatch(where, expected="a file", found=f"the address {source!s:.80}", hint="Nothing is downloaded.")
    if isinstance(source, str) and source.startswith("data:"):
        source = _bytes_of_data_url(source, where)
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), where
        return
    if not isinstance(source, str | Path):
        raise mismatch(where, expected="a path, bytes, an array or a Pillow image", found=type(source).__name__)
    path = Path(source)
    name = f"{where} {path}"
    with _opened_file(path, name) as file:
        yield file, name


def _opened_file(path: Path, name: str) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            raise mismatch(name, expected="a file", found="a folder" if path.is_dir() else "a device or pipe")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _bytes_of_data_url(url: str, where: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise mismatch(where, expected="a data URL in base64", found=repr(header[:60]))
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise mismatch(where, expected="a data URL in base64", found=str(error)) from error


def _image_from_array(array: npt.NDArray[Any], where: str) -> Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.dtype not in (np.uint8, np.uint16):
        raise mismatch(
            where,
            expected="uint8 or uint16 values [rows, columns] or [rows, columns, 1, 3 or 4]",
            found=f"{array.dtype} {list(array.shape)}",
        )
    _require_sides(array.shape[1], array.shape[0], where)
    values = array[..., 0] if array.ndim == 3 and channels == 1 else array
    if values.dtype == np.uint16:
        values = values >> 8
    image: Image = require_pillow().fromarray(np.ascontiguousarray(values, np.uint8))
    return image


def _eight_bit(image: Image, name: str) -> Image:
    """Images of 16 bits a channel cut to their upper 8, as Pillow itself does with 16-bit RGB."""
    mode = image.mode
    if mode in _SIXTEEN_BIT_MODES or (mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        values = np.asarray(image)
        narrow: Image = require_pillow().fromarray((values.astype(np.int32) >> 8).astype(np.uint8))
        narrow.info.update(image.info)
        if orientation := image.getexif().get(_ORIENTATION):
            narrow.getexif()[_ORIENTATION] = orientation
        return narrow
    if mode in ("I", "F"):
        raise mismatch(name, expected="8 or 16 bits a channel", found=f"32-bit values (Pillow's mode {mode})")
    return image


_ORIENTATION = 0x0112


def _require_size(image: Image, where: str) -> None:
    _require_sides(*image.size, where)


def _require_sides(width: int, height: int, where: str) -> None:
    if width < 1 or height < 1:
        raise mismatch(where, expected="at least one pixel", found=f"{width}x{height}")
    if width * height > MAX_PIXELS:
        raise mismatch(
            where, expected=f"at most {MAX_PIXELS} pixels", found=f"{width}x{height}", hint="Shrink it first."
        )


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Whatever Pillow raises or warns about while it decodes becomes an `InputError` of one line, or nothing."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes, which are checked here
            yield
    except K25Error:
        raise
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise mismatch(name, expected=f"an image ({kinds})", found="something else, or a damaged header") from error
    except Image.DecompressionBombError as error:
        raise mismatch(name, expected=f"at most {MAX_PIXELS} pixels", found="many more") from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be decoded: {text}. The file is damaged or incomplete.") from error
