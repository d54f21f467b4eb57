"""Questions about a scene, in four families: recognition, counting, relation, comparison.

Two rules keep the question from giving its own answer away:
- a question with two possible answers is asked only of a scene that offers both, and a coin decides
  which one (by choosing the objects, or their order), so each wording comes with both equally often;
- a count is drawn before the scene that shows it (`scene.sample_scene`).
Everything else follows from kinds, colors, sizes, places and digits being drawn alike.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nmm_serve.train.data.builtin.captions import relations
from nmm_serve.train.data.builtin.refer import Names, phrase
from nmm_serve.train.data.builtin.scene import CLEARLY_APART, Count, Object, Scene
from nmm_serve.train.data.builtin.words import CELLS, COLORS, KINDS, SHAPES, SIZES, a, plural

FAMILIES = ("recognition", "counting", "relation", "comparison")
PER_IMAGE = 6
# Which families an image's questions come from, in the order in which they are tried.
PLAN = ("counting", "recognition", "relation", "comparison", "recognition", "comparison", "relation")
THRESHOLDS = range(2, 7)


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str
    answer_type: str  # "yes/no", "number" or "other", as in VQA v2
    family: str


Ask = Callable[[Names, random.Random], tuple[str, str] | None]


def questions(scene: Scene, count: Count, rng: random.Random) -> list[Question]:
    """About six different questions, each with one right answer."""
    names = Names(scene)
    asks = {family: _weighted_order(weights, rng) for family, weights in ASKS.items()}
    out = [Question(*_ask_count(count, rng), "number", "counting")]
    for family in PLAN[1:]:
        _ask_one(out, family, asks, names, rng)
    while len(out) < PER_IMAGE and _ask_one(out, "recognition", asks, names, rng):
        pass
    return out[:PER_IMAGE]


def _weighted_order(weights: dict[Ask, float], rng: random.Random) -> list[Ask]:
    """A random order in which the heavy tend to come last, where `_ask_one` takes from."""
    return sorted(weights, key=lambda ask: rng.random() ** (1 / weights[ask]))


def _ask_one(out: list[Question], family: str, asks: dict[str, list[Ask]], names: Names, rng: random.Random) -> bool:
    """Append one question of `family` if the scene allows it; each kind of question is tried once an image."""
    while asks[family]:
        asked = asks[family].pop()(names, rng)
        if asked:
            out.append(Question(*asked, answer_type(asked[1]), family))
            return True
    return False


def answer_type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


# ---- counting


def _ask_count(count: Count, rng: random.Random) -> tuple[str, str]:
    counted = plural(phrase(_traits(count.value)))
    return rng.choice(("How many {} are there?", "How many {} are in the picture?")).format(counted), str(count.answer)


def _traits(value: str | None) -> dict[str, str]:
    """`value` under the name of its trait: {"color": "red"}."""
    traits = {"kind": KINDS, "color": COLORS, "size": SIZES}
    return {trait: value for trait, values in traits.items() if value is not None and value in values}


# ---- recognition


def _color(names: Names, rng: random.Random) -> tuple[str, str] | None:
    found = names.draw(rng, names.objects, without="color")
    return (f"What color is the {found.phrase}?", found.obj.color) if found else None


def _shape(names: Names, rng: random.Random) -> tuple[str, str] | None:
    found = names.draw(rng, [o for o in names.objects if o.digit is None], without="kind")
    return (f"What shape is the {found.phrase}?", found.obj.kind) if found else None


def _size(names: Names, rng: random.Random) -> tuple[str, str] | None:
    found = names.draw(rng, names.objects, without="size")
    return (f"Is the {found.phrase} large or small?", found.obj.size) if found else None


def _digit(names: Names, rng: random.Random) -> tuple[str, str] | None:
    found = names.draw(rng, [o for o in names.objects if o.digit is not None], without="value", need="kind")
    if not found:
        return None
    text = "What digit is in the picture?" if found.phrase == "digit" else f"Which number is the {found.phrase}?"
    return text, str(found.obj.digit)


def _where(names: Names, rng: random.Random) -> tuple[str, str] | None:
    found = names.draw(rng, names.objects)
    return (f"Where is the {found.phrase}?", found.obj.cell) if found else None


def _what_at(names: Names, rng: random.Random) -> tuple[str, str]:
    kinds_and_nothing = len(KINDS) + 1
    if rng.randrange(kinds_and_nothing) == 0:
        taken = {o.cell for o in names.objects}
        return f"What is in the {rng.choice([c for c in CELLS if c not in taken])}?", "nothing"
    obj = rng.choice(names.objects)
    return f"What is in the {obj.cell}?", obj.kind


def _color_at(names: Names, rng: random.Random) -> tuple[str, str]:
    obj = rng.choice(names.objects)
    return f"What color is the object in the {obj.cell}?", obj.color


def _exists(names: Names, rng: random.Random) -> tuple[str, str]:
    present = {(o.color, o.kind) for o in names.objects}
    if rng.random() < 0.5:
        color, kind = rng.choice(sorted(present))
        answer = "yes"
    else:
        # Half of the absent things are made of a color and a kind that are both there, apart.
        recombined = sorted({(c, k) for c, _ in present for _, k in present} - present)
        if recombined and rng.random() < 0.5:
            color, kind = rng.choice(recombined)
        else:
            color, kind = rng.choice([(c, k) for c in COLORS for k in KINDS if (c, k) not in present])
        answer = "no"
    return f"Is there {a(f'{color} {kind}')} in the picture?", answer


# ---- relation

OPPOSITE = {
    "to the left of": "to the right of",
    "above": "below",
    "to the right of": "to the left of",
    "below": "above",
}


def _is_beside(names: Names, rng: random.Random) -> tuple[str, str] | None:
    pairs = [(o, p) for o in names.objects for p in names.objects if o is not p and relations(o, p)]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    one, other = names.draw(rng, [first]), names.draw(rng, [second])
    if not one or not other:
        return None
    holds = rng.choice(relations(first, second))
    answer = rng.choice(("yes", "no"))
    word = holds if answer == "yes" else OPPOSITE[holds]
    return f"Is the {one.phrase} {word} the {other.phrase}?", answer


def _what_beside(names: Names, rng: random.Random) -> tuple[str, str] | None:
    return _beside(names, rng, "What is {} the {}?", "kind")


def _color_beside(names: Names, rng: random.Random) -> tuple[str, str] | None:
    return _beside(names, rng, "What color is the object {} the {}?", "color")


def _beside(names: Names, rng: random.Random, text: str, trait: str) -> tuple[str, str] | None:
    """A question about the one object on some side of another."""
    candidates = []
    for anchor in names.objects:
        for word in OPPOSITE:
            on_side = [o for o in names.objects if o is not anchor and _offset(anchor, o, word) > 0]
            if len(on_side) == 1 and _offset(anchor, on_side[0], word) >= CLEARLY_APART:
                candidates.append((anchor, word, on_side[0]))
    if not candidates:
        return None
    anchor, word, found = rng.choice(candidates)
    name = names.draw(rng, [anchor])
    return (text.format(word, name.phrase), getattr(found, trait)) if name else None


def _offset(anchor: Object, other: Object, word: str) -> int:
    """How far `other` lies from `anchor` in the direction of `word`, pixels."""
    dx, dy = other.x - anchor.x, other.y - anchor.y
    return {"to the left of": -dx, "to the right of": dx, "above": -dy, "below": dy}[word]


# ---- comparison


def _more(names: Names, rng: random.Random) -> tuple[str, str] | None:
    choices, noun = rng.choice(((KINDS, "{}"), (COLORS, "{} object")))
    n = {v: sum(v in (o.kind, o.color) for o in names.objects) for v in choices}
    present = [v for v in choices if n[v]]
    answer = rng.choice(("yes", "no"))
    unequal = [(x, y) for x in present for y in present if n[x] > n[y]]
    if not unequal or rng.random() < 0.3:
        unequal = [(x, y) for x in present for y in choices if not n[y]]
    more, fewer = rng.choice(unequal)
    if answer == "no":
        more, fewer = fewer, more
        equal = [(x, y) for x in present for y in present if x != y and n[x] == n[y]]
        if equal and rng.random() < 0.3:
            more, fewer = rng.choice(equal)
    first, second = (plural(noun.format(v)) for v in (more, fewer))
    return f"Are there more {first} than {second}?", answer


def _which_larger(names: Names, rng: random.Random) -> tuple[str, str] | None:
    trait = rng.choice(("kind", "color"))
    single = [o for o in names.objects if names.unique(o, (trait,))]
    pairs = [(o, p) for o in single for p in single if o.size == "large" and p.size == "small"]
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    word, answer = rng.choice((("larger", large), ("smaller", small)))
    first, second = (phrase({trait: getattr(o, trait)}) for o in rng.sample((large, small), 2))
    return f"Which is {word}, the {first} or the {second}?", getattr(answer, trait)


def _same_color(names: Names, rng: random.Random) -> tuple[str, str] | None:
    return _same(names, rng, names.objects, "color", "color")


def _same_shape(names: Names, rng: random.Random) -> tuple[str, str] | None:
    return _same(names, rng, [o for o in names.objects if o.kind in SHAPES], "kind", "shape")


def _same(names: Names, rng: random.Random, among: Sequence[Object], trait: str, word: str) -> tuple[str, str] | None:
    named = [o for o in among if names.draw(rng, [o], without=trait)]
    pairs = [(o, p) for o in named for p in named if o is not p]
    same = [pair for pair in pairs if getattr(pair[0], trait) == getattr(pair[1], trait)]
    different = [pair for pair in pairs if getattr(pair[0], trait) != getattr(pair[1], trait)]
    if not same or not different:
        return None
    answer = rng.choice(("yes", "no"))
    one, other = (names.draw(rng, [o], without=trait) for o in rng.choice(same if answer == "yes" else different))
    assert one is not None and other is not None, "both could be named above"  # noqa: PT018
    return f"Are the {one.phrase} and the {other.phrase} the same {word}?", answer


def _value(written: Object) -> int:
    assert written.digit is not None
    return written.digit


def _greater_digit(names: Names, rng: random.Random) -> tuple[str, str] | None:
    written = [o for o in names.objects if o.digit is not None]
    if len(written) < 2:
        return None
    one, other = (names.draw(rng, [o], without="value", need="kind") for o in rng.sample(written, 2))
    if not one or not other:
        return None
    greater = _value(one.obj) > _value(other.obj)
    return f"Is the {one.phrase} greater than the {other.phrase}?", "yes" if greater else "no"


def _greater_than_number(names: Names, rng: random.Random) -> tuple[str, str] | None:
    """ "Is the digit greater than 5?" Weighted so that for each number both answers are equally likely: a number t
    leaves 9 - t digits above it and t + 1 not, and each digit of the rarer side counts for more."""
    found = names.draw(rng, [o for o in names.objects if o.digit is not None], without="value", need="kind")
    if not found:
        return None
    digit = _value(found.obj)
    weights = {d: [1 / (9 - t) if d > t else 1 / (t + 1) for t in THRESHOLDS] for d in (0, digit)}
    # Digit 0 has the largest total; the others are asked about as much less often as their weights say.
    if rng.random() >= sum(weights[digit]) / sum(weights[0]):
        return None
    t = rng.choices(THRESHOLDS, weights[digit])[0]
    return f"Is the {found.phrase} greater than {t}?", "yes" if digit > t else "no"


def _sum(names: Names, rng: random.Random) -> tuple[str, str] | None:
    written = [o.digit for o in names.objects if o.digit is not None]
    return ("What is the sum of the two digits?", str(sum(written))) if len(written) == 2 else None


# Weights of being tried first. What few scenes allow weighs more, so that handwriting is asked about often.
ASKS: dict[str, dict[Ask, float]] = {
    "recognition": {_digit: 12, _shape: 2, _color: 2, _size: 1, _where: 2, _what_at: 2, _color_at: 1, _exists: 2},
    "relation": {_is_beside: 2, _what_beside: 1, _color_beside: 1},
    "comparison": {
        _sum: 8,
        _greater_digit: 8,
        _greater_than_number: 4,
        _same_color: 4,
        _same_shape: 4,
        _which_larger: 4,
        _more: 1,
    },
}
