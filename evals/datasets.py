"""Read evaluation sets: COCO captions and VQA v2, from one folder or from files named one by one.

A folder holds `images/{split}/`, `captions_{split}.json`, `vqa_{split}_questions.json`, `vqa_{split}_annotations.json`.
Everything is checked when it is read: a file that does not fit together is a DataError here, not a wrong score later.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError

Id = int | str


@dataclass(frozen=True)
class Files:
    """Where an evaluation set lies. `captions` also tells the image's file name for each image id."""

    images: Path | None = None
    captions: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class Question:
    """One VQA v2 question with its answers (ten in VQA v2), in the annotators' order."""

    question_id: Id
    image_id: Id
    text: str
    image: Path
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


@dataclass(frozen=True)
class CaptionedImage:
    """One image with its reference captions."""

    image_id: Id
    image: Path
    references: tuple[str, ...]


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
    asked = _records(questions_file, "questions", ("question_id", "image_id", "question"))
    annotated = _by_id(
        _records(
            annotations_file, "annotations", ("question_id", "image_id", "answers", "question_type", "answer_type")
        ),
        "question_id",
        annotations_file,
    )
    _by_id(asked, "question_id", questions_file)
    missing = [q["question_id"] for q in asked if q["question_id"] not in annotated]
    if missing or len(asked) != len(annotated):
        detail = f"question_id {missing[0]!r} has no annotation" if missing else "some annotations have no question"
        raise DataError(
            f"{questions_file} has {len(asked)} questions and {annotations_file} has {len(annotated)} annotations, and "
            f"they do not match ({detail}); give the two files of one split"
        )
    find_image = ImageIndex(files)
    questions = []
    for q in _first(asked, limit):
        a = annotated[q["question_id"]]
        if a["image_id"] != q["image_id"]:
            raise DataError(
                f"question_id {q['question_id']!r} is about image {q['image_id']!r} in {questions_file} but about "
                f"{a['image_id']!r} in {annotations_file}"
            )
        questions.append(
            Question(
                question_id=q["question_id"],
                image_id=q["image_id"],
                text=_text(q["question"], "question", q["question_id"], questions_file),
                image=find_image(q["image_id"]),
                answers=_answers(a, annotations_file),
                question_type=str(a["question_type"]),
                answer_type=str(a["answer_type"]),
            )
        )
    fingerprint = _fingerprint(files, (questions_file, annotations_file), [q.image for q in questions])
    return VQASet(tuple(questions), len(asked), fingerprint)


def load_captions(files: Files, limit: int | None = None) -> CaptionSet:
    """Read COCO captions; the first `limit` images in file order when given.

    Raises DataError for a missing file, a file of another shape, an image without captions, and a missing image.
    """
    captions_file = _need(files.captions, "captions", "captions_{split}.json", files)
    listed = _records(captions_file, "images", ("id",))
    _by_id(listed, "id", captions_file)
    references: dict[Id, list[str]] = {image["id"]: [] for image in listed}
    for annotation in _records(captions_file, "annotations", ("image_id", "caption")):
        image_id = annotation["image_id"]
        if image_id not in references:
            raise DataError(f"{captions_file}: a caption belongs to image {image_id!r}, which images[] does not list")
        references[image_id].append(_text(annotation["caption"], "caption", image_id, captions_file))
    without = [image_id for image_id, captions in references.items() if not captions]
    if without:
        raise DataError(
            f"{captions_file}: {len(without)} images have no caption (first: {without[0]!r}); "
            "captions cannot be scored without references"
        )
    find_image = ImageIndex(files)
    images = [
        CaptionedImage(image["id"], find_image(image["id"]), tuple(references[image["id"]]))
        for image in _first(listed, limit)
    ]
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
        self._by_digits: dict[str, str] = {}
        for name in sorted(self._in_folder):
            digits = Path(name).stem.rpartition("_")[2]
            if len(digits) == 12 and digits.isdigit():
                self._by_digits.setdefault(digits, name)
        self._named: dict[Id, str] = {}
        self._listed_in = files.captions
        if files.captions is not None:
            self._named = {
                image["id"]: image["file_name"]
                for image in _records(files.captions, "images", ("id",))
                if image.get("file_name")
            }

    def __call__(self, image_id: Id) -> Path:
        """The image's path. Raises DataError when there is no such file."""
        name = self._named.get(image_id)
        if name is not None:
            if name not in self._in_folder:
                raise DataError(f"image {image_id!r} is missing: {self._listed_in} names {self._folder / name}")
            return self._folder / name
        digits = f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)
        found = self._by_digits.get(digits)
        if found is None:
            raise DataError(
                f"image {image_id!r} is missing: no {digits}.jpg, {digits}.png or *_{digits}.jpg in {self._folder}"
            )
        return self._folder / found


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises DataError naming the file and the place of the fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; give a JSON file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); expected a JSON file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None


def _records(path: Path, key: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        seen = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise DataError(f"{path}: expected an object with a list {key!r}, found {seen}")
    if not document[key]:
        raise DataError(f"{path}: {key!r} is empty; nothing to evaluate")
    for position, record in enumerate(document[key]):
        absent = [f for f in fields if f not in record] if isinstance(record, dict) else list(fields)
        if absent:
            raise DataError(f"{path}: {key}[{position}] lacks {', '.join(absent)}")
        for field in fields:
            value = record[field]
            if field.endswith("id") and (isinstance(value, bool) or not isinstance(value, int | str)):
                raise DataError(f"{path}: {key}[{position}].{field} is {value!r}; expected an integer or a string")
    return document[key]


def _by_id(records: Iterable[dict[str, Any]], field: str, path: Path) -> dict[Id, dict[str, Any]]:
    table: dict[Id, dict[str, Any]] = {}
    for record in records:
        if record[field] in table:
            raise DataError(f"{path}: {field} {record[field]!r} occurs twice; ids must be unique")
        table[record[field]] = record
    return table


def _answers(annotation: dict[str, Any], path: Path) -> tuple[str, ...]:
    answers = annotation["answers"]
    where = f"{path}: question_id {annotation['question_id']!r}"
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where} has no list of answers")
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("answer"), str):
            raise DataError(f"{where}: expected answers like {{'answer': 'yes'}}, found {answer!r}")
    return tuple(answer["answer"] for answer in answers)


def _text(value: Any, what: str, of: Id, path: Path) -> str:
    if not isinstance(value, str):
        raise DataError(f"{path}: the {what} of {of!r} is {value!r}; expected text")
    return value


def _first(records: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    return records if limit is None else records[:limit]


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
    return {
        "split": files.split,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
        "images": len(distinct),
        "image_bytes": sum(path.stat().st_size for path in distinct),
    }
