"""Devices and peers of known times, for the benchmark of the experts layer."""

import torch

from nmm_serve.kernels.bench import check
from nmm_serve.kernels.bench.device import CpuDevice
from nmm_serve.kernels.bench.measure import make_copies, measure_cell
from nmm_serve.kernels.bench.peers import Peer, Prepared
from nmm_serve.kernels.bench.plan import Cell, Shape
from nmm_serve.kernels.bench.roofline import Roofline

TINY = Shape("tiny", 16, 24)


def a_cell(regime="prefill", tokens=20, top_k=2, routing="multinomial") -> Cell:
    return Cell(TINY, regime, tokens, top_k, routing)


class FakeDevice(CpuDevice):
    """Tells the time that the peer in `seconds` was said to take; its clock stands still otherwise."""

    name, cache_bytes = "fake", 3 * 8 * TINY.weights * 4

    def __init__(self, seconds, graphs=False):
        self.seconds, self.graphs, self.time, self.order = seconds, graphs, 0.0, []
        self.seen: list[str] = []

    def elapsed(self, function):
        self.seen.clear()
        function()
        name = self.seen[0] if self.seen else "roofline"
        self.order.append(name)
        seconds = self.seconds.get(name, 1e-3) * max(1, len(self.seen))
        self.time += seconds
        return seconds

    def capture(self, function):
        return function if self.graphs else None

    def now(self):
        return self.time

    def peer(self, name, scale=1.0, **options):
        """The exact layer under a name, times `scale`."""

        def prepare(weights, top_k):
            def layer(x, logits):
                self.seen.append(name)
                return check.exact_layer(x, logits, weights.gate_up, weights.down, top_k) * scale

            return Prepared(layer, (weights.gate_up, weights.down))

        return Peer(name, prepare, **options)


class FragileDevice(FakeDevice):
    """Dead from `die` on, as whoever asks it next finds out."""

    dead = False

    def die(self, error):
        self.dead = True
        raise error

    def synchronize(self):
        if self.dead:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


NO_IMAGE = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")


def in_cell(device, peers, cell=None, budget_s=0.0):
    cell = cell or a_cell()
    copies = make_copies(TINY, device, torch.float32, cell.regime == "train")
    return measure_cell(cell, peers, copies, device, Roofline(1e9, 1e12), budget_s, device.now)
