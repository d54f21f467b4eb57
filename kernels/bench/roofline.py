"""The fastest that this very device could be: its copy bandwidth and its matrix rate, measured in the same run."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nmm_serve.kernels.bench.device import Device


@dataclass(frozen=True)
class Work:
    num_bytes: int
    flops: int


@dataclass(frozen=True)
class Roofline:
    """Bytes and floating-point operations a second."""

    bandwidth: float
    flop_rate: float

    def seconds(self, work: Work) -> float:
        return max(work.num_bytes / self.bandwidth, work.flops / self.flop_rate)

    def bound(self, work: Work) -> str:
        return "bandwidth" if work.num_bytes / self.bandwidth > work.flops / self.flop_rate else "compute"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "definition": "bandwidth: bytes read and written a second by a large copy; flop_rate: of a large square "
            "matrix product in the benchmark's dtype; medians"
        }


def measure(device: Device, dtype: torch.dtype, repeats: int = 9) -> Roofline:
    """Random numbers, not zeros: a GPU multiplies zeros faster than it ever will anything else."""
    size = 1 << (30 if device.kind == "cuda" else 24)  # bytes
    generator = torch.Generator(device.kind).manual_seed(0)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.kind, generator=generator)
    target = torch.empty_like(source)
    bandwidth = 2 * size / _median(device, lambda: target.copy_(source), repeats)
    side = 8192 if device.kind == "cuda" else 256
    a, b = (torch.randn(side, side, device=device.kind, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    flop_rate = 2 * side**3 / _median(device, lambda: torch.mm(a, b, out=out), repeats)
    return Roofline(bandwidth, flop_rate)


def _median(device: Device, function, repeats: int) -> float:
    for _ in range(2):
        function()
    return statistics.median(device.elapsed(function) for _ in range(repeats))
