"""Source kind `text`: plain text, JSON lines and Parquet."""

import json
import re
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

from nmm_serve.errors import DataError
from nmm_serve.train.data.documents import Document, text_document
from nmm_serve.train.data.files import Lines, ReadAt, decode, expand, locate
from nmm_serve.train.data.options import Paths
from nmm_serve.train.data.sources import Source, Visit

CACHE_BYTES = 256 * 2**20
"""Decoded Parquet row groups that each process keeps."""
BLANK_LINES = re.compile(rb"\n[ \t\r]*\n\s*")


class Texts(Protocol):
    """The documents of one file."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def text(self, index: int, name: str) -> str: ...


class Text(Source):
    """Documents from files of three kinds, which may be mixed:

    - `.txt`: a file is a document, or with `documents: paragraph` each run of lines between blank lines is one;
    - `.jsonl`: a line is a document, its text under `field`;
    - `.parquet`: a row is a document, its text in the column `field`.

    `path` is a file, a folder, a pattern, or a list of these.
    """

    kind = "text"

    def __init__(
        self,
        name: str,
        *,
        path: Paths,
        field: str = "text",
        documents: Literal["file", "paragraph"] = "file",
    ) -> None:
        self.name = name
        self._files: list[Texts] = []
        for file in expand(path, (".txt", ".jsonl", ".parquet"), f"source {name!r}"):
            if file.suffix == ".jsonl":
                self._files.append(_JsonLines(file, field))
            elif file.suffix == ".parquet":
                self._files.append(_Parquet(file, field))
            else:
                self._files.append(_PlainText(file, documents == "paragraph"))
        self._ends = list(accumulate(len(file) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[Texts, int]:
        file, place = locate(index, self._ends)
        return self._files[file], place

    def item_name(self, index: int) -> str:
        file, place = self._locate(index)
        return f"{self.name}:{file.name(place)}"

    def document(self, index: int, visit: Visit) -> Document:
        file, place = self._locate(index)
        name = self.item_name(index)
        return text_document(file.text(place, name), name=name)


class _PlainText:
    def __init__(self, path: Path, paragraphs: bool) -> None:
        self._path, self._read = path, ReadAt(path)
        try:
            size = path.stat().st_size
            self._spans = _paragraphs(path.read_bytes()) if paragraphs else [(0, size)]
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self._one_document = not paragraphs

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        return self._path.name if self._one_document else f"{self._path.name}#{index}"

    def text(self, index: int, name: str) -> str:
        start, end = self._spans[index]
        return decode(self._read(start, end - start), name)


def _paragraphs(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each run of lines between blank lines."""
    edges = [0, *(edge for gap in BLANK_LINES.finditer(data) for edge in gap.span()), len(data)]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in spans if data[start:end].strip()]


class _JsonLines:
    def __init__(self, path: Path, field: str) -> None:
        self._lines, self._field = Lines(path), field

    def __len__(self) -> int:
        return len(self._lines)

    def name(self, index: int) -> str:
        return self._lines.name(index)

    def text(self, index: int, name: str) -> str:
        try:
            record = json.loads(decode(self._lines[index], name))
        except (ValueError, RecursionError):
            raise DataError(f"{name} is not JSON, or too deeply nested") from None
        text = record.get(self._field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{name}: expected an object with text under {self._field!r}")
        return text


class _Parquet:
    """Row groups are read whole and kept up to `CACHE_BYTES`; a file larger than that wants small row groups."""

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path, self._column = path, column
        try:
            with pq.ParquetFile(path) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (OSError, pa.ArrowException):
            raise DataError(f"{path} is not a readable Parquet file") from None
        if column not in schema.names:
            raise DataError(f"{path} has no column {column!r}; its columns: {', '.join(schema.names)}")
        of_text = schema.field(column).type
        if not (pa.types.is_string(of_text) or pa.types.is_large_string(of_text)):
            raise DataError(f"{path}: column {column!r} holds {of_text}; expected text")
        self._ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        return f"{self._path.name}#{index}"

    def text(self, index: int, name: str) -> str:
        group, row = locate(index, self._ends)
        try:
            text = self._group(group)[row].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: column {self._column!r} is not UTF-8 text (byte {error.start})") from None
        if text is None:
            raise DataError(f"{name}: column {self._column!r} is null")
        return text

    def _group(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        try:
            # opened each time: forked workers must not share a file position. No threads: they do not survive a fork
            with pq.ParquetFile(self._path) as file:
                column = file.read_row_group(group, columns=[self._column], use_threads=False).column(0)
        except (OSError, pa.ArrowException):
            raise DataError(f"{self._path}: row group {group} cannot be read") from None
        self._groups[group] = column
        while len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > CACHE_BYTES:
            self._groups.popitem(last=False)
        return column
