"""Shared by all tests: the path they import from, and why some are skipped."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nmm_serve.vllm_plugin import vllm_distribution

ROOT = Path(__file__).parents[1]
# From the root, `import kernels` or `import train` would find the source folders a second time, under a wrong name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
# On a machine with a GPU the suite runs without it first, and vLLM's CUDA build does not work without one.
if (vllm_distribution() or ("", ""))[0] == "vllm" and not torch.cuda.is_available():
    sys.modules["vllm"] = None  # type: ignore[assignment]  # `importorskip` finds none
# Tests are imported one by one (--import-mode=importlib), so shared helpers need a place on the path.
sys.path.insert(0, str(ROOT / "tests/support"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bit for bit: the order of sums follows from the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("java") and shutil.which("java") is None:
        pytest.skip("needs a Java runtime on the PATH")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and a run of its own: pytest -m gpu")
