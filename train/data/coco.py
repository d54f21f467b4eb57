"""Source kinds `coco_captions` and `vqa_v2`: annotation JSON beside a folder of images.

Both take a folder, `data: DIR` with `split` (images/{split}/, captions_{split}.json, vqa_{split}_questions.json,
vqa_{split}_annotations.json), or their files one by one; a file named takes the place of the folder's.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeVar

from nmm_serve.coco_images import digits_of, names_by_digits
from nmm_serve.errors import ConfigError, DataError
from nmm_serve.train.data.documents import Document, caption_document, checked_text, vqa_document
from nmm_serve.train.data.sources import Source, Visit

T = TypeVar("T")
IDS = ("id", "image_id", "question_id")
MAX_QUESTIONS = 8
"""Questions in one chat. Some images of VQA v2 have over a hundred, more than any context holds."""


class CocoCaptions(Source):
    """One document an image; an epoch takes one of its captions, and the next epoch the next.

    `captions: all` puts all of them into the document.
    """

    kind = "caption"

    def __init__(
        self,
        name: str,
        *,
        data: Path | None = None,
        split: str = "train",
        annotations: Path | None = None,
        images: Path | None = None,
        captions: Literal["one", "all"] = "one",
    ) -> None:
        self.name, self._which = name, captions
        annotations = _file(name, "annotations", annotations, data, f"captions_{split}.json")
        self._images = _folder(name, images, data, split)
        by_image: dict[Any, list[str]] = {}
        for record in _records(annotations, "annotations", ("image_id", "caption")):
            by_image.setdefault(record["image_id"], []).append(record["caption"])
        self._files: list[str] = []
        self._captions: list[list[str]] = []
        for image_id, file_name in _file_names(annotations).items():
            if image_id in by_image:
                self._files.append(file_name)
                self._captions.append(by_image.pop(image_id))
        if by_image:
            raise DataError(
                f"{annotations}: {len(by_image)} captioned images (first: {next(iter(by_image))!r}) are not in images[]"
            )

    def __len__(self) -> int:
        return len(self._files)

    def item_name(self, index: int) -> str:
        return f"{self.name}:{self._files[index]}"

    def document(self, index: int, visit: Visit) -> Document:
        name = self.item_name(index)
        image = self._images / checked_text(self._files[index], f"{name}: file_name")
        caption = visit.caption(self.texts(index), self._which, index)
        return caption_document(image, caption, objective=visit.objective, name=name)

    def texts(self, index: int) -> list[str]:
        return [checked_text(caption, f"{self.item_name(index)}: a caption") for caption in self._captions[index]]


class VQAv2(Source):
    """The questions of one image in one chat, up to `max_questions`, in a new order each epoch.

    `answer`: "majority" trains on multiple_choice_answer, "sampled" on one of the annotators' answers.
    """

    kind = "vqa"

    def __init__(
        self,
        name: str,
        *,
        data: Path | None = None,
        split: str = "train",
        questions: Path | None = None,
        annotations: Path | None = None,
        images: Path | None = None,
        captions: Path | None = None,
        answer: Literal["majority", "sampled"] = "majority",
        max_questions: int = MAX_QUESTIONS,
    ) -> None:
        if max_questions < 1:
            raise ConfigError(f"source {name!r}: max_questions {max_questions}; expected 1 or more")
        self.name = name
        questions = _file(name, "questions", questions, data, f"vqa_{split}_questions.json")
        annotations = _file(name, "annotations", annotations, data, f"vqa_{split}_annotations.json")
        if captions is None and data is not None and (data / f"captions_{split}.json").is_file():
            captions = data / f"captions_{split}.json"
        self._images = _folder(name, images, data, split)
        self._sampled, self._max_questions = answer == "sampled", max_questions
        answers: dict[Any, list[str]] = {}
        for record in _records(annotations, "annotations", ("question_id", "answers")):
            _put(answers, record["question_id"], _answers(record, annotations), f"{annotations}: question_id")
        asked: dict[Any, list[tuple[str, list[str]]]] = {}
        asked_by_id: dict[Any, tuple[Any, str]] = {}
        for record in _records(questions, "questions", ("question_id", "image_id", "question")):
            if record["question_id"] not in answers:
                raise DataError(
                    f"{questions}: question {record['question_id']!r} has no annotation in {annotations}; "
                    "give the two files of one split"
                )
            what = record["image_id"], record["question"]
            _put(asked_by_id, record["question_id"], what, f"{questions}: question_id")
            pair = record["question"], answers[record["question_id"]]
            asked.setdefault(record["image_id"], []).append(pair)
        names = _image_names(self._images, asked, captions)
        self._files = [names[image_id] for image_id in asked]
        self._asked = list(asked.values())
        # document -> (image, which slice of its questions)
        self._slices = [
            (image, start) for image, pairs in enumerate(self._asked) for start in range(0, len(pairs), max_questions)
        ]

    def __len__(self) -> int:
        return len(self._slices)

    def item_name(self, index: int) -> str:
        image, start = self._slices[index]
        return f"{self.name}:{self._files[image]}" + (f"#{start // self._max_questions}" if start else "")

    def document(self, index: int, visit: Visit) -> Document:
        image, start = self._slices[index]
        # one order an image and epoch, so that the slices of an image share no question
        rng = visit.rng(image)
        name, asked = self.item_name(index), self._asked[image]
        for question, answers in asked:
            if self._sampled and len(answers) == 1:
                raise DataError(f"{name}: question {question!r} has no answers to sample from; use answer: majority")
        pairs = [(q, rng.choice(a[1:]) if self._sampled else a[0]) for q, a in asked]
        rng.shuffle(pairs)
        chosen = pairs[start : start + self._max_questions]
        return vqa_document(self._images / checked_text(self._files[image], f"{name}: file_name"), chosen, name=name)


def _answers(record: dict[str, Any], path: Path) -> list[str]:
    """The majority answer, then the annotators' answers in order."""
    try:
        answers = [answer["answer"] for answer in record["answers"]]
        majority = record.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
    except (TypeError, KeyError, IndexError):
        raise DataError(
            f"{path}: question_id {record['question_id']!r} has answers {record['answers']!r}; "
            "expected a list like [{'answer': 'yes'}]"
        ) from None
    return [majority, *answers]


