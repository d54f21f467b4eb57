"""Read the official file formats: VQA v2 questions, annotations and results, COCO captions and caption results.

Everything is checked when it is read: a file that does not fit together is a DataError here, not a wrong score later.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmm_serve.errors import DataError

Id = int | str

_QUESTION_FIELDS = ("question_id", "image_id", "question")
_ANNOTATION_FIELDS = ("question_id", "image_id", "answers", "question_type", "answer_type")


@dataclass(frozen=True, kw_only=True)
class AnsweredQuestion:
    """One VQA v2 question with its answers (ten in VQA v2), in the annotators' order. All that scoring needs."""

    question_id: Id
    image_id: Id
    text: str
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


@dataclass(frozen=True, kw_only=True)
class References:
    """The reference captions of one image. All that scoring needs."""

    image_id: Id
    references: tuple[str, ...]


def read_questions(questions_file: Path, annotations_file: Path) -> list[AnsweredQuestion]:
    """VQA v2 questions with their answers, in the order of the annotations: the one in which the official code sums.

    Raises DataError for a missing file, a file of another shape, and ids that repeat or do not match.
    """
    asked = _by_id(_records(questions_file, "questions", _QUESTION_FIELDS), "question_id", questions_file)
    annotated = _by_id(_records(annotations_file, "annotations", _ANNOTATION_FIELDS), "question_id", annotations_file)
    unmatched = [i for i in asked if i not in annotated] + [i for i in annotated if i not in asked]
    if unmatched:
        lacking = "annotation" if unmatched[0] in asked else "question"
        raise DataError(
            f"{questions_file} has {len(asked)} questions and {annotations_file} has {len(annotated)} annotations, and "
            f"they do not match (question_id {unmatched[0]!r} has no {lacking}); give the two files of one split"
        )
    questions = []
    for question_id, a in annotated.items():
        q = asked[question_id]
        if a["image_id"] != q["image_id"]:
            raise DataError(
                f"question_id {question_id!r} is about image {q['image_id']!r} in {questions_file} but about "
                f"{a['image_id']!r} in {annotations_file}"
            )
        questions.append(
            AnsweredQuestion(
                question_id=question_id,
                image_id=q["image_id"],
                text=_text(q["question"], "question", question_id, questions_file),
                answers=_answers(a, annotations_file),
                question_type=str(a["question_type"]),
                answer_type=str(a["answer_type"]),
            )
        )
    return questions


def read_references(captions_file: Path) -> list[References]:
    """COCO's reference captions, in the order of its images.

    Raises DataError for a missing file, a file of another shape, and an image without captions.
    """
    references: dict[Id, list[str]] = {image["id"]: [] for image in read_images(captions_file)}
    for annotation in _records(captions_file, "annotations", ("image_id", "caption")):
        image_id = annotation["image_id"]
        if image_id not in references:
            raise DataError(f"{captions_file}: a caption belongs to image {image_id!r}, which images[] does not list")
        references[image_id].append(_caption(annotation["caption"], image_id, captions_file))
    without = [image_id for image_id, captions in references.items() if not captions]
    if without:
        raise DataError(
            f"{captions_file}: {len(without)} images have no caption (first: {without[0]!r}); "
            "captions cannot be scored without references"
        )
    return [References(image_id=image_id, references=tuple(captions)) for image_id, captions in references.items()]


def read_images(captions_file: Path) -> list[dict[str, Any]]:
    """The `images` of a COCO captions file. Raises DataError like `read_references`."""
    images = _records(captions_file, "images", ("id",))
    _by_id(images, "id", captions_file)
    return images


def read_answers(path: Path, questions: Sequence[AnsweredQuestion]) -> dict[Id, str]:
    """Official VQA results, `[{"question_id": 1, "answer": "yes"}, ...]`, by question.

    Raises DataError unless there is exactly one answer for each of the questions.
    """
    results = _results(path, "question_id", "answer", [q.question_id for q in questions])
    return {question_id: _text(value, "answer", question_id, path) for question_id, value in results.items()}


def read_captions(path: Path, images: Sequence[References]) -> dict[Id, str]:
    """Official caption results, `[{"image_id": 1, "caption": "a dog"}, ...]`, by image.

    Raises DataError unless there is exactly one caption for each of the images.
    """
    results = _results(path, "image_id", "caption", [i.image_id for i in images])
    return {image_id: _caption(value, image_id, path) for image_id, value in results.items()}


def _results(path: Path, id_field: str, value_field: str, annotated: Sequence[Id]) -> dict[Id, Any]:
    document = read_json(path)
    if not isinstance(document, list):
        raise DataError(
            f'{path}: expected a list of results like {{"{id_field}": 1, "{value_field}": "..."}}, '
            f"found {type(document).__name__}"
        )
    _check(document, path, "results", (id_field, value_field))
    values = {i: record[value_field] for i, record in _by_id(document, id_field, path).items()}
    known = frozenset(annotated)
    missing = [i for i in annotated if i not in values]
    unknown = [i for i in values if i not in known]
    if missing or unknown:
        faults = []
        if missing:
            faults.append(f"{len(missing)} of {len(annotated)} have no {value_field} (first: {missing[0]!r})")
        if unknown:
            faults.append(f"{len(unknown)} are not annotated (first: {unknown[0]!r})")
        raise DataError(
            f"{path} does not match the annotated {id_field}s: {', '.join(faults)}; give one result for each"
        )
    return values


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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{path} is not JSON that can be read: {error}") from None


def _records(path: Path, key: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        seen = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise DataError(f"{path}: expected an object with a list {key!r}, found {seen}")
    if not document[key]:
        raise DataError(f"{path}: {key!r} is empty; nothing to evaluate")
    _check(document[key], path, key, fields)
    return document[key]


def _check(records: Sequence[Any], path: Path, key: str, fields: Sequence[str]) -> None:
    """Every record is an object with all the fields, and ids are integers or strings."""
    for position, record in enumerate(records):
        absent = [f for f in fields if f not in record] if isinstance(record, dict) else list(fields)
        if absent:
            raise DataError(f"{path}: {key}[{position}] lacks {', '.join(absent)}")
        for field in fields:
            value = record[field]
            if field.endswith("id") and (isinstance(value, bool) or not isinstance(value, int | str)):
                raise DataError(f"{path}: {key}[{position}].{field} is {value!r}; expected an integer or a string")


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


def _caption(value: Any, of: Id, path: Path) -> str:
    caption = _text(value, "caption", of, path)
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: the caption of {of!r} holds half a surrogate pair (character {error.start}), which is no text"
        ) from None
    return caption
