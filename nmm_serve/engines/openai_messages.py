"""Prompts and images in the shape in which the OpenAI API takes them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from nmm_serve.errors import PromptError
from nmm_serve.images import load_image
from nmm_serve.prompt import checked


def with_images(messages: Sequence[dict[str, Any]], images: Sequence[Image.Image | Path]) -> list[dict[str, Any]]:
    """Put the images where the messages say, as data URLs. Raises PromptError when their numbers differ, and for
    a text that JSON in UTF-8 cannot carry."""
    slots = 0
    filled = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            checked(content)
        if isinstance(content, list):
            parts = []
            for part in content:
                if part.get("type") == "image":
                    if slots < len(images):
                        part = {"type": "image_url", "image_url": {"url": data_url(images[slots])}}
                    slots += 1
                if isinstance(part.get("text"), str):
                    checked(part["text"])
                parts.append(part)
            content = parts
        filled.append({**message, "content": content})
    if slots != len(images):
        raise PromptError(
            f"the prompt has {slots} image places but {len(images)} images were given; give one image for each"
        )
    return filled


def data_url(image: Image.Image | Path) -> str:
    """PNG, which loses nothing; upright RGB, so that every server sees what our own engines see."""
    buffer = io.BytesIO()
    load_image(image).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_json(prompt: str | Sequence[int]) -> str | list[int]:
    """Raises PromptError as `with_images` does."""
    return checked(prompt) if isinstance(prompt, str) else list(prompt)
