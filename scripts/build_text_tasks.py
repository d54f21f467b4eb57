"""Draw the data of the text tasks that ship with the project: `python -P scripts/build_text_tasks.py`.

Every item is cut out of a document (or made from a picture) of the built-in data's `test` split, so no training run on
built-in data has seen that document. Its facts are another matter: there are few of them (3 plus 4 is 7), and training
meets each in other documents. The data need scikit-learn to be drawn (the extra `train`), not to be used.
"""

import base64
import io
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nmm_serve.train.data.builtin import builtin_images, text_document
from nmm_serve.train.data.builtin.questions import OPPOSITE
from nmm_serve.train.data.builtin.words import CELLS, COLORS, KINDS, NUMBERS, SHAPES, count_noun, plural

FOLDER = Path(__file__).parents[1] / "evals/text_tasks"
ITEMS = 240
LONGEST_CONTEXT = 320
"""Characters. Models of the demo's size read some 200 tokens."""
FIRST_PERPLEXITY_DOCUMENT = 100_000
PERPLEXITY_DOCUMENTS = 200
PICTURES = 60
QUESTIONS_A_PICTURE = 3

Item = dict[str, Any]


def draw(name: str) -> str:
    """The task's data file as text: one JSON document a line."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in DRAWN[name]())


def documents() -> Iterator[tuple[int, str, random.Random]]:
    for index in itertools.count():
        yield index, _document(index), random.Random(f"text task/{index}")


@cache
def _document(index: int) -> str:
    return text_document("test", index)


def multiple_choice(cut: Callable[[str, random.Random], tuple[str, str, list[str]] | None]) -> Iterator[Item]:
    """Items from the first documents in which `cut` finds (context, right choice, wrong choices)."""
    made = 0
    for index, document, rng in documents():
        found = cut(document, rng)
        if found is None:
            continue
        context, right, wrong = found
        if len(context) > LONGEST_CONTEXT:
            continue
        assert document.startswith(f"{context} {right}")
        choices = [right, *wrong]
        assert len(set(choices)) == len(choices)
        rng.shuffle(choices)
        yield {"document": index, "context": context, "choices": choices, "gold": choices.index(right)}
        made += 1
        if made == ITEMS:
            return


def cut_at(document: str, start: int) -> tuple[str, str]:
    """What stands before position `start` (a space), and after it up to the end of the sentence."""
    return document[:start], re.split(r"(?<=[.?])\s", document[start + 1 :], maxsplit=1)[0]


# ---- agreement


def agreement() -> Iterator[Item]:
    """Minimal pairs: one circle or one circles, two circles or two circle. As many right ones of each number."""
    counts = {"singular": 0, "plural": 0}

    def cut(document: str, rng: random.Random) -> tuple[str, str, list[str]] | None:
        places = [
            (number, start, wrong)
            for number, start, wrong in _agreements(document)
            if counts[number] < ITEMS // len(counts) and start <= LONGEST_CONTEXT
        ]
        if not places:
            return None
        rarer = min((number for number, _, _ in places), key=counts.__getitem__)
        number, start, wrong = rng.choice([place for place in places if place[0] == rarer])
        counts[number] += 1
        return *cut_at(document, start), [wrong]

    return multiple_choice(cut)


def _agreements(document: str) -> Iterator[tuple[str, int, str]]:
    """(number, position of the space before the noun, wrong noun with the rest of the sentence)."""
    nouns = "|".join((*SHAPES, *map(plural, SHAPES)))
    for match in re.finditer(rf"\b({'|'.join(NUMBERS)})(?: (?:{'|'.join(COLORS)}))?( (?:{nouns}))\b", document):
        noun, single = match[2][1:], match[1] == "one"
        _, rest = cut_at(document, match.start(2))
        wrong = plural(noun) if single else next(shape for shape in SHAPES if plural(shape) == noun)
        yield ("singular" if single else "plural"), match.start(2), wrong + rest[len(noun) :]


# ---- counting, arithmetic, stories, relations


def counting() -> Iterator[Item]:
    def cut(document: str, rng: random.Random) -> tuple[str, str, list[str]] | None:
        match = re.search(r"Count (?:down )?from \w+ to \w+: ([\w, ]+)\.", document)
        if match is None or len(match[1].split(", ")) < 4:
            return None
        numbers = match[1].split(", ")
        k = rng.randrange(2, len(numbers))
        context = document[: match.start(1)] + ", ".join(numbers[:k]) + ","
        known = NUMBERS if numbers[0] in NUMBERS else [str(n) for n in range(11)]
        # of two numbers that begin alike, the shorter can only be the likelier
        wrong = [n for n in known if n != numbers[k] and {n, numbers[k]} != {"1", "10"}]
        while {"1", "10"} <= set(drawn := rng.sample(wrong, 3)):
            pass
        return context, numbers[k], drawn

    return multiple_choice(cut)


def arithmetic() -> Iterator[Item]:
    made = 0
    for index, document, _ in documents():
        match = re.search(r"\d+ (?:plus|minus) \d is (\d+)\.", document)
        if match is not None and match.start(1) - 1 <= LONGEST_CONTEXT:
            yield {"document": index, "context": document[: match.start(1) - 1], "answer": match[1]}
            made += 1
            if made == ITEMS:
                return


def story() -> Iterator[Item]:
    pattern = re.compile(
        r"(\w+) has (\w+) (\w+ \w+)\. (\w+) has (\w+) \w+ \w+\. \w+ gives (\w+) to \w+\. Now \w+ has( )(.+?)\."
    )

    def cut(document: str, rng: random.Random) -> tuple[str, str, list[str]] | None:
        match = pattern.search(document)
        if match is None:
            return None
        _, has, noun, taker, had, given = match.groups()[:6]
        x, y, z = (0 if word == "no" else NUMBERS.index(word) for word in (has, had, given))
        color, shape = noun.split(" ")
        thing = f"{color} {next(s for s in SHAPES if shape in (s, plural(s)))}"

        def ending(left: int, gained: int) -> str:
            return f"{count_noun(left, thing)} and {taker} has {count_noun(gained, thing)}."

        # nothing changed hands; one too few did; one too many; half the change; both have more
        mistakes = [(x, y), (x - z + 1, y + z - 1), (x - z - 1, y + z + 1), (x - z, y), (x, y + z), (x + z, y + z)]
        wrong = {ending(*pair): None for pair in mistakes if pair != (x - z, y + z) and all(0 <= n <= 10 for n in pair)}
        if len(wrong) < 3:
            return None
        return document[: match.start(7)], ending(x - z, y + z), rng.sample(list(wrong), 3)

    return multiple_choice(cut)


def relation() -> Iterator[Item]:
    back = {**OPPOSITE, "larger than": "smaller than", "smaller than": "larger than"}

    def cut(document: str, rng: random.Random) -> tuple[str, str, list[str]] | None:
        match = re.search(r"So the \w+ \w+ is( )(.+?) the (\w+ \w+)\.", document)
        if match is None:
            return None
        right, other = match[2], match[3]
        return document[: match.start(1)], f"{right} the {other}.", [f"{back[right]} the {other}."]

    return multiple_choice(cut)


def perplexity() -> Iterator[Item]:
    for index in range(FIRST_PERPLEXITY_DOCUMENT, FIRST_PERPLEXITY_DOCUMENT + PERPLEXITY_DOCUMENTS):
        yield {"document": index, "text": text_document("test", index)}


# ---- questions about pictures

ANSWERS = (COLORS, KINDS, CELLS, tuple(str(n) for n in range(10)))


def vqa() -> Iterator[Item]:
    """A line a picture: four choices a question, the wrong ones of the right one's kind."""
    made, index = 0, 0
    while made < PICTURES:
        example = builtin_images("test", index)
        rng = random.Random(f"vqa task/{index}")
        asked = []
        for question in example.questions:
            answer = question["multiple_choice_answer"]
            kind = next((kind for kind in ANSWERS if answer in kind), None)
            if kind is None:
                continue
            pool = kind[:6] if question["family"] == "counting" else kind
            choices = [answer, *rng.sample([word for word in pool if word != answer], 3)]
            rng.shuffle(choices)
            asked.append({"question": question["question"], "choices": choices, "gold": choices.index(answer)})
        if len(asked) >= QUESTIONS_A_PICTURE:
            buffer = io.BytesIO()
            example.image.save(buffer, "PNG", optimize=True)
            png = base64.b64encode(buffer.getvalue()).decode()
            yield {"image_id": example.image_id, "questions": asked[:QUESTIONS_A_PICTURE], "png": png}
            made += 1
        index += 1


DRAWN: dict[str, Callable[[], Iterator[Item]]] = {
    "agreement": agreement,
    "arithmetic": arithmetic,
    "counting": counting,
    "perplexity": perplexity,
    "relation": relation,
    "story": story,
    "vqa": vqa,
}


def main() -> None:
    for name in DRAWN:
        path = FOLDER / f"{name}.jsonl"
        path.write_text(draw(name), encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
