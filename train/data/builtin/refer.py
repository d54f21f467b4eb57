"""Names that single one object out of a scene: "the circle", "the small red object", "the 7"."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        self._keys = {id(o): {way: _traits(o, way) for way in WAYS} for o in scene.objects}
        self._uses = Counter(tuple(t.items()) for keys in self._keys.values() for t in keys.values() if t)

    def unique(self, obj: Object, way: tuple[str, ...]) -> bool:
        traits = self._keys[id(obj)][way]
        return bool(traits) and self._uses[tuple(traits.items())] == 1

    def draw(
        self, rng: random.Random, among: Sequence[Object], without: str | None = None, need: str | None = None
    ) -> Name | None:
        """A random object of `among` and a name of it that does not tell `without` (a digit's value tells its kind)
        and does tell `need`. None where no object has such a name."""
        for obj in rng.sample(among, len(among)):
            ways = [
                way
                for way in WAYS
                if without not in way and (need is None or need in way)
                and not (without == "kind" and "value" in way) and self.unique(obj, way)
            ]  # fmt: skip
            if ways:
                way = rng.choices(ways, [WAYS[w] for w in ways])[0]
                return Name(obj, phrase(self._keys[id(obj)][way]))
        return None


def _traits(obj: Object, way: Iterable[str]) -> dict[str, str]:
    if "value" in way:
        return {} if obj.digit is None else {"value": str(obj.digit)}
    return {trait: getattr(obj, trait) for trait in way}
