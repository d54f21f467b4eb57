"""Text-only documents in the vocabulary of the pictures: imagined scenes with questions, chains of reasoning,
counting, arithmetic and small stories."""

import random
from collections.abc import Callable

from nmm_serve.train.data.builtin.questions import OPPOSITE, questions
from nmm_serve.train.data.builtin.scene import in_split, sample_scene, stream
from nmm_serve.train.data.builtin.words import COLORS, KINDS, NUMBERS, SHAPES, a, count_noun, join, sentence

PEOPLE = ("Anna", "Ben", "Carla", "David")


def text_document(split: str, index: int, seed: int = 0) -> str:
    """Document `index` of `split`: two to four paragraphs, about 60 words. No document of one split is in another,
    whatever the seeds. Raises DataError for an unknown split or a negative index."""
    rng = stream("text", split, index, seed)
    while True:
        paragraphs = [rng.choice(PARAGRAPHS)(rng, split) for _ in range(rng.randint(2, 4))]
        document = "\n".join(paragraphs)
        if in_split(document, split):
            return document


def _scene(rng: random.Random, split: str) -> str:
    """A scene told in words, and questions that the words answer (of relations they tell too little)."""
    scene, count = sample_scene(rng, split)
    told = join([f"{a(f'{o.size} {o.color} {o.noun}')} in the {o.cell}" for o in scene.objects])
    asked = [q for q in questions(scene, count, rng) if q.family != "relation"]
    answers = [f"Question: {q.text} Answer: {q.answer}." for q in rng.sample(asked, min(2, len(asked)))]
    return " ".join([sentence(f"there is {told}"), *answers])


def _chain(rng: random.Random, split: str) -> str:
    """A relates to B, B to C; so A to C, and C to A the other way round."""
    names = rng.sample([f"the {color} {kind}" for color in COLORS for kind in KINDS], 3)
    word = rng.choice([*OPPOSITE, "larger than", "smaller than"])
    back = {**OPPOSITE, "larger than": "smaller than", "smaller than": "larger than"}[word]
    first, second, third = names
    told = [f"{first} is {word} {second}", f"{second} is {word} {third}"]
    follows = rng.choice((f"{first} is {word} {third}", f"{third} is {back} {first}"))
    return " ".join([sentence(t) for t in told] + [sentence(f"so {follows}")])


def _counting(rng: random.Random, split: str) -> str:
    low = rng.randint(0, 5)
    high = rng.randint(low + 2, 10)
    numbers = (
        [str(n) if n < 10 else "10" for n in range(low, high + 1)] if rng.random() < 0.5 else NUMBERS[low : high + 1]
    )
    if rng.random() < 0.3:
        return sentence(f"count down from {numbers[-1]} to {numbers[0]}: " + ", ".join(reversed(numbers)))
    return sentence(f"count from {numbers[0]} to {numbers[-1]}: " + ", ".join(numbers))


def _arithmetic(rng: random.Random, split: str) -> str:
    x, y = rng.randint(0, 9), rng.randint(0, 9)
    total = x + y
    told = [f"{x} plus {y} is {total}", f"{total} minus {y} is {x}"]
    if x != y:
        told.append(f"{max(x, y)} is greater than {min(x, y)}")
    return " ".join(sentence(t) for t in rng.sample(told, rng.randint(1, len(told))))


def _giving(rng: random.Random, split: str) -> str:
    """Counting objects that change hands."""
    giver, taker = rng.sample(PEOPLE, 2)
    color, shape = rng.choice(COLORS), rng.choice(SHAPES)
    given = rng.randint(1, 4)
    has, had = rng.randint(given, 6), rng.randint(0, 10 - given)
    kept, gained = (count_noun(n, f"{color} {shape}") for n in (has - given, had + given))
    return (
        f"{giver} has {count_noun(has, f'{color} {shape}')}. {taker} has {count_noun(had, f'{color} {shape}')}. "
        f"{giver} gives {NUMBERS[given]} to {taker}. Now {giver} has {kept} and {taker} has {gained}."
    )


def _who_has_more(rng: random.Random, split: str) -> str:
    one, other = rng.sample(PEOPLE, 2)
    shape = rng.choice(SHAPES)
    x, y = rng.sample(range(11), 2)
    more, fewer = (one, other) if x > y else (other, one)
    owned = f"{one} has {count_noun(x, shape)}. {other} has {count_noun(y, shape)}."
    return f"{owned} So {more} has more than {fewer}. Together they have {x + y}."


PARAGRAPHS: tuple[Callable[[random.Random, str], str], ...] = (
    _scene,
    _scene,
    _chain,
    _counting,
    _arithmetic,
    _giving,
    _who_has_more,
)
