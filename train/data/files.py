"""Files of a source: names expanded, and random access that forked workers can share."""

import glob
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path

from nmm_serve.errors import DataError


def expand(paths: Sequence[Path], suffixes: Sequence[str], where: str) -> list[Path]:
    """Files in the order given: a pattern (`*`, `?`, `**`) stands for what it matches, each file once, a folder for its
    files with one of `suffixes`, both sorted. Raises DataError for what does not exist, and for a file with another
    suffix."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in suffixes)
            if not found:
                raise DataError(f"{where}: no {' or '.join(suffixes)} file in {path}")
        elif path.exists():
            found = [path]
        else:
            matches = sorted((Path(m) for m in glob.glob(str(path), recursive=True)), key=lambda m: (len(m.parts), m))
            # once each: `**` follows links, and one to a folder above it leads to the same files forty times over
            found = sorted({(m.parent.resolve(), m.name): m for m in reversed(matches)}.values())
            if not found:
                raise DataError(f"{where}: {path} does not exist")
        files += found
    for file in files:
        if file.suffix not in suffixes:
            raise DataError(f"{where}: {file} is no {' or '.join(suffixes)} file")
    return files


class ReadAt:
    """Reads bytes at an offset. Positioned reads have no shared file position, so that forked workers may use one
    descriptor; it is opened on first use and never pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def __call__(self, offset: int, size: int) -> bytes:
        """Raises DataError when the file has become shorter or cannot be read."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            data = os.pread(self._descriptor, size, offset)
            while 0 < len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise DataError(f"{self.path} ends before byte {offset + size}; it changed while it was in use")
        return data

    def __getstate__(self) -> dict:
        return {"path": self.path, "_descriptor": None}

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """`os` may be gone before this, when the interpreter ends."""
        if self._descriptor is not None:
            close(self._descriptor)
            self._descriptor = None


class Lines:
    """The lines of a text file by number, blank ones left out. The file is scanned once; a line costs 16 bytes."""

    def __init__(self, path: Path) -> None:
        """Raises DataError when the file cannot be read."""
        self._read = ReadAt(path)
        self._spans = array("q")  # start and size in turn
        self._numbers = array("q")
        try:
            with path.open("rb") as file:
                start = 0
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        self._spans.extend((start, len(line)))
                        self._numbers.append(number)
                    start += len(line)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._numbers)

    def name(self, index: int) -> str:
        """File and line number, from 1."""
        return f"{self._read.path.name}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> bytes:
        return self._read(*self._spans[2 * index : 2 * index + 2])


def decode(data: bytes, name: str) -> str:
    """UTF-8 text, a byte order mark left out. Raises DataError naming the document."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text (byte {error.start})") from None


def locate(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """Which part holds item `index`, and the index in that part; `ends` are running totals of the parts' sizes."""
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)
