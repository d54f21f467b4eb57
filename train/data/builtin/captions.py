"""Five captions of a scene: what there is, where, how many, in what relation, in which colors."""

import random
from collections import Counter

from nmm_serve.train.data.builtin.scene import CLEARLY_APART, Object, Scene
from nmm_serve.train.data.builtin.words import NUMBERS, a, count_noun, join, plural, sentence


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions, in a fixed order of styles; the wording varies."""
    return [listing(scene, rng), places(scene, rng), counts(scene, rng), relation(scene, rng), colors(scene, rng)]


def listing(scene: Scene, rng: random.Random) -> str:
    """ "A red circle, two blue stars and a green 7." """
    names = _grouped([f"{o.color} {o.noun}" for o in scene.objects])
    return sentence(rng.choice(("{}", "a picture of {}", "this picture shows {}")).format(names))


def places(scene: Scene, rng: random.Random) -> str:
    """ "There is a red circle in the top left and a green 7 in the center." Or the places first, and in any order: told
    in reading order alone, what comes next could be said without looking where it is."""
    objects = rng.sample(scene.objects, len(scene.objects))
    form = rng.choice(("{what} in the {cell}", "in the {cell} is {what}"))
    told = join([form.format(what=a(f"{o.color} {o.noun}"), cell=o.cell) for o in objects])
    return sentence(told if form.startswith("in") else rng.choice(("{}", "there is {}")).format(told))


def counts(scene: Scene, rng: random.Random) -> str:
    """ "Three objects: two circles and a digit." """
    kinds = Counter(o.kind for o in scene.objects)
    parts = join([count_noun(n, kind) for kind, n in kinds.items()])
    total = len(scene.objects)
    if len(kinds) == 1:
        return sentence(rng.choice(("{}", "the picture shows {}")).format(parts))
    start = rng.choice(("{}", "a picture with {}", "the picture shows {}"))
    return sentence(f"{start.format(count_noun(total, 'object'))}: {parts}")


def relation(scene: Scene, rng: random.Random) -> str:
    """ "A large red circle to the left of a small green 7." A lone object is told with its place instead."""
    pairs = [(o, p) for o in scene.objects for p in scene.objects if o is not p and relations(o, p)]
    if not pairs:
        only = scene.objects[0]
        return sentence(f"{_full(only)} in the {only.cell}")
    first, second = rng.choice(pairs)
    return sentence(f"{_full(first)} {rng.choice(relations(first, second))} {_full(second)}")


def colors(scene: Scene, rng: random.Random) -> str:
    """ "Two red objects and one gray object." """
    tally = Counter(o.color for o in scene.objects)
    parts = join([count_noun(n, f"{color} object") for color, n in tally.items()])
    return sentence(
        rng.choice(("{}", "there {be} {}")).format(parts, be="is" if next(iter(tally.values())) == 1 else "are")
    )


def relations(first: Object, second: Object) -> list[str]:
    """The words that plainly hold from `first` to `second`; empty where they are too close to say."""
    words = []
    if abs(first.x - second.x) >= CLEARLY_APART:
        words.append("to the left of" if first.x < second.x else "to the right of")
    if abs(first.y - second.y) >= CLEARLY_APART:
        words.append("above" if first.y < second.y else "below")
    return words


def _grouped(names: list[str]) -> str:
    """ "a red circle and two blue stars", in the order in which they first come."""
    return join([a(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}" for name, n in Counter(names).items()])


def _full(obj: Object) -> str:
    return a(f"{obj.size} {obj.color} {obj.noun}")
