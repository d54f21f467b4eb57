"""The official VQA accuracy: known cases, its own code's quirks, and baselines against brute force."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmm_serve.errors import DataError
from nmm_serve.evals import vqa
from nmm_serve.evals.datasets import Question


def ten(*groups: tuple[int, str]) -> list[str]:
    """Ten answers: the given groups, filled up with answers that match nothing."""
    answers = [text for count, text in groups for _ in range(count)]
    return answers + [f"filler {i} xyz" for i in range(10 - len(answers))]


TRICKY = [
    (ten((10, "yes")), "Yes", 0.0),
    (ten((9, "yes"), (1, "Yes")), "YES", 1.0),
    (ten((3, "1,000-2,000")), "10002000", 0.9),
    (ten((3, "1,000-2,000")), "1000 2000", 0.0),
    (ten((4, "t-shirt")), "t shirt", 1.0),
    (ten((4, "t-shirt")), "tshirt", 0.0),
    (ten((3, "3.")), "three", 0.9),
    (ten((4, "mother-in -law")), "motherin law", 1.0),
    (ten((3, "x")), "x" + 32 * ".", 0.9),
    (ten((3, "x")), "x" + 33 * ".", 0.0),
    (ten((3, "Im happy")), "I'm happy", 0.0),
    (ten((2, "0"), (3, "none")), "zero", 1.0),
    (ten((4, "a"), (3, "the")), "", 1.0),
]


@pytest.mark.parametrize(("answers", "prediction", "expected"), TRICKY)
def test_tricky_cases(answers, prediction, expected):
    assert vqa.accuracy(answers, prediction) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_score_by_number_of_matches(matches, expected):
    assert vqa.accuracy(ten((matches, "dog")), "dog") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7.30", "7.30"),
        ("a.m.", "am"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("eleven", "eleven"),
        ("The Ten", "10"),
        ("what?", "what"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("its", "its"),
        ("rock&roll", "rock&roll"),
    ],
)
def test_normalise(text, expected):
    assert vqa.normalise(text) == expected


def question(
    question_id: int, answers: list[str], *, image: int = 1, text: str = "q?", kind: str = "is it"
) -> Question:
    return Question(
        question_id=question_id,
        image_id=image,
        text=text,
        image=Path("none.png"),
        answers=tuple(answers),
        question_type=kind,
        answer_type="other",
    )


def test_groups_and_rounding():
    questions = [
        question(1, ten((1, "a b")), kind="k1"),
        question(2, ten((2, "a b")), kind="k1"),
        question(3, ten((10, "c")), kind="k2"),
    ]
    scored = vqa.score(questions, {1: "a b", 2: "a b", 3: "c"})
    assert scored.official() == {
        "overall": 63.33,
        "per_question_type": {"k1": 45.0, "k2": 100.0},
        "per_answer_type": {"other": 63.33},
    }


def test_scoring_does_not_change_the_answers():
    answers = ten((3, "The  Dog."), (2, "dont"))
    before = list(answers)
    first = vqa.accuracy(answers, "dog")
    assert answers == before
    assert vqa.accuracy(answers, "dog") == first


def test_exact_match_is_to_the_letter():
    answers = ten((6, "dog"), (4, "Dog"))
    assert vqa.exact_match(answers, " dog\n")
    assert not vqa.exact_match(answers, "Dog")


@pytest.mark.parametrize("predictions", [{}, {1: "x", 2: "y"}, {"1": "x"}])
def test_predictions_must_match_the_questions(predictions):
    with pytest.raises(DataError, match="do not match 1 questions"):
        vqa.score([question(1, ten())], predictions)


def test_interval_is_none_with_one_image():
    scored = vqa.score([question(1, ten((10, "x")))], {1: "x"})
    assert scored.interval() is None


words = st.sampled_from(["yes", "Yes", "no", "3", "three", "the dog", "dog", "t-shirt", "t shirt", "none"])


@given(st.lists(st.tuples(st.lists(words, min_size=10, max_size=10), st.sampled_from("ab")), min_size=1, max_size=6))
def test_best_constant_is_best(sets):
    """Against trying every answer that occurs, which the quick way must equal."""
    questions = [question(i, answers, kind=kind) for i, (answers, kind) in enumerate(sets)]
    for kind, (_, values) in vqa.best_constant(questions).items():
        members = [q for q in questions if q.question_type == kind]
        candidates = set(itertools.chain.from_iterable(q.answers for q in members))
        best = max(sum(vqa.accuracy(q.answers, c) for q in members) for c in candidates)
        assert sum(values) == pytest.approx(best, abs=1e-9)


def test_question_only_reads_the_text_but_not_the_answers_it_is_scored_on():
    texts = [("a?", "x"), ("b?", "y")] * 5
    questions = [question(i, [answer] * 10, text=text, image=i) for i, (text, answer) in enumerate(texts)]
    found = vqa.baselines(questions)
    assert found["best_constant"]["overall"] == 50.0
    assert found["question_only"]["overall"] == 100.0
    once = [question(i, [f"answer {i}"] * 10, text=f"question {i}?", image=i) for i in range(10)]
    assert vqa.baselines(once)["question_only"]["overall"] == 0.0, "texts that occur once give nothing away"


@given(st.lists(st.text(max_size=12), min_size=10, max_size=10), st.text(max_size=12))
def test_any_text_gives_one_of_the_possible_scores(answers, prediction):
    allowed = (0, 0.3, 0.6, 0.9, 1)
    assert min(abs(vqa.accuracy(answers, prediction) - value) for value in allowed) < 1e-9
