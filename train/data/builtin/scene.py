"""What a picture of the built-in data shows: a list of objects on a background, drawn from a seed."""

import functools
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from nmm_serve.errors import ConfigError, DataError, unknown_name
from nmm_serve.train.data.builtin import digits
from nmm_serve.train.data.builtin.words import CELLS, COLORS, KINDS, SIZES

SPLITS = ("train", "val", "test")
IMAGE_SIZE = 64  # pixels, both sides
# Side of an object's square box in pixels. Much larger, and five large objects would find no room.
EXTENT = {"small": 14, "large": 20}
# Centres stay clear of the lines between the thirds of the image, so that every object has one plain place.
BANDS = ((8, 19), (25, 39), (45, 56))
# The middles of the thirds, where `jitter` starts from.
MIDDLES = (11, 32, 53)
# "left of" and "above" are only said of centres at least this far apart (pixels): one patch of 8 x 8.
CLEARLY_APART = 8
# More large objects would often find no room.
MAX_OBJECTS = 5
PLACE_TRIES = 200  # each succeeds one time in eight or more where there is any jitter to speak of


@dataclass(frozen=True, slots=True)
class Object:
    """One thing in a scene. `x`, `y`: centre in pixels. `digit`, `glyph`: the value of a handwritten digit and which
    image of `digits.images()` shows it; None for shapes."""

    kind: str
    color: str
    size: str
    x: int
    y: int
    digit: int | None = None
    glyph: int | None = None

    @property
    def extent(self) -> int:
        return EXTENT[self.size]

    @property
    def cell(self) -> str:
        return CELLS[_band(self.y) * 3 + _band(self.x)]

    @property
    def noun(self) -> str:
        """What a person would call it: "circle", or the digit that is written."""
        return self.kind if self.digit is None else str(self.digit)


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in reading order, and the seed of everything that carries no meaning (background, noise, tint)."""

    objects: tuple[Object, ...]
    background: int


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How much there is to learn in a picture.

    `jitter`: how far from the middle of its cell an object may lie, in pixels each way; None for anywhere in the cell.
    A model has to see every kind of object at every offset. `max_objects`: 2 to 5. Finding one thing among three, or
    comparing two of them, is learned in fewer steps than among five. Raises ConfigError for other values.
    """

    jitter: int | None = None
    max_objects: int = MAX_OBJECTS

    def __post_init__(self) -> None:
        if self.jitter is not None and self.jitter < 0:
            raise ConfigError(f"a jitter of {self.jitter} pixels for the built-in data; expected 0 or more")
        if not 2 <= self.max_objects <= MAX_OBJECTS:
            raise ConfigError(f"max_objects {self.max_objects} for the built-in data; expected 2 to {MAX_OBJECTS}")


STANDARD = Difficulty()


@dataclass(frozen=True, slots=True)
class Count:
    """The counting question that a scene was made for. `value` is a kind, a color, a size, or None for all objects."""

    value: str | None
    answer: int


def stream(name: str, split: str, index: int, seed: int) -> random.Random:
    """The random stream of one example: its own for every (name, split, index, seed)."""
    if split not in SPLITS:
        raise DataError(unknown_name("split of the built-in data", split, SPLITS))
    if index < 0:
        raise DataError(f"index {index} of the built-in data is negative; expected 0 or more")
    return random.Random(f"builtin/{name}/{split}/{index}/{seed}")


def in_split(fingerprint: str, split: str) -> bool:
    """Whether `split` owns the content that `fingerprint` describes: an eighth each for val and test, the rest train.

    Streams with other seeds can meet by chance. Letting the content decide where it belongs makes
    the splits disjoint whatever the seeds are.
    """
    slot = zlib.crc32(fingerprint.encode()) % 8
    return split == ("val", "test")[slot] if slot < 2 else split == "train"