def _image_names(folder: Path, image_ids: dict[Any, Any], captions: Path | None) -> dict[Any, str]:
    """File names by image id: `file_name` of the captions file, else the file whose name ends in the 12-digit id.

    Raises DataError when most ids have no file: then the folder is another one. Single files that are missing are
    named and counted when they are read.
    """
    if captions is not None:
        listed = _file_names(captions)
        names = {image_id: listed.get(image_id) for image_id in image_ids}
    else:
        found = names_by_digits(folder)
        names = {image_id: found.get(digits_of(image_id)) for image_id in image_ids}
    absent = [image_id for image_id, file_name in names.items() if file_name is None]
    if 2 * len(absent) > len(names):
        where = f"listed in {captions}" if captions else f"found in {folder} as *{digits_of(absent[0])}.jpg or .png"
        raise DataError(f"{len(absent)} of {len(names)} images of the questions are not {where} (first: {absent[0]!r})")
    return {image_id: file_name or f"{digits_of(image_id)}.jpg" for image_id, file_name in names.items()}


def _file_names(path: Path) -> dict[Any, str]:
    """`file_name` by image id, in the order of the file."""
    names: dict[Any, str] = {}
    for record in _records(path, "images", ("id", "file_name")):
        _put(names, record["id"], record["file_name"], f"{path}: image id")
    return names


def _put(table: dict[Any, T], key: Any, value: T, what: str) -> None:
    """Raises DataError when the key has another value: which of the two belongs to it, nobody can tell."""
    if (first := table.setdefault(key, value)) != value:
        raise DataError(
            f"{what} {key!r} comes twice, with {first!r} and {value!r}; were files joined? Give each an id of its own"
        )


def _file(name: str, option: str, path: Path | None, data: Path | None, in_folder: str) -> Path:
    if path is None and data is None:
        raise ConfigError(f"source {name!r}: give data (a folder with {in_folder}) or {option} (a file)")
    path = path or data / in_folder  # type: ignore[operator]
    if not path.is_file():
        raise DataError(f"source {name!r}: {option} file {path} does not exist")
    return path


def _folder(name: str, images: Path | None, data: Path | None, split: str) -> Path:
    if images is None and data is None:
        raise ConfigError(f"source {name!r}: give data (a folder with images/{split}) or images (a folder)")
    images = images or data / "images" / split  # type: ignore[operator]
    if not images.is_dir():
        raise DataError(f"source {name!r}: image folder {images} does not exist")
    return images


def _records(path: Path, key: str, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """The list under `key`. Raises DataError for another shape, and for a record without one of `fields` or with an id
    that is none."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON, or too deeply nested") from None
    records = document.get(key) if isinstance(document, dict) else None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected an object with a list {key!r}")
    for place, record in enumerate(records):
        absent = [f for f in fields if f not in record] if isinstance(record, dict) else fields
        if absent:
            raise DataError(f"{path}: {key}[{place}] lacks {', '.join(absent)}")
        for field in fields:
            if field in IDS and (isinstance(record[field], bool) or not isinstance(record[field], int | float | str)):
                raise DataError(f"{path}: {key}[{place}] has {field} {record[field]!r}; expected a number or text")
    return records
