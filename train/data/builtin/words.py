"""The closed vocabulary of the built-in data and the little grammar that its sentences share."""

from collections.abc import Sequence

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
KINDS = (*SHAPES, "digit")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "gray")
SIZES = ("small", "large")
# Cells of a 3 x 3 grid over the image, row by row.
CELLS = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# The second word that some annotators use. Evaluation counts an answer that three of ten gave as right.
SYNONYMS = {"gray": "grey", "large": "big", "digit": "number", "nothing": "none"}


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def a(phrase: str) -> str:
    """`phrase` with its indefinite article."""
    return ("an " if phrase[0] in "aeiou8" else "a ") + phrase


def join(parts: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def count_noun(count: int, noun: str) -> str:
    """ "no circles", "one circle", "two circles"."""
    number = "no" if count == 0 else NUMBERS[count]
    return f"{number} {noun if count == 1 else plural(noun)}"


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
