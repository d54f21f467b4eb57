"""Every question of the built-in data is answered again from the scene by brute force, from its wording alone."""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmm_serve.train.data import builtin
from nmm_serve.train.data.builtin import words
from nmm_serve.train.data.builtin.render import RGB
from nmm_serve.train.data.builtin.words import CELLS, COLORS, KINDS, SHAPES, SIZES

SPLITS = ("train", "val", "test")
CLEARLY_APART = 8  # pixels
SYNONYMS = {"gray": "grey", "large": "big", "digit": "number", "nothing": "none"}


# ---- an independent solver: words -> answer


def fits(o, name):
    """Whether an object is what "small red circle" (or "red objects", "7") says."""
    for word in name.split():
        single = {"crosses": "cross"}.get(word, word if word in KINDS else word.removesuffix("s"))
        if single != "object" and single not in (o.kind, o.color, o.size, str(o.digit)):
            return False
    return True


def the(objects, name):
    found = [o for o in objects if fits(o, name)]
    assert len(found) == 1, f"'the {name}' is {len(found)} objects"
    return found[0]


def number_of(objects, name):
    return sum(fits(o, name) for o in objects)


def ahead(anchor, o, word):
    """Pixels from `anchor` to `o` in the direction of `word`."""
    return {
        "to the left of": anchor.x - o.x,
        "to the right of": o.x - anchor.x,
        "above": anchor.y - o.y,
        "below": o.y - anchor.y,
    }[word]


def only_one_beside(objects, word, name):
    anchor = the(objects, name)
    found = [o for o in objects if ahead(anchor, o, word) > 0]
    assert len(found) == 1
    assert ahead(anchor, found[0], word) >= CLEARLY_APART
    return found[0]


def is_beside(objects, first, word, second):
    distance = ahead(the(objects, second), the(objects, first), word)
    assert abs(distance) >= CLEARLY_APART
    return distance > 0


def at(objects, cell):
    found = [o for o in objects if o.cell == cell]
    return found[0] if found else None


def same(objects, first, second, trait):
    one, other = the(objects, first), the(objects, second)
    assert one is not other
    return getattr(one, trait) == getattr(other, trait)


def larger(objects, word, first, second):
    one, other = the(objects, first), the(objects, second)
    assert {one.size, other.size} == set(SIZES)
    wanted = "large" if word == "larger" else "small"
    return (first if one.size == wanted else second).removesuffix(" object")


def digit_sum(objects):
    written = [o.digit for o in objects if o.kind == "digit"]
    assert len(written) == 2
    return sum(written)


def shape_of(o):
    assert o.kind in SHAPES
    return o.kind


def yes(truth):
    return "yes" if truth else "no"


SIDE = "(to the left of|to the right of|above|below)"
NAME = r"((?:\w+ ){0,2}\w+)"
CELL = f"({'|'.join(CELLS)})"
# Tried in order: the first pattern that is the whole question solves it.
SOLVERS: dict[str, tuple[str, Callable]] = {
    rf"How many {NAME} are (?:there|in the picture)\?": ("counting", lambda s, n: number_of(s, n)),
    r"What is the sum of the two digits\?": ("comparison", digit_sum),
    rf"What color is the object in the {CELL}\?": ("recognition", lambda s, c: at(s, c).color),
    rf"What color is the object {SIDE} the {NAME}\?": ("relation", lambda s, w, n: only_one_beside(s, w, n).color),
    rf"What color is the {NAME}\?": ("recognition", lambda s, n: the(s, n).color),
    rf"What shape is the {NAME}\?": ("recognition", lambda s, n: shape_of(the(s, n))),
    rf"Is the {NAME} large or small\?": ("recognition", lambda s, n: the(s, n).size),
    r"What digit is in the picture\?": ("recognition", lambda s: the(s, "digit").digit),
    rf"Which number is the {NAME}\?": ("recognition", lambda s, n: the(s, n).digit),
    rf"Where is the {NAME}\?": ("recognition", lambda s, n: the(s, n).cell),
    rf"What is in the {CELL}\?": ("recognition", lambda s, c: at(s, c).kind if at(s, c) else "nothing"),
    rf"Is there an? {NAME} in the picture\?": ("recognition", lambda s, n: yes(number_of(s, n))),
    rf"Is the {NAME} {SIDE} the {NAME}\?": ("relation", lambda s, a, w, b: yes(is_beside(s, a, w, b))),
    rf"What is {SIDE} the {NAME}\?": ("relation", lambda s, w, n: only_one_beside(s, w, n).kind),
    rf"Are there more {NAME} than {NAME}\?": (
        "comparison", lambda s, a, b: yes(number_of(s, a) > number_of(s, b))),
    rf"Which is (larger|smaller), the {NAME} or the {NAME}\?": ("comparison", larger),
    rf"Are the {NAME} and the {NAME} the same color\?": ("comparison", lambda s, a, b: yes(same(s, a, b, "color"))),
    rf"Are the {NAME} and the {NAME} the same shape\?": ("comparison", lambda s, a, b: yes(same(s, a, b, "kind"))),
    rf"Is the {NAME} greater than the {NAME}\?": (
        "comparison", lambda s, a, b: yes(the(s, a).digit > the(s, b).digit)),
    rf"Is the {NAME} greater than (\d)\?": ("comparison", lambda s, n, t: yes(the(s, n).digit > int(t))),
}  # fmt: skip


