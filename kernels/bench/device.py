"""Where the benchmark runs: clocks, graphs, memory. A GPU, or a CPU to try the benchmark itself."""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

import torch

Pass = Callable[[], object]
"""Runs the layer once over every copy of the weights."""


class Device(Protocol):
    kind: str
    name: str
    cache_bytes: int
    """Of the last cache before memory."""
    shared_bytes: int | None
    """Shared memory of one program, at most; None where nobody tells."""

    def elapsed(self, function: Pass) -> float:
        """Seconds that one call takes on the device."""
        ...

    def synchronize(self) -> None: ...

    def capture(self, function: Pass) -> Pass | None:
        """The call as a CUDA graph, to be replayed; None where there are no graphs."""
        ...

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        """The most memory that was used at once since `reset_peak`, over what was held then."""
        ...

    def clock_mhz(self) -> int | None:
        """The clock of the multiprocessors now; None where nobody tells."""
        ...

    def free(self) -> None:
        """Give back what is no longer referenced."""
        ...


class CudaDevice:
    kind = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name = properties.name
        self.cache_bytes = properties.L2_cache_size
        # torch for ROCm does not tell
        self.shared_bytes: int | None = getattr(properties, "shared_memory_per_block_optin", None)
        self.held_bytes = 0
        self.uuid = properties.uuid

    def elapsed(self, function: Pass) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, function: Pass) -> Pass | None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                function()
        finally:  # when the capture fails, torch leaves its stream in place
            torch.cuda.set_stream(stream)
        return graph.replay

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self.held_bytes = torch.cuda.memory_allocated()

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.held_bytes

    def clock_mhz(self) -> int | None:
        if shutil.which("nvidia-smi") is None:
            return None
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", f"--id=GPU-{self.uuid}"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (subprocess.TimeoutExpired, OSError):
            return None
        line = answer.stdout.strip()
        return int(line) if answer.returncode == 0 and line.isdigit() else None

    def free(self) -> None:
        torch.cuda.empty_cache()


class CpuDevice:
    kind = "cpu"
    cache_bytes = 0
    shared_bytes: int | None = None

    def __init__(self) -> None:
        self.name = platform.processor() or platform.machine()

    def elapsed(self, function: Pass) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    def synchronize(self) -> None: ...

    def capture(self, function: Pass) -> Pass | None:
        return None

    def reset_peak(self) -> None: ...

    def peak_bytes(self) -> int | None:
        return None

    def clock_mhz(self) -> int | None:
        return None

    def free(self) -> None: ...
