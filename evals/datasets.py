"""Read evaluation sets: COCO captions and VQA v2, from one folder or from files named one by one.

A folder holds `images/{split}/`, `captions_{split}.json`, `vqa_{split}_questions.json`, `vqa_{split}_annotations.json`.
What the files hold is checked by `annotations.py` when it is read; here every image's file is found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmm_serve.coco_images import digits_of, names_by_digits
from nmm_serve.errors import DataError
from nmm_serve.evals.annotations import (
    AnsweredQuestion,
    Id,
    References,
    read_images,
    read_questions,
    read_references,
)


@dataclass(frozen=True)
class Files:
    """Where an evaluation set lies. `captions` also tells the image's file name for each image id."""

    images: Path | None = None
    captions: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Question(AnsweredQuestion):
    """A question that can be asked."""

    image: Path


@dataclass(frozen=True, kw_only=True)
class CaptionedImage(References):
    """An image that can be captioned."""

    image: Path


@dataclass(frozen=True)
class VQASet:
    questions: tuple[Question, ...]
    total: int
    """Questions in the files, before `limit`."""
    fingerprint: dict[str, Any]

    @property
    def complete(self) -> bool:
        return len(self.questions) == self.total


@dataclass(frozen=True)
class CaptionSet:
    images: tuple[CaptionedImage, ...]
    total: int
    """Images in the files, before `limit`."""
    fingerprint: dict[str, Any]

    @property
    def complete(self) -> bool:
        return len(self.images) == self.total


def find_files(
    data: Path | None,
    split: str,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    questions: Path | None = None,
    annotations: Path | None = None,
) -> Files:
    """Files of `split` in the folder `data`; a file named one by one takes the place of the folder's.

    Files that do not exist in the folder stay None, since a folder may hold captions alone. Raises DataError when a
    named folder or file is missing.
    """
    for named in (data, images, captions, questions, annotations):
        if named is not None and not named.exists():
            raise DataError(f"{named} does not exist; check the path")
    if data is not None:
        if not data.is_dir():
            raise DataError(f"--data {data} is a file; give the folder that holds images/ and the JSON files")
        in_folder = {
            "images": data / "images" / split,
            "captions": data / f"captions_{split}.json",
            "questions": data / f"vqa_{split}_questions.json",
            "annotations": data / f"vqa_{split}_annotations.json",
        }
        found = {name: path for name, path in in_folder.items() if path.exists()}
        if not found:
            names = ", ".join(str(path.relative_to(data)) for path in in_folder.values())
            raise DataError(f"{data} holds no split {split!r}: expected {names}. Splits there: {_splits(data)}")
        images = images or found.get("images")
        captions = captions or found.get("captions")
        questions = questions or found.get("questions")
        annotations = annotations or found.get("annotations")
    return Files(images=images, captions=captions, questions=questions, annotations=annotations, split=split)


def load_vqa(files: Files, limit: int | None = None) -> VQASet:
    """Read VQA v2 questions and annotations; the first `limit` questions in file order when given.

    Raises DataError for a missing file, a file of another shape, ids that repeat or do not match, and a missing image.
    """
    questions_file = _need(files.questions, "questions", "vqa_{split}_questions.json", files)
    annotations_file = _need(files.annotations, "annotations", "vqa_{split}_annotations.json", files)
    asked = read_questions(questions_file, annotations_file)
    find_image = ImageIndex(files)
    questions = [Question(**vars(q), image=find_image(q.image_id)) for q in asked[:limit]]
    fingerprint = _fingerprint(files, (questions_file, annotations_file), [q.image for q in questions])
    return VQASet(tuple(questions), len(asked), fingerprint)


def load_captions(files: Files, limit: int | None = None) -> CaptionSet:
    """Read COCO captions; the first `limit` images in file order when given.

    Raises DataError for a missing file, a file of another shape, an image without captions, and a missing image.
    """
    captions_file = _need(files.captions, "captions", "captions_{split}.json", files)
    listed = read_references(captions_file)
    find_image = ImageIndex(files)
    images = [CaptionedImage(**vars(r), image=find_image(r.image_id)) for r in listed[:limit]]
    return CaptionSet(tuple(images), len(listed), _fingerprint(files, (captions_file,), [i.image for i in images]))


class ImageIndex:
    """An image's file by its id: `file_name` in the captions file, else `<12 digits>.*` or `*_<12 digits>.*`."""

    def __init__(self, files: Files) -> None:
        if files.images is None:
            raise DataError("no image folder: expected DATA/images/SPLIT, or give --images DIR")
        if not files.images.is_dir():
            raise DataError(f"--images {files.images} is not a folder")
        self._folder = files.images
        self._in_folder = {path.name for path in files.images.iterdir()}
        self._by_digits = names_by_digits(files.images)
        self._named: dict[Id, str] = {}
        self._listed_in = files.captions
        if files.captions is not None:
            self._named = {
                image["id"]: image["file_name"] for image in read_images(files.captions) if image.get("file_name")
            }

    def __call__(self, image_id: Id) -> Path:
        """The image's path. Raises DataError when there is no such file."""
        name = self._named.get(image_id)
        if name is not None:
            if name not in self._in_folder:
                raise DataError(f"image {image_id!r} is missing: {self._listed_in} names {self._folder / name}")
            return self._folder / name
        digits = digits_of(image_id)
        found = self._by_digits.get(digits)
        if found is None:
            raise DataError(
                f"image {image_id!r} is missing: no {digits}.jpg, {digits}.png or *_{digits}.jpg in {self._folder}"
            )
        return self._folder / found


def _need(path: Path | None, option: str, pattern: str, files: Files) -> Path:
    if path is None:
        name = pattern.replace("{split}", files.split or "SPLIT")
        raise DataError(f"no {option} file: expected {name} in the --data folder, or give --{option} FILE")
    return path


def _splits(data: Path) -> str:
    names = {path.stem.removeprefix("captions_") for path in data.glob("captions_*.json")}
    names |= {path.stem.removeprefix("vqa_").removesuffix("_questions") for path in data.glob("vqa_*_questions.json")}
    return ", ".join(sorted(names)) or "none"


def _fingerprint(files: Files, sources: Sequence[Path], images: Sequence[Path]) -> dict[str, Any]:
    """What the numbers stand on: hashes of the annotation files, and how many images of how many bytes."""
    distinct = sorted(set(images))
    names = [path.name for path in sources]  # not the folders: the same data elsewhere are the same data
    titles = [name if names.index(name) == i else f"{name} #{i + 1}" for i, name in enumerate(names)]
    return {
        "split": files.split,
        "files": {
            title: hashlib.sha256(path.read_bytes()).hexdigest() for title, path in zip(titles, sources, strict=True)
        },
        "images": len(distinct),
        "image_bytes": sum(path.stat().st_size for path in distinct),
    }