def sample_scene(rng: random.Random, split: str, difficulty: Difficulty = STANDARD) -> tuple[Scene, Count]:
    """A scene of 1 to `max_objects` objects, and the counting question whose answer was drawn before the scene was."""
    most = difficulty.max_objects
    if rng.random() < 0.25:
        count = Count(None, rng.randint(1, most))
        choices, value = None, None
    else:
        choices = rng.choices((KINDS, COLORS, SIZES), weights=(4, 4, 2))[0]
        value = rng.choice(choices)
        count = Count(value, rng.randint(0, most - 1))
    while True:
        if choices is None or value is None:
            traits = [_draw_traits(rng) for _ in range(count.answer)]
        else:
            traits = _traits_with(rng, choices, value, count.answer, most)
        objects = place(rng, split, traits, difficulty.jitter)
        if objects is not None:
            return Scene(objects, rng.getrandbits(32)), count


def place(
    rng: random.Random, split: str, traits: list[tuple[str, str, str]], jitter: int | None
) -> tuple[Object, ...] | None:
    """Objects with the given (kind, color, size), at places and with digits that belong to `split`. None where none
    were found: with little jitter, a lone object has so few places that a split may own none of them."""
    pools = digits.pools(split)
    for _ in range(PLACE_TRIES):
        centres = _draw_centres(rng, [EXTENT[size] for _, _, size in traits], jitter)
        # Distinct values keep "the 7" one thing.
        values = rng.sample(range(10), len(traits))
        objects = []
        for (kind, color, size), (x, y), value in zip(traits, centres, values, strict=True):
            if kind == "digit":
                objects.append(Object(kind, color, size, x, y, value, rng.choice(pools[value])))
            else:
                objects.append(Object(kind, color, size, x, y))
        objects.sort(key=lambda o: (_band(o.y), _band(o.x)))
        if in_split(layout(objects), split):
            return tuple(objects)
    return None


def layout(objects: Iterable[Object]) -> str:
    """Everything of a scene that carries meaning, as the fingerprint for `in_split`."""
    return " ".join(f"{o.noun} {o.color} {o.size} {o.x} {o.y}" for o in objects)


def _draw_traits(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(KINDS), rng.choice(COLORS), rng.choice(SIZES)


def _traits_with(
    rng: random.Random, choices: tuple[str, ...], value: str, number: int, most: int
) -> list[tuple[str, str, str]]:
    """Traits of `number` objects with `value`, one of `choices`, and of some others without; at most `most` in all."""
    others = [v for v in choices if v != value]
    slot = (KINDS, COLORS, SIZES).index(choices)
    traits = []
    for i in range(rng.randint(max(1, number), most)):
        drawn = list(_draw_traits(rng))
        drawn[slot] = value if i < number else rng.choice(others)
        traits.append((drawn[0], drawn[1], drawn[2]))
    rng.shuffle(traits)
    return traits


def _draw_centres(rng: random.Random, extents: list[int], jitter: int | None) -> list[tuple[int, int]]:
    """Centres in distinct cells whose boxes lie inside the image, at least a pixel apart."""
    # The large first: they are the hardest to find room for, and a dead end is noticed early.
    order = sorted(range(len(extents)), key=extents.__getitem__, reverse=True)
    while True:
        placed: dict[int, tuple[int, int]] = {}
        for i, cell in zip(order, rng.sample(range(9), len(extents)), strict=True):
            for _ in range(8):
                columns, rows = _reach(cell % 3, extents[i], jitter), _reach(cell // 3, extents[i], jitter)
                x, y = _draw_from(rng, *columns), _draw_from(rng, *rows)
                for k, (px, py) in placed.items():
                    room = (extents[i] + extents[k]) // 2
                    if -room <= x - px <= room and -room <= y - py <= room:
                        break
                else:
                    placed[i] = x, y
                    break
            if i not in placed:
                break
        if len(placed) == len(extents):
            return [placed[i] for i in range(len(extents))]


@functools.cache
def _reach(band: int, side: int, jitter: int | None) -> tuple[int, int]:
    """First and last centre that keeps an object of `side` inside its band and the picture, with a pixel to spare."""
    low, high = BANDS[band]
    if jitter is not None:
        low, high = max(low, MIDDLES[band] - jitter), min(high, MIDDLES[band] + jitter)
    return max(low, side // 2 + 1), min(high, IMAGE_SIZE - side // 2 - 1)


def _draw_from(rng: random.Random, low: int, high: int) -> int:
    # randint does the same at four times the cost, and this is the innermost line of every example.
    return low + int(rng.random() * (high - low + 1))


def _band(centre: int) -> int:
    return centre * 3 // IMAGE_SIZE
