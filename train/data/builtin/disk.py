"""The built-in data on disk, in the layouts of COCO captions and VQA v2."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError
from nmm_serve.train.data.builtin.example import builtin_images
from nmm_serve.train.data.builtin.scene import IMAGE_SIZE, STANDARD, Difficulty

CAPTIONS_AN_IMAGE = 5
ANNOTATION_FIELDS = ("question_id", "image_id", "question_type", "answer_type", "answers", "multiple_choice_answer")
INFO = {"description": "nmm-serve built-in scenes with handwritten digits", "version": "1.0"}
LICENSE = {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}


def export(out_dir: str | Path, split: str, n: int, seed: int = 0, difficulty: Difficulty = STANDARD) -> None:
    """Write the first `n` examples of `split` under `out_dir`:

    images/{split}/<12-digit image id>.png, captions_{split}.json (COCO captions),
    vqa_{split}_questions.json and vqa_{split}_annotations.json (VQA v2; annotations carry the extra
    field `family`).

    Everything is written aside first and then renamed, pictures before captions before questions before
    annotations: a file that is there is whole, and so is all that it refers to. Raises DataError where
    the split is there already, and for an unknown split or n < 1.
    """
    out = Path(out_dir)
    if n < 1:
        raise DataError(f"cannot export {n} examples of the built-in data; expected 1 or more")
    targets = [
        Path("images") / split,
        Path(f"captions_{split}.json"),
        Path(f"vqa_{split}_questions.json"),
        Path(f"vqa_{split}_annotations.json"),
    ]
    for target in targets:
        if (out / target).exists():
            raise DataError(f"{out / target} is there already; delete it or export into another directory")
    (out / "images").mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".export-{split}-", dir=out))
    try:
        _write(staging, targets, split, n, seed, difficulty)
        for target in targets:
            os.rename(staging / target, out / target)
    finally:
        shutil.rmtree(staging)


def _write(staging: Path, targets: list[Path], split: str, n: int, seed: int, difficulty: Difficulty) -> None:
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (staging / targets[0]).mkdir(parents=True)
    for index in range(n):
        example = builtin_images(split, index, seed, difficulty)
        name = f"{example.image_id:012d}.png"
        example.image.save(staging / targets[0] / name)
        images.append(
            {"id": example.image_id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE, "license": 1}
        )
        for k, caption in enumerate(example.captions):
            caption_id = example.image_id * CAPTIONS_AN_IMAGE + k
            captions.append({"id": caption_id, "image_id": example.image_id, "caption": caption})
        for q in example.questions:
            questions.append({key: q[key] for key in ("image_id", "question", "question_id")})
            annotations.append({key: q[key] for key in (*ANNOTATION_FIELDS, "family")})
    info = {**INFO, "seed": seed, "jitter": difficulty.jitter, "max_objects": difficulty.max_objects}
    coco = {"info": info, "licenses": [{"id": 1, **LICENSE}], "images": images, "annotations": captions}
    vqa = {"info": info, "data_type": "nmm-serve-builtin", "data_subtype": split, "license": LICENSE}
    documents = [coco, {**vqa, "task_type": "Open-Ended", "questions": questions}, {**vqa, "annotations": annotations}]
    for target, document in zip(targets[1:], documents, strict=True):
        (staging / target).write_text(json.dumps(document))
