"""Move a model's weights into huge pages, where Linux offers them to programs that ask.

A token of decode reads every weight once; in pages of 4 KiB each of them costs a walk through the page tables, since no
processor keeps that many at hand. ONNX Runtime allocates its own weights and does not ask. Measured: docs/ONNX.md.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 2 << 20
"""Bytes of a huge page on x86-64 and on ARM with pages of 4 KiB."""
FILLED = 0.75
"""A mapping with less of it in memory stays as it is: a huge page would fill the rest (thread stacks, arenas)."""
_ADVISE, _COLLAPSE = 14, 25
"""MADV_HUGEPAGE, and MADV_COLLAPSE, which acts at once (Linux 6.1)."""
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPPINGS = Path("/proc/self/smaps")

Span = tuple[int, int]


@contextmanager
def huge_pages() -> Iterator[None]:
    """What the block allocates and keeps goes into huge pages. Does nothing where the system has none or says never,
    or does not tell a process its own memory."""
    if not all(os.access(file, os.R_OK) for file in (_SETTING, _MAPPINGS)) or "[never]" in _SETTING.read_text():
        yield
        return
    before = [span for span, _ in _private_mappings()]
    yield
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for mapping, filled in _private_mappings():
        for start, end in without(mapping, before) if filled >= FILLED else []:
            for page in range(-(-start // SIZE) * SIZE, end - SIZE + 1, SIZE):
                # a refusal (an older kernel, no free huge page) leaves the page as it was: slower, not wrong
                madvise(page, SIZE, _ADVISE)
                madvise(page, SIZE, _COLLAPSE)


def without(span: Span, others: list[Span]) -> list[Span]:
    """The parts of `span` that lie in none of the others."""
    parts = [span]
    for start, end in others:
        parts = [
            (low, high)
            for part in parts
            for low, high in ((part[0], min(part[1], start)), (max(part[0], end), part[1]))
            if low < high
        ]
    return parts


def _private_mappings() -> list[tuple[Span, float]]:
    """Memory of this process that is no file's and can be written, with the share of it that is present."""
    found: list[tuple[Span, float]] = []
    span: Span | None = None
    for line in _MAPPINGS.read_text("utf-8", "replace").splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            span = (start, end) if fields[1] == "rw-p" and fields[4] == "0" else None
        elif fields[0] == "Rss:" and span is not None:
            found.append((span, int(fields[1]) * 1024 / (span[1] - span[0])))
    return found