def solve(objects, question):
    for pattern, (family, solver) in SOLVERS.items():
        match = re.fullmatch(pattern, question)
        if match:
            return pattern, family, str(solver(objects, *match.groups()))
    raise AssertionError(f"no solver for {question!r}")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 10**9), st.integers(0, 2**32))
def test_every_question_has_the_one_answer_that_the_scene_gives(split, index, seed):
    example = builtin.builtin_images(split, index, seed)
    assert 4 <= len(example.questions) <= 6
    assert len({q["question"] for q in example.questions}) == len(example.questions)
    for q in example.questions:
        _, family, answer = solve(example.scene.objects, q["question"])
        assert (q["multiple_choice_answer"], q["family"]) == (answer, family), q["question"]


@pytest.fixture(scope="module")
def examples():
    return {
        "train": [builtin.builtin_images("train", i) for i in range(4000)],
        "val": [builtin.builtin_images("val", i) for i in range(1000)],
    }


@pytest.fixture(scope="module")
def records(examples):
    return {split: [q for e in drawn for q in e.questions] for split, drawn in examples.items()}


def test_every_kind_of_question_is_asked(records, examples):
    kinds = Counter(solve(e.scene.objects, q["question"])[0] for e in examples["train"] for q in e.questions)
    assert set(kinds) == set(SOLVERS)
    assert min(kinds.values()) > 40
    families = Counter(q["family"] for q in records["train"])
    assert all(count > 0.1 * len(records["train"]) for count in families.values())
    assert len(records["train"]) > 5.9 * len(examples["train"])


def test_questions_have_the_fields_of_vqa_v2(records):
    for q in records["train"]:
        answers = [a["answer"] for a in q["answers"]]
        assert [a["answer_id"] for a in q["answers"]] == list(range(1, 11))
        assert {a["answer_confidence"] for a in q["answers"]} == {"yes"}
        assert Counter(answers).most_common(1)[0][0] == q["multiple_choice_answer"]
        other = SYNONYMS.get(q["multiple_choice_answer"])
        assert Counter(answers) == Counter(
            [q["multiple_choice_answer"]] * (7 if other else 10) + [other] * 3 * bool(other)
        )
        assert q["question"].lower().startswith(q["question_type"])
        assert q["answer_type"] == (
            "yes/no" if q["multiple_choice_answer"] in ("yes", "no")
            else "number" if q["multiple_choice_answer"].isdigit()
            else "other"
        )  # fmt: skip


# ---- no answer without looking


def test_the_question_alone_does_not_tell_the_answer(records):
    """Bounds leave room for sampling noise of a few points; measured on 25,000 images: 0.31, yes/no 0.50."""
    assert builtin.question_only_ceiling(records["train"], records["val"]) < 0.36
    for answer_type, bound in {"yes/no": 0.54, "number": 0.25, "other": 0.29}.items():
        train, val = ([q for q in records[split] if q["answer_type"] == answer_type] for split in ("train", "val"))
        assert builtin.question_only_ceiling(train, val) < bound, answer_type


