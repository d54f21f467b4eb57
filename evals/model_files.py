"""Which files in a model's folder are the model: training and evaluations leave others there."""

from pathlib import Path

ANSWERS = "answers"
"""The folder of kept answers, beside a record."""
_NO_MODEL_FILE = frozenset({".html", ".jsonl", ".log", ".md", ".png", ".svg"})
"""What evaluations, and people, put beside weights."""


def model_files(folder: Path) -> list[Path]:
    """All files of the model in `folder`, sorted: without `training/`, records, reports and kept answers."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and _is_of_the_model(path, folder))


def _is_of_the_model(path: Path, folder: Path) -> bool:
    if path.relative_to(folder).parts[0] in ("training", ANSWERS) or path.suffix in _NO_MODEL_FILE:
        return False
    if path.suffix != ".json":
        return True
    with path.open("rb") as stream:
        return b'"format": "nmm-serve/' not in stream.read(200)
