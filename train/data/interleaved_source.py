"""Source kind `interleaved_jsonl`: one document a line, `{"content": [{"type": "text", "text": ...}, {"type": "image",
"path": ...}, ...]}`."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from nmm_serve.chat import ImageSlot
from nmm_serve.errors import DataError
from nmm_serve.train.data.documents import Document, ImageSource, interleaved_document
from nmm_serve.train.data.files import Lines, decode, expand, locate
from nmm_serve.train.data.options import Paths
from nmm_serve.train.data.sources import Source, Visit


class InterleavedJsonl(Source):
    """Image paths start at `images`, by default at the folder of the file that names them."""

    kind = "interleaved"

    def __init__(self, name: str, *, path: Paths, images: Path | None = None) -> None:
        self.name = name
        if images is not None and not images.is_dir():
            raise DataError(f"source {name!r}: image folder {images} does not exist")
        files = expand(path, (".jsonl",), f"source {name!r}")
        self._images = [images or file.parent for file in files]
        self._lines = [Lines(file) for file in files]
        self._ends = list(accumulate(len(lines) for lines in self._lines))

    def __len__(self) -> int:
        return self._ends[-1]

    def item_name(self, index: int) -> str:
        file, line = locate(index, self._ends)
        return f"{self.name}:{self._lines[file].name(line)}"

    def document(self, index: int, visit: Visit) -> Document:
        name = self.item_name(index)
        file, line = locate(index, self._ends)
        parts: list[str | ImageSlot] = []
        images: list[ImageSource] = []
        for part in _content(decode(self._lines[file][line], name), name):
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                # neighbouring texts are one text: the tokenizer may merge across the seam
                if parts and isinstance(parts[-1], str):
                    parts[-1] += part["text"]
                else:
                    parts.append(part["text"])
            elif part.get("type") == "image" and isinstance(part.get("path"), str):
                parts.append(ImageSlot())
                images.append(self._images[file] / part["path"])
            else:
                expected = "{'type': 'text', 'text': ...} or {'type': 'image', 'path': ...}"
                raise DataError(f"{name}: part {part!r}; expected {expected}")
        return interleaved_document(parts, images, name=name)


def _content(line: str, name: str) -> list[dict[str, Any]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{name} is not JSON, or too deeply nested") from None
    content = record.get("content") if isinstance(record, dict) else None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{name}: expected an object with a list 'content' of text and image parts")
    return content
