"""One cell: prepare every peer, check it, time all of them in turn.

Cold cache: a call never finds its weights in the L2, since the copies of the weights that are used in turn are many
times as large. Interleaved: A, B, C, A, B, C, ... so that clocks and neighbours disturb all alike.

Legend: T tokens, D hidden size, E experts.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nmm_serve.kernels.bench import check
from nmm_serve.kernels.bench.device import Device, Pass
from nmm_serve.kernels.bench.peers import OURS, Peer, Prepared, Weights
from nmm_serve.kernels.bench.plan import Cell, Shape, router_logits, step_bytes, work
from nmm_serve.kernels.bench.roofline import Roofline

CACHE_MULTIPLE = 4
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
WARMUP = 2
MOST_GRAPH_BYTES = 6e9
"""Of a training step: a graph keeps the step's memory while the other peers run. Steps that take more are so long that
launches no longer count."""


def make_copies(shape: Shape, device: Device, dtype: torch.dtype, requires_grad: bool) -> list[Weights]:
    """At least two, and together with the one in use many times the cache. The first is drawn, the others are its
    copies: what is multiplied is the same, where it lies is not."""
    generator = torch.Generator(device.kind).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        out = torch.empty(size, dtype=dtype, device=device.kind)
        return out.normal_(0, size[-1] ** -0.5, generator=generator).requires_grad_(requires_grad)

    E, D, width = shape.experts, shape.hidden, shape.intermediate
    first = Weights(draw(E, 2 * width, D), draw(E, D, width))
    others = [
        Weights(*(w.detach().clone().requires_grad_(requires_grad) for w in (first.gate_up, first.down)))
        for _ in range(num_copies(shape, device, dtype) - 1)
    ]
    return [first, *others]


def num_copies(shape: Shape, device: Device, dtype: torch.dtype) -> int:
    num_bytes = shape.experts * shape.weights * dtype.itemsize
    return max(2, math.ceil(CACHE_MULTIPLE * device.cache_bytes / num_bytes) + 1)


class DeviceLost(RuntimeError):
    """A kernel failed in a way that the device does not recover from."""


def raise_if_lost(device: Device, peer: Peer, error: Exception) -> None:
    """The device alone knows whether an error was its end: one kind of exception tells of kernels that were built for
    another GPU as well as of crashes, and crashes come as many kinds. Raises DeviceLost."""
    try:
        device.synchronize()
    except Exception:
        raise DeviceLost(f"{peer.name} took the device down: {first_line(error)}") from error


@dataclass
class Entry:
    """One peer in one cell."""

    peer: Peer
    reason: str | None = None
    """Why there is no time."""
    error: float | None = None
    peak_bytes: int | None = None
    graph_reason: str | None = None
    """Why there is no graph."""
    passes: dict[str, Pass] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self, ideal_s: float, num_flops: int, num_bytes: int) -> dict[str, Any]:
        result: dict[str, Any] = {
            "peer": self.peer.name,
            "is_bound": self.peer.is_bound,
            "reason": self.reason,
            "error": self.error,
            "peak_bytes": self.peak_bytes,
            "graph_reason": self.graph_reason,
        }
        for mode, samples in self.samples.items():
            low, median, high = quartiles(samples)
            result[mode] = {
                "n": len(samples),
                "median_s": median,
                "quartiles_s": [low, high],
                "of_roofline": ideal_s / median,
                "tflop_per_s": num_flops / median / 1e12,
                "gb_per_s": num_bytes / median / 1e9,
            }
        return result


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def measure_cell(
    cell: Cell,
    peers: Sequence[Peer],
    copies: Sequence[Weights],
    device: Device,
    roofline: Roofline,
    budget_s: float,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Returns the cell's part of the record. `budget_s` bounds the timing; preparing and checking come before."""
    dtype = copies[0].down.dtype
    generator = torch.Generator(device.kind).manual_seed(1)
    logits_TE = router_logits(cell, device.kind, generator)
    x_TD = torch.randn(cell.tokens, cell.shape.hidden, device=device.kind, generator=generator).to(dtype)
    dy_TD = torch.randn(x_TD.shape, device=device.kind, generator=generator).to(dtype)
    least = work(cell, logits_TE, x_TD.element_size())
    ideal_s = roofline.seconds(least)
    entries = [Entry(peer) for peer in peers]
    expected = Expected(cell, copies[0], x_TD, logits_TE, dy_TD)
    for entry in entries:
        try:
            prepare(entry, cell, copies, device, expected)
        except DeviceLost:
            raise
        except Exception as error:  # other people's code: anything may be raised, and the others go on
            give_up(entry, error, device)
    running = [(entry, mode) for entry in entries for mode in entry.passes]
    deadline = now() + budget_s
    for number in range(MOST_ROUNDS):
        for entry, mode in running:
            if mode not in entry.passes:
                continue
            try:
                sample = device.elapsed(entry.passes[mode]) / len(copies)
            except Exception as error:
                give_up(entry, error, device)
            else:
                entry.samples.setdefault(mode, []).append(sample)
        if now() >= deadline and number + 1 >= LEAST_ROUNDS:
            break
    clock_mhz = device.clock_mhz()  # at once, while it is still what the load made of it
    results = [entry.as_dict(ideal_s, least.flops, least.num_bytes) for entry in entries]
    return {
        "shape": cell.shape.name, "hidden": cell.shape.hidden, "intermediate": cell.shape.intermediate,
        "experts": cell.shape.experts, "regime": cell.regime, "tokens": cell.tokens, "top_k": cell.top_k,
        "routing": cell.routing, "weight_copies": len(copies), "sm_clock_mhz": clock_mhz,
        "roofline": {"seconds": ideal_s, "bytes": least.num_bytes, "flops": least.flops,
                     "bound": roofline.bound(least)},
        "results": results, **compare(results),
    }  # fmt: skip


