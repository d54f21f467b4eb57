import io
import struct
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nmm_serve.errors import ImageError
from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.images import image_grid, load_image, patch_grid
from nmm_serve.models.vision import max_grid_side, patchify


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


PICTURE = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = load_image(encoded(PICTURE, "PNG", exif=exif))
    assert turned.size == (6, 4)
    assert np.array_equal(np.asarray(turned), np.asarray(PICTURE.transpose(Image.Transpose.ROTATE_270)))


def exif(*entries):
    """Of (tag, type, count, value) as they stand in a file."""
    header = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return header + b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.parametrize(
    ("metadata", "size"),
    [
        (b"Exif\0\0garbagegarbage", (4, 6)),
        (b"Exif\0\0II*\0", (4, 6)),
        (exif(TURN)[:20], (4, 6)),
        (exif((0x0112, 2, 2, b"6\0\0\0")), (4, 6)),
        (exif(TURN), (6, 4)),
        (exif(TURN, (0x0100, 2, 4, b"abc\0")), (6, 4)),
        (exif(TURN, (0x011A, 2, 4, b"abc\0")), (6, 4)),
        (exif(TURN, (0x8769, 4, 1, struct.pack("<I", 99999))), (6, 4)),
    ],
)
def test_damaged_metadata_say_nothing_of_the_pixels(metadata, size):
    data = encoded(PICTURE, "JPEG", exif=metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        once = load_image(data)
        opened = load_image(Image.open(io.BytesIO(data)))
    assert (once.size, once.info) == (size, {})
    assert np.array_equal(once, load_image(once))
    assert np.array_equal(once, opened)


def test_the_callers_image_stays_as_it_is():
    image, metadata = PICTURE.copy(), exif((0x0112, 3, 1, struct.pack("<HH", 1, 0)))
    image.info["exif"] = metadata
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert np.array_equal(image, PICTURE)
    assert image.info["exif"] == metadata


def test_transparency_shows_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    assert load_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(half)).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert load_image(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("LA", (2, 2), (9, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_other_colour_modes():
    grey16 = Image.fromarray(np.array([[0, 65535, 32896]], dtype=np.uint16))
    assert [load_image(encoded(grey16)).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 128]
    for most in (65535, 4095):
        middle = most * 32896 // 65535
        pgm = b"P5\n3 1\n%d\n" % most + struct.pack(">3H", 0, most, middle)
        assert [load_image(pgm).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 128 if most == 65535 else 127]
    assert load_image(encoded(Image.new("CMYK", (2, 2), (0, 0, 0, 0)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animation).getpixel((0, 0)) == (255, 0, 0)


def test_what_cannot_be_read_is_one_clear_error(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)
    for bad in (b"", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0"):
        with pytest.raises(ImageError, match="not a readable image"):
            load_image(bad)
    with pytest.raises(ImageError, match="damaged or truncated"):
        load_image(encoded(Image.effect_noise((64, 64), 50), "PNG")[:-200])


def test_size_is_checked_before_decoding():
    bomb = encoded(Image.new("1", (20000, 20000)))
    assert len(bomb) < 100_000
    with pytest.raises(ImageError, match=r"pixels, (over )?the limit"):
        load_image(bomb)


@given(st.binary(max_size=300))
def test_any_bytes_give_an_image_or_an_image_error(data):
    message = ""
    try:
        assert load_image(data).mode == "RGB"
    except ImageError as error:
        message = str(error)
    assert "0x" not in message, "addresses must not leak"


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), side=st.integers(1, 20))
def test_grid_keeps_to_the_rule(width, height, side):
    tokens = side * side
    ratio = max(width / height, height / width)
    if ratio > 16:
        with pytest.raises(ImageError, match="crop it"):
            patch_grid(width, height, tokens, 16)
        return
    rows, cols = patch_grid(width, height, tokens, 16)
    assert rows >= 1
    assert cols >= 1
    assert rows * cols <= tokens
    assert max(rows, cols) <= 4 * side, "position tables end here"
    if tokens >= 64 and ratio <= 4:
        assert rows * cols >= 0.7 * tokens
        assert cols / rows == pytest.approx(width / height, rel=0.35)


def test_square_images_use_every_token():
    assert patch_grid(32, 32, 64, 16) == patch_grid(640, 640, 64, 16) == (8, 8)


def test_patches_are_in_reading_order_and_scaled():
    pixels = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)
    patches = patchify(pixels, 2)
    assert patches.shape == (6, 12)
    assert torch.equal(patches[1], pixels[0:2, 2:4].flatten().float() / 127.5 - 1)
    white_and_black = patchify(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None].expand(2, 2, 3).contiguous(), 2)
    assert (white_and_black.min(), white_and_black.max()) == (-1, 1)


def test_processor_takes_arrays_and_refuses_to_guess():
    processor = NMMImageProcessor(patch_size=8, image_size=32)
    array = np.zeros((32, 32, 3), np.uint8)
    features = processor([array, Image.new("L", (64, 16))], return_tensors="pt")
    assert features["image_grid"].tolist() == [[4, 4], [2, 8]]
    assert features["pixel_values"].shape == (32, 192)
    for wrong in (np.zeros((3, 32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)):
        with pytest.raises(ImageError, match="uint8 of shape"):
            processor(wrong)


def test_longest_image_fits_the_position_tables():
    class Config:
        image_size, patch_size = 64, 8

    processor = NMMImageProcessor(patch_size=8, image_size=64)
    for size in ((1600, 100), (100, 1600), (64, 4), (4, 64)):
        assert max(processor.grid(*size)) <= max_grid_side(Config)


@given(width=st.integers(1, 400), height=st.integers(1, 400), side=st.integers(1, 12))
def test_native_resolution_keeps_what_fits_and_scales_the_rest_down(width, height, side):
    p = 8
    if max(width / height, height / width) > min(16, side * side):
        with pytest.raises(ImageError, match="crop it"):
            image_grid(width, height, p, side * p, native_resolution=True)
        return
    grid = image_grid(width, height, p, side * p, native_resolution=True)
    own = tuple(max(1, round(x / p)) for x in (height, width))
    assert grid in (own, image_grid(width, height, p, side * p))
    if own[0] * own[1] <= side * side and max(own) <= 4 * side:
        assert grid == own
    assert grid[0] * grid[1] <= side * side
    assert max(grid) <= 4 * side, "position tables end here"


def test_native_resolution_leaves_whole_patches_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    native = NMMImageProcessor(patch_size=8, image_size=64, native_resolution=True, raw_pixels=False)
    patches, grid = native.patches(Image.fromarray(pixels))
    assert grid == (3, 5)
    assert torch.equal(patches, patchify(torch.from_numpy(pixels), 8))
    assert NMMImageProcessor(patch_size=8, image_size=64).grid(40, 24) != (3, 5)
    assert native.grid(640, 640) == (8, 8)
