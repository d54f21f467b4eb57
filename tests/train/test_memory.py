"""Memory that a CPU process keeps for the tensors to come."""

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from nmm_serve.train.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults = [faults_of_a_tensor() for _ in range(32)]
print(sum(faults[-8:]))  # the first ones find no free block yet that is large enough
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_the_next_tensor_takes_the_freed_ones_pages():
    faults = {
        way: int(subprocess.run([sys.executable, "-P", "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("kept", "left")
    }
    assert faults["kept"] * 100 < faults["left"], faults
