"""Preprocessing of images: sizes and tokens of the worked cases, every byte against a second implementation over
Pillow, and what files from strangers may be.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from k25_plugins.errors import InputError
from k25_runtime import image_files
from k25_runtime.image_files import rgb_image
from k25_runtime.image_processor import image_grid, padded_pixels, padded_size, resized_size
from k25_runtime.media_processor import MediaProcessor
from k25_runtime.media_settings import MediaSettings

DEFAULT = MediaSettings()
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    """Nothing that a file does may reach the user as a warning of Pillow's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Any:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "PNG", **options)


# A second implementation, with Pillow alone.


def reference_bytes(image: Image.Image, limit: int) -> Any:
    """uint8 [patches, 3, 14, 14]: shrink, paste on black, cut out each patch with Pillow."""
    width, height = image.size
    factor = min(
        1.0, math.sqrt(limit / (max(1.0, width // 14) * max(1.0, height // 14))), 512 * 14 / width, 512 * 14 / height
    )
    new = tuple(min(max(1, int(side * factor)), 7168) for side in (width, height))
    canvas = Image.new("RGB", tuple(math.ceil(side / 28) * 28 for side in new))
    canvas.paste(image.resize(new, Image.Resampling.BICUBIC), (0, 0))
    boxes = [(x, y, x + 14, y + 14) for y in range(0, canvas.height, 14) for x in range(0, canvas.width, 14)]
    return np.stack([np.stack([np.asarray(band) for band in canvas.crop(box).split()]) for box in boxes])


@pytest.mark.parametrize(
    "size", [(28, 28), (1, 1), (27, 29), (640, 480), (97, 311), (2000, 30), (5, 900), (9000, 3), (2, 7300)]
)
def test_every_byte_is_that_of_the_second_implementation(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    item = MediaProcessor().image(image)
    expected = reference_bytes(image, 16384)
    assert item.pixel_values.shape == expected.shape
    assert np.array_equal(np.rint((item.pixel_values.astype(np.float64) * 0.5 + 0.5) * 255), expected)
    scaled = (expected / 255.0).astype(np.float32)
    assert np.array_equal(item.pixel_values, (scaled - np.float32(0.5)) / np.float32(0.5))


@pytest.mark.parametrize("limit", [4, 60, 333])
def test_a_small_limit_shrinks_the_same_way(limit: int) -> None:
    image = Image.fromarray(noise(211, 150))
    values = MediaProcessor(MediaSettings(in_patch_limit=limit)).image(image).pixel_values
    assert np.array_equal(np.rint((values.astype(np.float64) * 0.5 + 0.5) * 255), reference_bytes(image, limit))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 500), height=st.integers(1, 500), limit=st.integers(1, 400))
def test_padded_pixels_of_any_size(width: int, height: int, limit: int) -> None:
    image = Image.fromarray(noise(width, height))
    pixels = padded_pixels(image, resized_size(width, height, DEFAULT, patch_limit=limit), DEFAULT)
    h, w = pixels.shape[0] // 14, pixels.shape[1] // 14
    patches = pixels.reshape(h, 14, w, 14, 3).transpose(0, 2, 4, 1, 3).reshape(h * w, 3, 14, 14)
    assert np.array_equal(patches, reference_bytes(image, limit))


@pytest.mark.parametrize(
    ("size", "limit", "resized", "grid", "tokens"),
    [
        ((640, 480), 16384, (640, 480), (36, 46), 414),
        ((1920, 1080), 16384, (1920, 1080), (78, 138), 2691),
        ((3840, 2160), 16384, (2392, 1345), (98, 172), 4214),
        ((1792, 1792), 16384, (1792, 1792), (128, 128), 4096),
        ((8000, 8000), 16384, (1793, 1793), (130, 130), 4225),
        ((28, 28), 16384, (28, 28), (2, 2), 1),
        ((1920, 1080), 4096, (1196, 672), (48, 86), 1032),
    ],
)
def test_the_worked_cases(
    size: tuple[int, int], limit: int, resized: tuple[int, int], grid: tuple[int, int], tokens: int
) -> None:
    found = resized_size(*size, DEFAULT, patch_limit=limit)
    assert found == resized
    padded = padded_size(found, DEFAULT)
    assert (padded[1] // 14, padded[0] // 14) == grid
    assert grid[0] * grid[1] // 4 == tokens
    assert image_grid(*size, MediaSettings(in_patch_limit=limit)) == (1, *grid)


def test_a_worked_case_with_pixels() -> None:
    item = MediaProcessor().image(np.zeros((480, 640, 3), np.uint8))
    assert (item.grid, item.tokens, item.pixel_values.shape) == ((1, 36, 46), 414, (1656, 3, 14, 14))
    assert (item.pixel_values == -1).all()


def test_padding_is_black_before_it_is_normalised() -> None:
    values = MediaProcessor().image(np.full((20, 20, 3), 255, np.uint8)).pixel_values.reshape(2, 2, 3, 14, 14)
    frame = values.transpose(2, 0, 3, 1, 4).reshape(3, 28, 28)
    assert (frame[:, :20, :20] == 1).all()
    assert (frame[:, 20:] == -1).all()
    assert (frame[:, :, 20:] == -1).all()


def test_other_means_are_applied_by_channel() -> None:
    chosen = MediaSettings(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 2.0))
    pixels = noise(28, 28)
    values = MediaProcessor(chosen).image(pixels).pixel_values.reshape(2, 2, 3, 14, 14)
    frame = values.transpose(0, 3, 1, 4, 2).reshape(28, 28, 3)
    assert np.allclose(frame, (pixels / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 2.0], atol=1e-6)


# What an image may be.


def test_files_bytes_arrays_urls_and_images_are_the_same(tmp_path: Path) -> None:
    pixels = noise(40, 30)
    data = png(Image.fromarray(pixels))
    (tmp_path / "cat.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources: list[Any] = [tmp_path / "cat.png", str(tmp_path / "cat.png"), data, url, pixels, Image.fromarray(pixels)]
    items = [MediaProcessor().image(source) for source in sources]
    assert len({item.key for item in items}) == 1
    assert all(np.array_equal(np.asarray(rgb_image(source)), pixels) for source in sources)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_the_name_of_a_file_does_not_matter(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(Image.fromarray(noise(31, 22)), kind))
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(rgb_image(path)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_modes_are_converted_as_pillow_does(mode: str) -> None:
    image = Image.fromarray(noise(16, 12)).convert(mode)
    assert np.array_equal(np.asarray(rgb_image(image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_photo() -> None:
    data = encoded(Image.fromarray(noise(16, 12)).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        assert np.array_equal(np.asarray(rgb_image(data)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_a_palette_with_transparency_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.fromarray(noise(16, 12)).convert("P")
    data = png(image, transparency=transparency)
    assert np.array_equal(np.asarray(rgb_image(data)), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_as_the_official_processor_does() -> None:
    pixels = noise(16, 12, channels=4)
    assert np.array_equal(np.asarray(rgb_image(png(Image.fromarray(pixels)))), pixels[..., :3])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (12, 16), dtype=np.uint16)
    found = np.asarray(rgb_image(encoded(Image.fromarray(values), kind)))
    assert np.array_equal(found, np.repeat((values >> 8)[..., None], 3, axis=2))


def test_sixteen_bit_arrays() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (12, 16, 3), dtype=np.uint16)
    assert np.array_equal(np.asarray(rgb_image(values)), values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright(orientation: int) -> None:
    pixels = noise(48, 32)
    upright = Image.fromarray(pixels)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left, shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert np.array_equal(np.asarray(rgb_image(png(stored, exif=exif))), pixels)


def test_a_sixteen_bit_scan_is_turned_upright() -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) << 8
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    found = np.asarray(rgb_image(png(Image.fromarray(values), exif=exif)))
    assert np.array_equal(found[..., 0], (values >> 8)[::-1, ::-1])


def test_an_animation_given_as_an_image_is_its_first_frame() -> None:
    frames = [Image.fromarray(noise(16, 12, seed=seed)) for seed in range(3)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(np.asarray(rgb_image(data)), np.asarray(frames[0]))


# What is refused, always as an `InputError` of one line that names the file.


def png_header(width: int, height: int) -> bytes:
    """A PNG of this size without its data."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def bmp_header(width: int, height: int) -> bytes:
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("size", [(2**14, 2**13 + 1), (2**16, 2**16), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match=r"picture: expected at most 134217728 pixels, found"):
        rgb_image(png_header(*size), where="picture")


def test_the_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that Pillow warns about and that we take."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = rgb_image(png(Image.fromarray(noise(40, 40))))
    assert image.size == (40, 40)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1599)
    for source in (png(Image.fromarray(noise(40, 40))), noise(40, 40), Image.fromarray(noise(40, 40))):
        with pytest.raises(InputError, match="at most 1599 pixels, found 40x40"):
            rgb_image(source)


@pytest.mark.parametrize("data", [png_header(0, 5), png_header(5, 0), bmp_header(0, 3), b"GIF89a" + bytes(7)])
def test_an_image_without_pixels(data: bytes) -> None:
    with pytest.raises(InputError):
        rgb_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file(tmp_path: Path, kind: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(200, 150)), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=str(path)) as caught:
        rgb_image(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]))
def test_a_damaged_file_is_read_or_refused(data: st.DataObject, kind: str) -> None:
    """Any byte changed anywhere: an image or an `InputError`, nothing else."""
    damaged = bytearray(encoded(Image.fromarray(noise(20, 15)), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InputError):
        assert rgb_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "expected an image"),
        (b"not an image at all", "expected an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "expected an image"),  # would start a program
        ("no/such/file.png", "no/such/file.png: cannot be read: No such file"),
        ("bad\0name", "cannot be read"),
        (".", "expected a file, found a folder"),
        ("/dev/zero", "found a device or pipe"),
        ("https://example.com/cat.png", "Nothing is downloaded"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png,plain", "base64"),
        (np.zeros((0, 5, 3), np.uint8), "found 5x0"),
        (np.zeros((5, 0), np.uint8), "found 0x5"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"),
        (np.zeros((4, 4, 3), np.float64), r"float64 \[4, 4, 3\]"),
        (np.zeros((4,), np.uint8), r"uint8 \[4\]"),
        (Image.new("F", (4, 4)), "32-bit"),
        (Image.new("I", (4, 4)), "32-bit"),
        (Image.new("RGB", (0, 4)), "found 0x4"),
        (17, "found int"),
        (None, "found NoneType"),
    ],
)
def test_what_is_no_image(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rgb_image(source)
    assert "\n" not in str(caught.value)
