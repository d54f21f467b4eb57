"""How COCO and VQA v2 name an image's file when no list does: by its id in 12 digits, alone or behind `..._`."""

from pathlib import Path


def digits_of(image_id: int | str) -> str:
    """`000000000042` for 42; an id that is text is taken as it is."""
    return f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)


def names_by_digits(folder: Path) -> dict[str, str]:
    """File names in `folder` by the 12 digits that they end in; of several, the first in alphabetical order."""
    names: dict[str, str] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        digits = Path(name).stem.rpartition("_")[2]
        if len(digits) == 12 and digits.isdigit():
            names.setdefault(digits, name)
    return names
