"""Documents of text and pictures in turn: what changed between two pictures, and two or three pictures compared."""

import dataclasses
import random

from PIL import Image

from nmm_serve.train.data.builtin import digits
from nmm_serve.train.data.builtin.captions import listing
from nmm_serve.train.data.builtin.refer import Names
from nmm_serve.train.data.builtin.render import render
from nmm_serve.train.data.builtin.scene import Object, Scene, in_split, layout, sample_scene, stream
from nmm_serve.train.data.builtin.words import COLORS, SHAPES, a, count_noun, join, sentence

ORDER = ("first", "second", "third")


def interleaved_document(split: str, index: int, seed: int = 0) -> list[str | Image.Image]:
    """Document `index` of `split`: two or three pictures with text between them, starting and ending with text.

    Its pictures keep the promise of `builtin_images`: none is in another split. Raises DataError for an
    unknown split or a negative index.
    """
    rng = stream("interleaved", split, index, seed)
    return rng.choice((_difference, _told_in_turn, _which_picture))(rng, split)


def _difference(rng: random.Random, split: str) -> list[str | Image.Image]:
    """Two pictures that differ in one object, then what differs."""
    while True:
        before, _ = sample_scene(rng, split)
        name = Names(before).draw(rng, before.objects)
        if name is None:
            continue
        old = name.obj
        told, new = _change(rng, old, name.phrase, split)
        kept = (new if o is old else o for o in before.objects)
        objects = tuple(o for o in kept if o is not None)
        if objects and in_split(layout(objects), split):
            break
    after = Scene(objects, rng.getrandbits(32))
    return ["Here is the first picture.", render(before), "Here is the second picture.", render(after), sentence(told)]


def _change(rng: random.Random, old: Object, name: str, split: str) -> tuple[str, Object | None]:
    """What happened to `old`, and what it is now; None where it is gone."""
    kind = rng.choice(("color", "shape", "gone"))
    if kind == "gone":
        return f"the {name} is gone in the second picture", None
    if kind == "color":
        color = rng.choice([c for c in COLORS if c != old.color])
        told = f"the {name} in the first picture is {color} in the second picture"
        return told, dataclasses.replace(old, color=color)
    if old.digit is None:
        shape = rng.choice([s for s in SHAPES if s != old.kind])
        told = f"the {name} in the first picture is {a(shape)} in the second picture"
        return told, dataclasses.replace(old, kind=shape)
    digit = rng.choice([d for d in range(10) if d != old.digit])
    glyph = rng.choice(digits.pools(split)[digit])
    told = f"the {name} in the first picture is {a(str(digit))} in the second picture"
    return told, dataclasses.replace(old, digit=digit, glyph=glyph)


def _told_in_turn(rng: random.Random, split: str) -> list[str | Image.Image]:
    """Two or three pictures, each after its caption, then which has more objects."""
    scenes = [sample_scene(rng, split)[0] for _ in range(rng.randint(2, 3))]
    document: list[str | Image.Image] = []
    for order, scene in zip(ORDER, scenes, strict=False):
        document += [f"The {order} picture: {listing(scene, rng)}", render(scene)]
    sizes = [len(s.objects) for s in scenes]
    most = [order for order, n in zip(ORDER, sizes, strict=False) if n == max(sizes)]
    told = join([f"the {order} picture has {count_noun(n, 'object')}" for order, n in zip(ORDER, sizes, strict=False)])
    end = f"the {most[0]} picture has the most" if len(most) == 1 else f"the {join(most)} pictures have the most"
    return [*document, f"{sentence(told)} {sentence(end)}"]


def _which_picture(rng: random.Random, split: str) -> list[str | Image.Image]:
    """Pictures first, then where something is to be found."""
    scenes = [sample_scene(rng, split)[0] for _ in range(rng.randint(2, 3))]
    wanted = rng.choice(rng.choice(scenes).objects)
    name = f"{wanted.color} {wanted.kind}"
    has = [o for o, s in zip(ORDER, scenes, strict=False) if any(f"{x.color} {x.kind}" == name for x in s.objects)]
    answer = f"the {has[0]} picture" if len(has) == 1 else f"the {join(has)} pictures"
    document: list[str | Image.Image] = ["Look at these pictures."]
    for order, scene in zip(ORDER, scenes, strict=False):
        document += [render(scene), f"This was the {order} picture."]
    question = f"Question: Which pictures have {a(name)}? Answer: {answer}."
    return [*document[:-1], f"{document[-1]} {question}"]
