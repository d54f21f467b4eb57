"""Scene -> picture. Shapes are antialiased masks, drawn once at eight times the size and kept."""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from nmm_serve.train.data.builtin import digits
from nmm_serve.train.data.builtin.scene import IMAGE_SIZE, Object, Scene

RGB = {
    "red": (218, 30, 40),
    "green": (30, 150, 55),
    "blue": (35, 85, 220),
    "yellow": (240, 200, 15),
    "purple": (135, 50, 170),
    "orange": (250, 125, 15),
    "gray": (110, 110, 110),
}
SUPERSAMPLING = 8
TINT = 9  # largest change of a colour channel from object to object
NOISE = 4  # largest change of a background pixel


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of 64 x 64 pixels; the same scene gives the same pixels."""
    rng = random.Random(scene.background)
    canvas = _background(rng)
    for obj in scene.objects:
        mask = _mask(obj)
        left, top = obj.x - obj.extent // 2, obj.y - obj.extent // 2
        patch = canvas[top : top + obj.extent, left : left + obj.extent]
        ink = np.array([c + rng.randint(-TINT, TINT) for c in RGB[obj.color]], dtype=np.float32).clip(0, 255)
        patch += mask[..., None] * (ink - patch)
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def _background(rng: random.Random) -> np.ndarray:
    """Paper: a light tint, a slope of light across it, and grain. [64, 64, 3] float32."""
    light = rng.uniform(205, 235)
    tint = np.array([light + rng.uniform(-5, 5) for _ in range(3)], dtype=np.float32)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    # 235 + 5 + 5 + 5 + NOISE stays below 255, where a byte would wrap around.
    slope = rng.uniform(-5, 5) * ramp[None, :] + rng.uniform(-5, 5) * ramp[:, None]
    grain = np.frombuffer(rng.randbytes(IMAGE_SIZE * IMAGE_SIZE), dtype=np.int8).reshape(IMAGE_SIZE, IMAGE_SIZE)
    return tint + (slope + grain * np.float32(NOISE / 128))[..., None]


def _mask(obj: Object) -> np.ndarray:
    if obj.glyph is None:
        return _shape_mask(obj.kind, obj.extent)
    return _digit_mask(obj.glyph, obj.extent)


@functools.cache
def _digit_mask(glyph: int, side: int) -> np.ndarray:
    """Ink 0..1 of one handwritten digit, [side, side]."""
    small = Image.fromarray(digits.images()[glyph])
    large = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    # Enlarged strokes are pale at the edges; a steeper curve keeps thin ones readable on light paper.
    return (large * 1.4).clip(0, 1)


@functools.cache
def _shape_mask(kind: str, side: int) -> np.ndarray:
    """Coverage 0..1 of one shape, [side, side]."""
    s = side * SUPERSAMPLING
    big = Image.new("L", (s, s))
    draw = ImageDraw.Draw(big)
    box = (0, 0, s - 1, s - 1)
    if kind == "circle":
        draw.ellipse(box, fill=255)
    elif kind == "ring":
        draw.ellipse(box, fill=255)
        inner = s * 0.27
        draw.ellipse((inner, inner, s - 1 - inner, s - 1 - inner), fill=0)
    elif kind == "square":
        inset = s * 0.04
        draw.rectangle((inset, inset, s - 1 - inset, s - 1 - inset), fill=255)
    elif kind == "triangle":
        draw.polygon([(s / 2, 0), (s - 1, s - 1), (0, s - 1)], fill=255)
    elif kind == "cross":
        low, high = s * 0.34, s * 0.66
        draw.rectangle((low, 0, high, s - 1), fill=255)
        draw.rectangle((0, low, s - 1, high), fill=255)
    elif kind == "star":
        points = []
        for i in range(10):
            radius = s * (0.55 if i % 2 == 0 else 0.23)
            angle = math.pi * (i / 5 - 0.5)
            points.append((s / 2 + radius * math.cos(angle), s * 0.54 + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    else:
        raise AssertionError(f"no drawing for {kind!r}")
    small = big.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255