def test_the_best_constant_of_each_question_type_is_near_chance(records):
    chance = {
        "are the": 1 / 2, "are there": 1 / 2, "how many": 1 / 5, "is the": 2 / 5, "is there": 1 / 2,
        "what color": 1 / len(COLORS), "what digit": 1 / 10, "what is": 1 / len(KINDS), "what shape": 1 / len(SHAPES),
        "where is": 1 / len(CELLS), "which is": 1 / (len(KINDS) + len(COLORS)), "which number": 1 / 10,
    }  # fmt: skip
    best = builtin.best_constant_by_type(records["train"])
    assert set(best) == set(chance)
    for question_type, accuracy in best.items():
        assert accuracy < chance[question_type] + 0.06, question_type


def test_yes_and_no_are_equally_likely_for_each_wording(records, examples):
    """Per pattern, not only overall: a wording that mostly means yes would be a shortcut."""
    tallies: dict[str, Counter] = {}
    for e in examples["train"]:
        for q in e.questions:
            if q["answer_type"] == "yes/no":
                pattern = solve(e.scene.objects, q["question"])[0]
                tallies.setdefault(pattern, Counter())[q["multiple_choice_answer"]] += 1
    assert len(tallies) == 7
    for pattern, tally in tallies.items():
        spread = 3.5 * tally.total() ** 0.5 / 2  # 3.5 standard deviations of a fair coin
        assert abs(tally["yes"] - tally.total() / 2) < spread, pattern


def test_a_shortcut_would_be_seen():
    """The ceiling itself: a data set whose questions tell their answers scores 1, an even one its share."""
    told = [{"question": f"Is it {a}?", "question_type": "is it", "multiple_choice_answer": a} for a in ("yes", "no")]
    assert builtin.question_only_ceiling(told * 5, told) == 1
    even = [{"question": "Is it?", "question_type": "is it", "multiple_choice_answer": a} for a in ("yes", "no")]
    assert builtin.question_only_ceiling(even, even) == 0.5
    assert builtin.best_constant_by_type([*even, even[0]]) == {"is it": 2 / 3}
    unseen = [{"question": "Is it so?", "question_type": "is it", "multiple_choice_answer": "yes"}]
    assert builtin.question_only_ceiling([*even, even[0]], unseen) == 1


# ---- text


@dataclass
class Told:
    """An object as a text document tells it."""

    kind: str
    color: str
    size: str
    cell: str
    digit: int | None


def told_objects(text):
    named = rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) (\w+) in the {CELL}"
    return [
        Told("digit", color, size, cell, int(noun)) if noun.isdigit() else Told(noun, color, size, cell, None)
        for size, color, noun, cell in re.findall(named, text)
    ]


NUMBERS = {word: i for i, word in enumerate(("no", *words.NUMBERS[1:]))}
BACK = {
    "to the left of": "to the right of", "to the right of": "to the left of", "above": "below", "below": "above",
    "larger than": "smaller than", "smaller than": "larger than",
}  # fmt: skip


def check_scene(text):
    objects = told_objects(text)
    assert 1 <= len(objects) <= 5
    pairs = re.findall(r"Question: (.+?\?) Answer: (.+?)\.", text)
    assert pairs
    for question, answer in pairs:
        assert solve(objects, question)[2] == answer


def check_chain(text):
    word = f"({'|'.join(BACK)})"
    told = re.fullmatch(
        rf"The (.+) is {word} the (.+)\. The (.+) is {word} the (.+)\. So the (.+) is {word} the (.+)\.", text
    )
    assert told
    a, first, b, b2, second, c, d, third, e = told.groups()
    assert first == second
    assert b == b2
    assert len({a, b, c}) == 3
    assert (d, third, e) in {(a, first, c), (c, BACK[first], a)}


def check_counting(text):
    numbers = [int(w) if w.isdigit() else {**NUMBERS, "zero": 0}[w] for w in re.findall(r"\w+", text.split(":")[1])]
    step = -1 if text.startswith("Count down") else 1
    assert len(numbers) >= 3
    assert all(b - a == step for a, b in itertools.pairwise(numbers))