def give_up(entry: Entry, error: Exception, device: Device) -> None:
    """Go on without this peer. Raises DeviceLost where nobody can go on."""
    raise_if_lost(device, entry.peer, error)
    entry.reason = first_line(error)
    entry.passes.clear()
    entry.samples.clear()


class Expected:
    """What float32 gives for the cell, worked out once for all peers."""

    def __init__(self, cell: Cell, weights: Weights, x_TD, logits_TE, dy_TD):
        self.weights, self.x_TD, self.logits_TE, self.dy_TD = weights, x_TD, logits_TE, dy_TD
        self.training = cell.regime == "train"
        sample = torch.linspace(0, cell.tokens - 1, min(check.TOKENS, cell.tokens), dtype=torch.float64)
        self.sample = sample.round().long().to(x_TD.device)
        both = (
            weights.gate_up.detach().requires_grad_(self.training),
            weights.down.detach().requires_grad_(self.training),
        )

        def layer(x, logits):
            return check.exact_layer(x, logits, *both, cell.top_k)

        with torch.no_grad():
            self.y = layer(x_TD[self.sample], logits_TE[self.sample])
        self.gradients: list[torch.Tensor] = []
        if self.training:
            x, logits, dy = (tensor[self.sample] for tensor in (x_TD, logits_TE, dy_TD))
            self.gradients = check.gradients(layer, x, logits, both, dy)

    def gradients_of(self, prepared: Prepared) -> list[torch.Tensor]:
        """What a peer gives for `gradients`: of the whole batch, with no gradient coming from the other tokens."""
        dy_TD = torch.zeros_like(self.dy_TD).index_copy_(0, self.sample, self.dy_TD[self.sample])
        dx_TD, dlogits_TE, *others = check.gradients(
            prepared.layer, self.x_TD, self.logits_TE, prepared.parameters, dy_TD
        )
        return [dx_TD[self.sample], dlogits_TE[self.sample], *others]


def prepare(entry: Entry, cell: Cell, copies: Sequence[Weights], device: Device, expected: Expected) -> None:
    """Build, check, warm up, capture. Says in `entry.reason` why a peer takes no part."""
    peer, training = entry.peer, cell.regime == "train"
    if peer.gpu_only and device.kind != "cuda":
        entry.reason = "needs a GPU"
    elif training and not peer.trains:
        entry.reason = "has no backward pass"
    elif peer.most_tokens is not None and cell.tokens > peer.most_tokens:
        entry.reason = f"not run beyond {peer.most_tokens} tokens"
    if entry.reason is not None:
        return
    prepared = [peer.prepare(copy, cell.top_k) for copy in copies]
    if not peer.is_bound:
        check_peer(entry, prepared[0], expected)
        if entry.reason is not None:
            return
    x_TD, logits_TE = expected.x_TD, expected.logits_TE

    def forward() -> None:
        with torch.inference_mode():
            for one in prepared:
                one.layer(x_TD, logits_TE)

    def forward_backward() -> None:
        for one in prepared:
            check.gradients(one.layer, x_TD, logits_TE, one.parameters, expected.dy_TD)

    run = forward_backward if training else forward
    device.reset_peak()
    for _ in range(WARMUP):
        run()
    device.synchronize()
    entry.peak_bytes = device.peak_bytes()
    entry.passes["eager"] = run
    if not peer.graph:
        entry.graph_reason = "waits for the host"
        return
    if training and step_bytes(cell, expected.x_TD.element_size()) > MOST_GRAPH_BYTES:
        entry.graph_reason = f"not captured: a step holds over {MOST_GRAPH_BYTES / 1e9:g} GB"
        return
    try:
        captured = device.capture(run)
        if captured is None:
            entry.graph_reason = "the device has no graphs"
        else:
            captured()
            device.synchronize()
            entry.passes["graph"] = captured
    except Exception as error:
        raise_if_lost(device, peer, error)
        entry.graph_reason = first_line(error)


def check_peer(entry: Entry, prepared: Prepared, expected: Expected) -> None:
    """Set the error, and the reason when it is too large."""
    bound = check.BOUND[expected.x_TD.dtype]
    with torch.inference_mode():
        y_TD = prepared.layer(expected.x_TD, expected.logits_TE)
    errors = {"output": check.error(y_TD[expected.sample], expected.y)}
    if expected.training:
        names = ("gradient of x", "gradient of the logits", "gradient of gate_up", "gradient of down")
        actual = expected.gradients_of(prepared)
        for name, ours, theirs in zip(names, actual, expected.gradients, strict=True):
            if name == "gradient of gate_up" and prepared.parameters[0] is not expected.weights.gate_up:
                continue  # its rows are in another order
            errors[name] = check.error(ours, theirs)
    entry.error = max(errors.values())
    wrong = [f"{name} {value:.1e}" for name, value in errors.items() if not value <= bound]
    if wrong:
        entry.reason = f"wrong: relative error of {', '.join(wrong)} is over {bound:.0e}"
        if not math.isfinite(entry.error):
            entry.error = None


def compare(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our best mode against the best of the others: `ratio` above 1 means that we are faster."""

    def fastest(result: dict[str, Any]) -> float | None:
        return min((result[mode]["median_s"] for mode in ("eager", "graph") if mode in result), default=None)

    times = {result["peer"]: fastest(result) for result in results if not result["is_bound"]}
    mine = times.pop(OURS, None)
    others = {name: seconds for name, seconds in times.items() if seconds is not None}
    best = min(others, key=lambda name: others[name], default=None)
    ratio = others[best] / mine if best is not None and mine is not None else None
    return {"best_peer": best, "ratio_to_best_peer": ratio}
