"""Names that single one object out of a scene: "the circle", "the small red object", "the 7"."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nmm_serve.train.data.builtin.scene import Object, Scene

# Ways to name an object. Shorter ones are likelier: they leave more for the eye to do.
WAYS: dict[tuple[str, ...], int] = {
    ("kind",): 4,
    ("color",): 4,
    ("color", "kind"): 4,
    ("size",): 2,
    ("size", "kind"): 1,
    ("size", "color"): 1,
    ("size", "color", "kind"): 1,
    ("value",): 1,
}

# A digit's noun is its value.
_FIELDS = {"kind": "kind", "color": "color", "size": "size", "value": "noun"}


def phrase(traits: Mapping[str, str]) -> str:
    """ "small red circle"; "object" stands for the kind where none is given."""
    head = traits.get("value") or traits.get("kind") or "object"
    return " ".join([traits[t] for t in ("size", "color") if t in traits] + [head])


@dataclass(frozen=True, slots=True)
class Name:
    obj: Object
    phrase: str


class Names:
    """A scene's objects with the names that fit exactly one of them."""

    def __init__(self, scene: Scene):
        self.objects = scene.objects
        traits = [(o, way, _traits(o, way)) for o in scene.objects for way in WAYS]
        uses = Counter((way, told) for _, way, told in traits)
        self._ways: dict[int, list[tuple[str, ...]]] = {id(o): [] for o in scene.objects}
        for o, way, told in traits:
            if told is not None and uses[way, told] == 1:
                self._ways[id(o)].append(way)

    def unique(self, obj: Object, way: tuple[str, ...]) -> bool:
        return way in self._ways[id(obj)]

    def draw(
        self, rng: random.Random, among: Sequence[Object], without: str | None = None, need: str | None = None
    ) -> Name | None:
        """A random object of `among` and a name of it that does not tell `without` (a digit's value tells its kind)
        and does tell `need`. None where no object has such a name."""
        hidden = ("kind", "value") if without == "kind" else (without,)
        for obj in rng.sample(among, len(among)):
            ways = [w for w in self._ways[id(obj)] if not any(h in w for h in hidden) and (need is None or need in w)]
            if ways:
                way = rng.choices(ways, [WAYS[w] for w in ways])[0]
                return Name(obj, phrase({trait: getattr(obj, _FIELDS[trait]) for trait in way}))
        return None


def _traits(obj: Object, way: tuple[str, ...]) -> tuple[object, ...] | None:
    """What `way` tells of `obj`; None where it does not apply."""
    if way == ("value",) and obj.digit is None:
        return None
    return tuple([getattr(obj, _FIELDS[trait]) for trait in way])
