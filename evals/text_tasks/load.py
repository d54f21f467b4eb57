"""What the YAML files of this folder call: their data, read from the JSONL files beside them."""

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

FOLDER = Path(__file__).parent


def split(file: str, **_metadata: Any) -> dict[str, datasets.Dataset]:
    return {"test": datasets.Dataset.from_list(_lines(file))}


def questions(file: str, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """A document a question; a line of the file is a picture with several."""
    asked = [{"image_id": line["image_id"], **question} for line in _lines(file) for question in line["questions"]]
    return {"test": datasets.Dataset.from_list(asked)}


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(_pictures()[doc["image_id"]]))]


@cache
def _pictures() -> dict[int, bytes]:
    return {line["image_id"]: base64.b64decode(line["png"]) for line in _lines("vqa.jsonl")}


def _lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / file).read_text(encoding="utf-8").splitlines()]
