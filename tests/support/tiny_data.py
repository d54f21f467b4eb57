"""A tiny processor and tiny data sets in every layout that a mixture can read."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nmm_serve.image_processor import NMMImageProcessor
from nmm_serve.processor import NMMProcessor
from nmm_serve.tokenizer import train_tokenizer

PATCH_SIZE = 8
WORDS = ["what is the colour of the circle ? red green blue", "describe the image . a large square and a small circle"]


@cache
def tiny_processor(image_size: int = 32) -> NMMProcessor:
    """Patches of 8 x 8 pixels: a square image of 32 pixels is 16 tokens."""
    tokenizer = train_tokenizer(WORDS * 10, 300)
    images = NMMImageProcessor(patch_size=PATCH_SIZE, image_size=image_size)
    return NMMProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An image in one colour of its own."""
    return Image.new("RGB", size, (number % 256, number // 256, 128))


def picture_number(pixel_values: Any) -> int:
    """Which `picture` the first patch comes from."""
    red, green = np.rint((np.asarray(pixel_values[0, :2]) + 1) * 127.5).astype(int)
    return int(red + 256 * green)


def write_coco(folder: Path, split: str = "train", n: int = 12, captions: int = 3, questions: int = 3) -> Path:
    """COCO captions and VQA v2 about `picture(0)` to `picture(n - 1)`. Caption k of image i is "image i caption k";
    question k is "question i k ?" with the answers "i a k" (seven of ten) and "i b k"."""
    (folder / "images" / split).mkdir(parents=True)
    images, caps, asked, annotated = [], [], [], []
    for i in range(n):
        name = f"COCO_{split}_{i:012d}.png"
        picture(i).save(folder / "images" / split / name)
        images.append({"id": i, "file_name": name})
        caps += [{"id": 10 * i + k, "image_id": i, "caption": f"image {i} caption {k}"} for k in range(captions)]
        for k in range(questions):
            ids = {"image_id": i, "question_id": 100 * i + k}
            asked.append({**ids, "question": f"question {i} {k} ?"})
            answers = [{"answer": f"{i} {'a' if j < 7 else 'b'} {k}", "answer_id": j} for j in range(10)]
            annotated.append({**ids, "answers": answers, "multiple_choice_answer": f"{i} a {k}"})
    for name, document in (
        (f"captions_{split}.json", {"images": images, "annotations": caps}),
        (f"vqa_{split}_questions.json", {"questions": asked}),
        (f"vqa_{split}_annotations.json", {"annotations": annotated}),
    ):
        (folder / name).write_text(json.dumps(document))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def write_interleaved(path: Path, n: int = 5, images: int = 2) -> Path:
    """Document i: "before i", its images, "after i"."""
    lines = []
    for i in range(n):
        content: list[dict[str, str]] = [{"type": "text", "text": f"before {i}"}]
        for k in range(images):
            name = f"{i}-{k}.png"
            picture(images * i + k).save(path.parent / name)
            content.append({"type": "image", "path": name})
        content.append({"type": "text", "text": f"after {i}"})
        lines.append(json.dumps({"content": content}))
    path.write_text("\n".join(lines) + "\n\n")
    return path
