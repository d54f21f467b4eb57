"""One example of the built-in data: a picture, five captions and about six questions, by index."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from nmm_serve.train.data.builtin.captions import captions
from nmm_serve.train.data.builtin.questions import Question, questions
from nmm_serve.train.data.builtin.render import render
from nmm_serve.train.data.builtin.scene import SPLITS, STANDARD, Difficulty, Scene, sample_scene, stream
from nmm_serve.train.data.builtin.words import SYNONYMS

ANNOTATORS = 10
# How many of the ten use the second word of an answer that has two.
SECOND_WORD = 3
FIRST_IMAGE_ID = {split: (i + 1) * 10**8 for i, split in enumerate(SPLITS)}


@dataclass(frozen=True, slots=True)
class Example:
    """`questions`: dicts with the fields of a VQA v2 question and annotation together (question, question_id, image_id,
    question_type, answer_type, answers, multiple_choice_answer) and `family`: recognition, counting, relation or
    comparison."""

    image_id: int
    image: Image.Image
    captions: list[str]
    questions: list[dict[str, Any]]
    scene: Scene


def image_id(split: str, index: int) -> int:
    """Of COCO's kind, different for every split and index."""
    return FIRST_IMAGE_ID[split] + index


def builtin_images(split: str, index: int, seed: int = 0, difficulty: Difficulty = STANDARD) -> Example:
    """Example `index` of `split`, at the cost of one example: there is no end and no order.

    The same arguments give the same pixels and words. No picture, layout or handwritten digit of one
    split is in another, whatever the seeds. Raises DataError for an unknown split or a negative index.
    """
    rng = stream("image", split, index, seed)
    scene, count = sample_scene(rng, split, difficulty)
    number = image_id(split, index)
    asked = questions(scene, count, rng)
    return Example(
        image_id=number,
        image=render(scene),
        captions=captions(scene, rng),
        questions=[_vqa(question, number, k) for k, question in enumerate(asked)],
        scene=scene,
    )


def question_type(question: str) -> str:
    """The first two words, in VQA v2's manner: "how many", "what color", "is the"."""
    return " ".join(question.lower().split()[:2])


def _vqa(question: Question, number: int, k: int) -> dict[str, Any]:
    words = [question.answer] * ANNOTATORS
    if question.answer in SYNONYMS:
        words[-SECOND_WORD:] = [SYNONYMS[question.answer]] * SECOND_WORD
    return {
        "image_id": number,
        "question_id": number * 1000 + k,
        "question": question.text,
        "question_type": question_type(question.text),
        "answer_type": question.answer_type,
        "answers": [
            {"answer": word, "answer_confidence": "yes", "answer_id": i} for i, word in enumerate(words, start=1)
        ],
        "multiple_choice_answer": question.answer,
        "family": question.family,
    }