def check_arithmetic(text):
    for line in text.removesuffix(".").split(". "):
        a, word, b, *rest = line.replace("greater than", "greater_than").replace("is greater", "greater").split()
        a, b = int(a), int(b)
        if word == "greater_than":
            assert a > b
        else:
            assert int(rest[1]) == (a + b if word == "plus" else a - b)


def check_story(text):
    has = [(who, NUMBERS[n]) for who, n in re.findall(r"(\w+) has (\w+)", text.split(" gives ")[0].split("So ")[0])]
    (one, x), (other, y) = has
    assert one != other
    given = re.search(rf"{one} gives (\w+) to {other}\. Now {one} has (\w+) .* and {other} has (\w+) ", text)
    if given:
        number, kept, gained = (NUMBERS[n] for n in given.groups())
        assert (kept, gained) == (x - number, y + number)
        assert min(kept, number) >= 0
    else:
        more, fewer = (one, other) if x > y else (other, one)
        assert f"So {more} has more than {fewer}. Together they have {x + y}." in text


def test_every_text_paragraph_is_true():
    checks = {
        r"There is ": check_scene, r"The ": check_chain, r"Count ": check_counting, r"\d": check_arithmetic,
        r"(Anna|Ben|Carla|David) has ": check_story,
    }  # fmt: skip
    seen: Counter[str] = Counter()
    for i in range(500):
        for paragraph in builtin.text_document("train", i).split("\n"):
            start = next(start for start in checks if re.match(start, paragraph))
            checks[start](paragraph)
            seen[start] += 1
    assert set(seen) == set(checks)


def test_interleaved_documents_alternate_text_and_pictures_and_count_right():
    ends: Counter[str] = Counter()
    for i in range(200):
        document = builtin.interleaved_document("train", i)
        assert [isinstance(part, str) for part in document] == [k % 2 == 0 for k in range(len(document))]
        assert len(document) in (5, 7)
        end = document[-1]
        ends[end.split()[0] + end.split()[1]] += 1
        if document[0].startswith("The first picture:"):
            told = [sum(n for n in listed(text)) for text in document[:-1:2]]
            stated = [NUMBERS[n] for n in re.findall(r"picture has (\w+) object", end)]
            assert told == stated
            (most,) = re.findall(r"The ([^.]*) pictures? (?:has|have) the most\.$", end)
            order = ("first", "second", "third")
            assert most == " and ".join(order[k] for k in range(len(told)) if told[k] == max(told)).replace(
                "first and second and third", "first, second and third"
            )
    assert len(ends) > 3


def ink(image):
    return np.asarray(image).min(axis=2) < 150  # paper is lighter, and every color has one dark channel


def pixels_of(image, color):
    return (ink(image) & (np.abs(np.asarray(image).astype(int) - RGB[color]).sum(axis=2) < 60)).sum()


def test_what_changed_between_two_pictures_can_be_seen():
    checked: Counter[str] = Counter()
    for i in range(300):
        document = builtin.interleaved_document("val", i)
        if document[0] != "Here is the first picture.":
            continue
        _, before, _, after, end = document
        color = re.fullmatch(rf"The .+ in the first picture is ({'|'.join(COLORS)}) in the second picture\.", end)
        if color:
            assert pixels_of(after, color[1]) > pixels_of(before, color[1]) + 20
            checked["color"] += 1
        elif end.endswith(" is gone in the second picture."):
            assert ink(before).sum() > ink(after).sum() + 15
            checked["gone"] += 1
        else:
            shape = rf"The .+ in the first picture is an? ({'|'.join(SHAPES)}|\d) in the second picture\."
            assert re.fullmatch(shape, end)
            checked["shape"] += 1
    assert min(checked.values()) > 10
    assert len(checked) == 3


def listed(text):
    """The numbers in "The first picture: A picture of a red star and two green rings."."""
    listing = re.sub(r"^.*?picture: (A picture of|This picture shows)?", "", text)
    color = "|".join(COLORS)
    return [1 if n in ("a", "an") else NUMBERS[n] for n in re.findall(rf"(\w+) (?:{color}) ", listing.lower())]
