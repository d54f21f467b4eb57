"""Sample images: which ones a record carries, and small pictures that travel inside a record or a page."""

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from nmm_serve.images import load_image

CARRIED = 12
_PIXELS = 224


def by_hash(image_ids: Iterable[str]) -> list[str]:
    """In an order that hangs on the ids alone: neither on the model nor on the order of the files."""
    return sorted(set(image_ids), key=lambda image_id: hashlib.sha256(image_id.encode()).digest())


def thumbnail(path: Path) -> str:
    """The image, scaled down, as a data URI. Raises ImageError for one that cannot be read."""
    image = load_image(path)
    image.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
