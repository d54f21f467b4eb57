"""The paper's image augmentation: RandomResizedCrop at scale 0.4 to 1, and a horizontal flip of half the images."""

import math
import random
from typing import Literal

from PIL import Image

from nmm_serve.image_processor import NMMImageProcessor

Augmentation = Literal["paper"]
SCALE = (0.4, 1.0)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
FLIP_PROBABILITY = 0.5
ATTEMPTS = 10


def random_resized_crop(image: Image.Image, processor: NMMImageProcessor, rng: random.Random) -> Image.Image:
    """A random part of an RGB image at the size that the processor gives the whole image, so it is resized once.

    The output keeps the grid of the uncropped image (a square stays square, as in the paper), since evaluation
    shows whole images and every grid it uses must have been trained. A flip makes captions and answers that name
    left and right wrong.
    """
    rows, cols = processor.grid(*image.size)
    size = (cols * processor.patch_size, rows * processor.patch_size)
    crop = image.resize(size, Image.Resampling.BICUBIC, box=_crop_box(*image.size, rng))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < FLIP_PROBABILITY else crop


def _crop_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop; the whole image when none of ten fits, as for very long images."""
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height
