"""Every quirk of the official VQA accuracy, pinned: golden scores of the official code, and what holds for any text.

The scores were printed by GT-Vision-Lab/VQA's `vqaEval.py` at a013f00, brought to Python 3 with 2to3. An entry is:
groups of equal answers, filled up to ten with answers that match nothing; the prediction; the official percent.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmm_serve.evals import vqa

GOLDEN = [
    ([(4, "no.1")], "no.1", 100.0),
    ([(4, "no.1")], "no1", 0.0),
    ([(4, "3.")], "3", 100.0),
    ([(4, ".5")], ".5", 100.0),
    ([(4, ".5")], "5", 0.0),
    ([(4, "1.5.")], "1.5", 100.0),
    ([(4, "a.b")], "ab", 100.0),
    ([(4, "1,5 x;y")], "15 xy", 100.0),
    ([(4, "x;y")], "x y", 100.0),
    ([(4, "x; y")], "x y", 100.0),
    ([(4, "x ;y")], "x y", 100.0),
    ([(4, "x ;y;z")], "x yz", 100.0),
    ([(4, "x,y")], "x y", 100.0),
    ([(4, "1,000")], "1000", 100.0),
    ([(4, "1, 000")], "1 000", 100.0),
    ([(4, "1,000 a-b")], "1000 ab", 100.0),
    ([(4, "what's up")], "whats up", 100.0),
    ([(4, "what's up")], "what's up", 100.0),
    ([(4, "Im")], "I'm", 0.0),
    ([(4, "Im")], "im", 100.0),
    ([(4, "Id've")], "I'd've", 0.0),
    ([(4, "somebody'd")], "somebodyd", 100.0),
    ([(4, "somebodyd")], "somebody'd", 100.0),
    ([(4, "its")], "it's", 0.0),
    ([(4, "shes")], "she's", 0.0),
    ([(4, "she's")], "shes", 0.0),
    ([(4, "lets")], "let's", 0.0),
    ([(4, "let's")], "let's", 100.0),
    ([(4, "yall'll")], "y'all'll", 100.0),
    ([(4, "ow's'at")], "'ow's'at", 100.0),
    ([(4, "none")], "0", 100.0),
    ([(4, "zero")], "none", 100.0),
    ([(4, "ten")], "10", 100.0),
    ([(4, "eleven")], "11", 0.0),
    ([(4, "one one")], "1 1", 100.0),
    ([(4, "twenty-one")], "20 1", 0.0),
    ([(4, "twenty-one")], "twenty 1", 100.0),
    ([(4, "the one")], "1", 100.0),
    ([(4, "A")], "", 100.0),
    ([(4, "an a the")], "the", 100.0),
    ([(4, "thea")], "thea", 100.0),
    ([(10, "Yes")], "yes", 0.0),
    ([(10, "Yes")], "Yes", 100.0),
    ([(10, "the dog")], "dog", 0.0),
    ([(5, " yes"), (5, "yes\n")], "yes", 100.0),
    ([(5, "yes"), (5, "yes.")], "Yes!", 100.0),
    ([(10, "")], "", 100.0),
    ([(9, ""), (1, "the")], "a", 100.0),
    ([(4, "a\tb")], "a b", 100.0),
    ([(4, "a\rb")], "a b", 100.0),
    ([(4, "a\xa0b")], "a b", 100.0),
    ([(4, "a\u200bb")], "ab", 0.0),
    ([(4, "50%")], "50", 0.0),
    ([(4, "$5")], "5", 0.0),
    ([(4, "rock & roll")], "rock roll", 0.0),
    ([(4, "#1")], "1", 0.0),
    ([(4, "10:30")], "10 30", 0.0),
    ([(4, "it’s")], "it's", 0.0),
    ([(4, "ＡＢＣ")], "ａｂｃ", 100.0),
    ([(4, "İ")], "i̇", 100.0),
    ([(4, "ß")], "ss", 0.0),
    ([(4, "١,٢")], "١٢", 100.0),
    ([(4, "5.٢")], "5.٢", 100.0),
    ([(4, "x" + 33 * ".")], "x" + 33 * ".", 100.0),
    ([(4, "x" + 33 * ".")], "x.", 0.0),
    ([(4, "x" + 64 * ".")], "x" + 32 * ".", 0.0),
    ([(4, "\\ n")], "n", 100.0),
    ([(4, "a_b")], "a b", 100.0),
    ([(4, "`x`")], "x", 100.0),
    ([(4, "a<b>c")], "a b c", 100.0),
    ([(4, "(x)")], "x", 100.0),
    ([(4, "[x] y")], "x y", 100.0),
    ([(4, "1+1=2")], "1 1 2", 100.0),
    ([(4, "a+b=c d")], "a b c d", 100.0),
    ([(3, "x"), (3, "y"), (4, "z")], "y", 90.0),
    ([(1, "x")], "x", 30.0),
    ([(2, "x")], "x", 60.0),
    ([(3, "x")], "x", 90.0),
    ([(4, "x")], "x", 100.0),
    ([(9, "x")], "x", 100.0),
]


def ten(groups):
    answers = [text for count, text in groups for _ in range(count)]
    return answers + [f"filler {i} xyz" for i in range(10 - len(answers))]


@pytest.mark.parametrize(("groups", "prediction", "expected"), GOLDEN)
def test_golden(groups, prediction, expected):
    assert vqa.percent([vqa.accuracy(ten(groups), prediction)]) == expected


hostile = st.text(st.sampled_from("aAbB 015.,,;/-_'!?()`\\\n\t\r\u00a0İ٢"), max_size=14) | st.text(max_size=8)


@given(hostile, hostile)
def test_unanimous_answers_are_compared_as_they_stand(answer, prediction):
    assert vqa.accuracy([answer] * 10, prediction) == (vqa.strip(answer) == vqa.strip(prediction))


@given(st.lists(hostile, min_size=2, max_size=10), hostile, st.integers())
def test_the_order_of_the_answers_does_not_matter(answers, prediction, seed):
    turned = random.Random(seed).sample(answers, len(answers))
    assert vqa.accuracy(turned, prediction) == pytest.approx(vqa.accuracy(answers, prediction), abs=1e-12)


@given(st.lists(hostile, min_size=10, max_size=10), hostile)
def test_only_the_number_of_matches_counts(answers, prediction):
    stripped = {vqa.strip(answer) for answer in answers}
    form = vqa.normalise if len(stripped) > 1 else str
    matches = sum(form(vqa.strip(answer)) == form(vqa.strip(prediction)) for answer in answers)
    expected = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10 if matches else 0
    assert vqa.accuracy(answers, prediction) == pytest.approx(expected, abs=1e-12)


@given(hostile)
def test_a_number_with_a_comma_deletes_every_mark(text):
    marks = set(';/[]"{}()=+\\_-><@`,?!')
    assert not marks & set(vqa.normalise("1,000 " + text))
    assert vqa.normalise("1,000 " + text) == vqa.normalise("1000 " + "".join(c for c in text if c not in marks))


@given(st.integers(0, 80))
def test_only_the_first_32_periods_go(count):
    assert vqa.normalise("x" + "." * count) == "x" + "." * max(0, count - 32)


@pytest.mark.parametrize(
    ("answers", "prediction", "right"),
    [
        (["20"], "21", True),
        (["20"], "21.1", False),
        (["-20"], "-19", True),
        (["20%"], "0.2", True),
        (["20%"], "20", False),
        (["0"], "0.0", False),  # an answer of 0 is compared as text
        (["0"], "0", True),
        (["Dog"], " dog\n", True),
        (["dog"], "dogs", False),
        (["5", "5", "7"], "7", False),
        (["nan"], "NaN", True),
        (["inf"], "1e999", False),
        (["five"], "5", False),
        (["5%%"], "5", False),
        (["1e2"], "100", True),
    ],
)
def test_relaxed_match(answers, prediction, right):
    assert vqa.relaxed_match(answers, prediction) is right


@given(st.lists(hostile, min_size=1, max_size=10), hostile)
def test_an_exact_match_is_a_relaxed_one(answers, prediction):
    assert vqa.relaxed_match(answers, prediction) >= vqa.exact_match(answers, prediction)
