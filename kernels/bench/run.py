"""The whole benchmark inside a given time, as the numbers of a record."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nmm_serve.kernels.bench import check, roofline
from nmm_serve.kernels.bench.device import Device
from nmm_serve.kernels.bench.measure import (
    CACHE_MULTIPLE,
    LEAST_ROUNDS,
    MOST_ROUNDS,
    DeviceLost,
    make_copies,
    measure_cell,
    num_copies,
)
from nmm_serve.kernels.bench.peers import PEERS, Peer, Weights
from nmm_serve.kernels.bench.plan import Cell, router_logits, work

SHARE_TIMED = 0.5
"""Of a cell's time; the other half is for building, checking and warming up."""

DEFINITIONS = {
    "seconds": "of the whole layer after the router's logits: choice of experts, sorting, products, combination; in "
    "the train regime forward and backward with the gradients of x, the logits and all weights",
    "samples": "one pass over all copies of the weights, divided by their number; peers take turns, A B C A B C",
    "eager": "launched call by call from Python",
    "graph": "the same pass replayed as one CUDA graph",
    "of_roofline": "roofline seconds / median seconds; the roofline is the larger of least bytes / measured copy "
    "bandwidth and operations / measured matrix rate, with only the experts that the routing uses",
    "ratio_to_best_peer": "fastest peer's median / our median, each in its faster mode; above 1 we are faster",
    "cold": f"copies of the weights used in turn hold more than {CACHE_MULTIPLE} times the L2 cache",
    "check": f"relative error to float32 before timing, of the whole batch's output at {check.TOKENS} of its tokens; "
    "in the train regime also of the gradients of x and the logits at these tokens, and of the weights' gradients, of "
    "the whole batch with an output gradient that is zero at all other tokens",
    "bound": "a peer with is_bound is no implementation: two batched products on equal, already sorted groups",
    "rounds": f"at least {LEAST_ROUNDS}, at most {MOST_ROUNDS}, as the time allows",
}


def run(
    cells: Sequence[Cell],
    device: Device,
    dtype: torch.dtype,
    minutes: float,
    peers: Sequence[Peer] = PEERS,
    progress: Callable[[int, str], None] = lambda done, label: None,
    now: Callable[[], float] = time.monotonic,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Measure the cells in order while there is time for one more as slow as the last. One that would surely take
    longer than what is left is left out. Those that were not reached are named in the result.

    Each cell gets an equal part of the time that is left; what one does not use goes to those after it.

    Args:
        keep: given the result so far after each cell, with `finished` false.

    Raises torch.OutOfMemoryError when there is no memory even to measure the device.
    """
    begin = now()
    deadline = begin + 60 * minutes
    ceiling = roofline.measure(device, dtype)
    measured: list[dict[str, Any]] = []
    skipped: list[str] = []
    copies: list[Weights] = []
    made_for, last = None, 0.0

    def found(to_come: Sequence[Cell], finished: bool) -> dict[str, Any]:
        return {
            "finished": finished,
            "device": {"kind": device.kind, "name": device.name, "cache_bytes": device.cache_bytes},
            "dtype": str(dtype).removeprefix("torch."),
            "definitions": DEFINITIONS,
            "roofline": ceiling.as_dict(),
            "minutes": {"allowed": minutes, "taken": (now() - begin) / 60},
            "peers": {peer.name: presence(peer, measured) for peer in peers},
            "cells": list(measured),
            "not_measured": skipped + [cell.label for cell in to_come],
            "geometric_mean": geometric_means(measured),
        }

    for index, cell in enumerate(cells):
        start = now()
        left = deadline - start
        progress(index, cell.label)
        if left <= last:
            skipped += [later.label for later in cells[index:]]
            break
        needed = least_seconds(cell, measured, ceiling, device, dtype)
        if needed > left:
            skipped.append(f"{cell.label}: would take over {needed:.0f} s, {left:.0f} s were left")
            continue
        training = cell.regime == "train"
        budget = SHARE_TIMED * left / (len(cells) - index)
        try:
            if made_for != (cell.shape, training):
                copies, made_for = [], None
                device.free()
                copies, made_for = make_copies(cell.shape, device, dtype, training), (cell.shape, training)
            measured.append(measure_cell(cell, peers, copies, device, ceiling, budget, now))
        except torch.OutOfMemoryError:
            skipped.append(f"{cell.label}: the device has too little memory")
        except (DeviceLost, torch.AcceleratorError) as error:
            skipped += [f"{cell.label}: {error}", *(later.label for later in cells[index + 1 :])]
            break  # what was measured until now is worth a record
        device.free()
        last = now() - start
        keep(found(cells[index + 1 :], finished=False))
    progress(len(cells), "")
    return found([], finished=True)


def least_seconds(
    cell: Cell, measured: Sequence[dict[str, Any]], ceiling: roofline.Roofline, device: Device, dtype: torch.dtype
) -> float:
    """The least that timing a cell takes: as many rounds as there must be, at the best pace that its regime has shown
    yet; before it has shown any, at the roofline's, for one peer."""
    logits_TE = router_logits(cell, device.kind, torch.Generator(device.kind).manual_seed(1))
    ideal_s = ceiling.seconds(work(cell, logits_TE, dtype.itemsize))
    paces = [
        sum(result[mode]["median_s"] for result in known["results"] for mode in ("eager", "graph") if mode in result)
        / known["roofline"]["seconds"]
        for known in measured
        if known["regime"] == cell.regime
    ]
    return LEAST_ROUNDS * num_copies(cell.shape, device, dtype) * ideal_s * min(paces, default=1.0)


def presence(peer: Peer, cells: Sequence[dict[str, Any]]) -> str:
    """`measured`, or why it never was; `absent` where its library is not installed."""
    results = [result for cell in cells for result in cell["results"] if result["peer"] == peer.name]
    if any("eager" in result for result in results):
        return "measured"
    reasons = sorted({result["reason"] for result in results if result["reason"]})
    missing = [r for r in reasons if r.startswith(("ModuleNotFoundError", "ImportError"))]
    if missing:
        return f"absent ({missing[0]})"
    return "; ".join(reasons) or "no cell was measured"


def geometric_means(cells: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Of `ratio_to_best_peer`: of each regime, and of all. None where no cell has a ratio."""

    def mean(chosen: Sequence[dict[str, Any]]) -> float | None:
        ratios = [cell["ratio_to_best_peer"] for cell in chosen if cell["ratio_to_best_peer"] is not None]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    regimes = dict.fromkeys(cell["regime"] for cell in cells)
    return {regime: mean([c for c in cells if c["regime"] == regime]) for regime in regimes} | {"all": mean(cells)}
