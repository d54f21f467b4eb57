"""Read an image the way a person would see it, and refuse it before decoding when it is too large."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from nmm_serve.errors import ImageError

MAX_PIXELS = 64 * 2**20
"""Refuse larger images from their header alone: 64 Mi pixels take 256 MiB, and twice that for a moment."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""
MAX_ASPECT_RATIO = 16
"""A longer image is refused: the learned position tables end there."""
TURNS = dict(enumerate(
    (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
     Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
    start=2,
))  # fmt: skip
"""What makes an image upright, by its EXIF orientation."""


def load_image(source: str | Path | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a file, bytes or PIL image and return it as upright RGB.

    EXIF orientation is applied, transparency is composited on white, palettes, grey, CMYK and 16-bit grey are
    converted, and of an animation the first frame counts. No metadata are left: loading it again changes nothing.

    Raises ImageError, in words of our own: a decoder's message can hold memory addresses.
    """
    if isinstance(source, Image.Image):
        name, image = "the image", source
    else:
        name = "the image" if isinstance(source, bytes) else str(source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        except FileNotFoundError:
            raise ImageError(f"{name}: no such file") from None
        except IsADirectoryError:
            raise ImageError(f"{name} is a directory, not an image file") from None
        except PermissionError:
            raise ImageError(f"{name}: permission denied") from None
        except Image.DecompressionBombError:  # far over our own limit too; Pillow keeps the size to itself
            raise ImageError(f"{name} has far more than {max_pixels} pixels, the limit; scale it down first") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            raise ImageError(f"{name} is not a readable image; supported: {', '.join(FORMATS)}") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise ImageError(f"{name} has {width}x{height} pixels, over the limit of {max_pixels}; scale it down first")
    try:
        image.load()
        if (image.format, image.mode) == ("PPM", "I"):  # Pillow's mode for 16 bits of that format
            image = image.convert("I;16")
        turn = TURNS.get(orientation(image))
        rgb = to_rgb(image if turn is None else image.transpose(turn))
        if rgb is image:  # the caller's, which stays as it is, or a file with its metadata
            rgb = rgb.copy()
        rgb.info = {}
        return rgb
    except ImageError:
        raise
    except Exception:  # decoders raise anything on damaged data
        raise ImageError(f"{name} is damaged or truncated: its pixels cannot be decoded") from None


def orientation(image: Image.Image) -> int:
    """By EXIF or XMP. 1, upright, where they cannot be read: damaged metadata say nothing of the pixels."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # their parser raises anything
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB: transparency on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"images of mode {image.mode!r} (32 bits a channel) have no agreed white; convert to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def image_grid(
    width: int, height: int, patch_size: int, image_size: int, native_resolution: bool = False
) -> tuple[int, int]:
    """Rows and columns of patches that an image of this size gets. Raises ImageError past 16:1.

    With `native_resolution` an image whose own pixels fit into the patches of `image_size` squared keeps its size, but
    for the rounding of each side to whole patches; a larger one is scaled down like any other.
    """
    max_tokens = (image_size // patch_size) ** 2
    scaled = patch_grid(width, height, max_tokens, min(MAX_ASPECT_RATIO, max_tokens))
    if native_resolution:
        rows, cols = (max(1, round(side / patch_size)) for side in (height, width))
        longest = image_size // patch_size * math.isqrt(MAX_ASPECT_RATIO)  # where the position tables end
        if rows * cols <= max_tokens and max(rows, cols) <= longest:
            return rows, cols
    return scaled


def fit_to_patches(
    image: Image.Image | Path | str | bytes, patch_size: int, image_size: int, native_resolution: bool = False
) -> np.ndarray:
    """Scale an image to its `image_grid` of whole patches: uint8 [rows * p, cols * p, 3]."""
    image = load_image(image)
    rows, cols = image_grid(*image.size, patch_size, image_size, native_resolution)
    size = (cols * patch_size, rows * patch_size)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.array(image)


def patch_grid(width: int, height: int, max_tokens: int, max_aspect_ratio: float) -> tuple[int, int]:
    """Rows and columns of patches for an image: as many as `max_tokens` allows, as near its aspect ratio as can be.

    An image is scaled up or down to that grid, so that every image costs about the same number of tokens.

    Raises ImageError for an image longer than `max_aspect_ratio`.
    """
    ratio = width / height
    if max(ratio, 1 / ratio) > max_aspect_ratio:
        raise ImageError(f"an image of {width}x{height} is longer than {max_aspect_ratio:g}:1; crop it or split it")
    ideal_rows = math.sqrt(max_tokens / ratio)
    ideal_cols = ideal_rows * ratio
    candidates = [
        (rows, cols)
        for rows in {math.floor(ideal_rows), math.ceil(ideal_rows)}
        for cols in {math.floor(ideal_cols), math.ceil(ideal_cols)}
        if rows >= 1 and cols >= 1 and rows * cols <= max_tokens
    ] or [(1, max_tokens) if ratio > 1 else (max_tokens, 1)]
    # least distortion plus least area given away, both as logarithms
    return min(
        candidates,
        key=lambda g: (abs(math.log(g[1] / g[0] / ratio)) + math.log(max_tokens / (g[0] * g[1])), g),
    )
