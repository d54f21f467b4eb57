import ctypes
import mmap
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmm_serve.onnx import huge_pages as module
from nmm_serve.onnx.huge_pages import SIZE, huge_pages, without

spans = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted).map(tuple)


@given(spans, st.lists(spans, max_size=5))
def test_without_is_the_difference_of_sets(span, others):
    def numbers(start, end):
        return set(range(start, end))

    left = [numbers(*part) for part in without(span, others)]
    assert set().union(*left) == numbers(*span).difference(*(numbers(*other) for other in others))
    assert sum(map(len, left)) == len(set().union(*left))


def taken(filled: int, apart: bool = False) -> mmap.mmap:
    """16 MiB of memory of its own, the first `filled` bytes of it present. `apart`: Linux joins neighbours that are
    alike into one mapping, and this one is to be unlike."""
    memory = mmap.mmap(-1, 8 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if apart:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    memory.write(b"x" * filled)
    return memory


def huge_bytes(memory: mmap.mmap) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    within, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            within = start < address + len(memory) and end > address
        elif within and fields[0] == "AnonHugePages:":
            found += int(fields[1]) * 1024
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are Linux's")
def test_what_a_block_allocates_moves():
    if not module._SETTING.exists() or "[never]" in module._SETTING.read_text():
        pytest.skip(f"{module._SETTING} says never, or is missing")
    before = taken(8 * SIZE, apart=True)
    with huge_pages():
        kept, sparse = taken(8 * SIZE), taken(SIZE, apart=True)
    if not huge_bytes(kept):
        pytest.skip("this kernel does not collapse pages at once (Linux 6.1 does), or has no huge page left")
    assert huge_bytes(kept) >= 4 * SIZE
    assert bytes(kept) == b"x" * 8 * SIZE
    assert huge_bytes(sparse) == huge_bytes(before) == 0


@pytest.mark.parametrize("absent", ["_SETTING", "_MAPPINGS", "never"])
def test_a_system_without_them_is_left_alone(monkeypatch, tmp_path, absent):
    for name in ("_SETTING", "_MAPPINGS"):
        file = tmp_path / name
        file.write_text("always madvise [never]\n" if absent == "never" else "always [madvise] never\n")
        monkeypatch.setattr(module, name, file)
    if absent != "never":
        (tmp_path / absent).unlink()
    monkeypatch.setattr(module, "_private_mappings", lambda: pytest.fail("looked at the memory"))
    done = False
    with huge_pages():
        done = True
    assert done
