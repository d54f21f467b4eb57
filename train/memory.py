"""How a process on a CPU holds the memory that its tensors free."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Have glibc give freed memory to the next tensor instead of back to the system, from now on and for the process.

    Every step frees and takes the same activations. Left to itself, glibc maps each block above 32 MiB anew, and the
    system clears it page by page at first touch, which takes a tenth of a step and more; the peak is the same. Returns
    whether the C library is one that can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
