"""Sources from a path alone, for those who read data and do not train on it: the kind follows from the files."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nmm_serve.errors import DataError
from nmm_serve.train.config import load_config
from nmm_serve.train.data.documents import Document, Objective
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.data.sources import Source, Visit, open_source

SUFFIXES = {".tar": "webdataset", ".parquet": "text", ".txt": "text"}
_EXPECTED = (
    "expected a folder with captions_SPLIT.json or vqa_SPLIT_questions.json, a training configuration (.yaml), "
    ".jsonl, .txt, .parquet or .tar files, or a folder of one kind of these"
)


def sources_at(path: Path, split: str) -> list[Source]:
    """Sources of what lies at `path`: a folder of splits, the `data` of a training configuration, or files of text,
    interleaved documents or tar shards.

    Raises DataError for a path that holds none of these, ConfigError for a configuration that is not valid.
    """
    if path.suffix in (".yaml", ".yml"):
        data = load_config(str(path)).data
        return [entry.source for entry in parse_mixture({"sources": data.sources}, Path(data.root)).sources]
    if path.is_dir():
        of_split = [
            open_source({"kind": kind, "name": name, "data": str(path), "split": split})
            for kind, name, file in (
                ("coco_captions", "caption", f"captions_{split}.json"),
                ("vqa_v2", "vqa", f"vqa_{split}_questions.json"),
            )
            if (path / file).is_file()
        ]
        if of_split:
            return of_split
        kinds = {kind for file in sorted(path.iterdir()) if file.is_file() and (kind := _kind(file)) is not None}
        if len(kinds) > 1:
            raise DataError(f"{path} holds files of several kinds ({', '.join(sorted(kinds))}); name the files")
    else:
        if not path.exists():
            raise DataError(f"{path} does not exist; check the path")
        kinds = {kind} if (kind := _kind(path)) is not None else set()
    if not kinds:
        raise DataError(f"{path} holds no data of split {split!r}; {_EXPECTED}")
    return [open_source({"kind": kinds.pop(), "name": path.name, "path": str(path)})]


def sources_of(
    *, images: Path | None, captions: Path | None, questions: Path | None, annotations: Path | None
) -> list[Source]:
    """Sources of COCO captions and VQA v2 files named one by one; what is None is left out."""
    sources = []
    if captions is not None:
        files = {"annotations": str(captions), "images": str(images)}
        sources.append(open_source({"kind": "coco_captions", "name": "caption", **files}))
    if questions is not None and annotations is not None:
        files = {"questions": str(questions), "annotations": str(annotations), "images": str(images)}
        if captions is not None:
            files["captions"] = str(captions)
        sources.append(open_source({"kind": "vqa_v2", "name": "vqa", **files}))
    return sources


def _kind(file: Path) -> str | None:
    if file.suffix != ".jsonl":
        return SUFFIXES.get(file.suffix)
    with file.open("rb") as stream:
        line = stream.readline()
    try:
        record = json.loads(line)
    except ValueError:
        return "text"  # which says what is wrong with the line
    return "interleaved_jsonl" if isinstance(record, dict) and "content" in record else "text"


@dataclass(frozen=True, slots=True)
class Reading:
    """A document of a source that is read when `read` is called, which raises DataError when it cannot be."""

    name: str
    source: str
    read: Callable[[], Document]
    texts: Callable[[], list[str]]
    """Every text of the document in any epoch; `read` gives that of the first."""


def readings(sources: Sequence[Source], objective: Objective = "sft", limit: int | None = None) -> Iterator[Reading]:
    """Every document of the sources once, in file order; of each source the first `limit`."""
    visit = Visit("0", 0, objective)
    for source in sources:
        for index in range(len(source) if limit is None else min(limit, len(source))):
            yield Reading(
                source.item_name(index),
                source.name,
                partial(source.document, index, visit),
                partial(source.texts, index),
            )
