"""Search better tiles for our kernels on this GPU, within a given time, and keep them in the kernels' table.

Coordinate descent from the table's tile: one number at a time to its neighbours, kept if the whole layer gets faster by
more than the noise and still agrees with float32. What is tried is a whole layer, so a tile that slows its neighbour
down is not taken for a gain.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nmm_serve.kernels import moe_configs
from nmm_serve.kernels.bench.device import Device
from nmm_serve.kernels.bench.measure import DeviceLost, Entry, Expected, make_copies, prepare, raise_if_lost
from nmm_serve.kernels.bench.peers import OURS, PEERS, Weights
from nmm_serve.kernels.bench.plan import ROUTINGS, Cell, Shape, router_logits

AXES: dict[str, tuple[int, ...]] = {
    "BM": (32, 64, 128),
    "BN": (16, 32, 64, 128, 256),
    "BK": (32, 64, 128, 256),
    "BD": (32, 64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6, 8),
    "GROUP_M": (1, 4, 8, 16),
    "per_sm": (0, 1, 2),
    "most_mb": (0, 15, 60),
}
KERNELS = {
    "decode": ("decode_up", "decode_down", "slices"),
    "prefill": ("up", "down"),
    "train": ("down_backward", "up_backward", "down_weight_grad", "up_weight_grad"),
}
TOKENS = {"decode": (8, 64), "prefill": (256, 8192), "train": (256, 8192)}
"""One number of tokens for each regime of the kernels' table, at top-2."""
TOP_K = 2
GAIN = 0.98
"""A candidate must take at most this share of the best time so far."""
SAMPLES = 7

Config = dict[str, int]


def search(
    start: Config,
    axes: dict[str, tuple[int, ...]],
    seconds_of: Callable[[Config], float | None],
    time_left: Callable[[], bool],
) -> tuple[Config, float | None, float | None, int]:
    """Returns the best tile, the start's and the best's seconds, and how many were tried.

    `seconds_of` gives None for a tile that does not compile, does not fit or computes something else.
    """
    first = best_s = seconds_of(start)
    best, tried = start, {tuple(sorted(start.items()))}
    improved = True
    while improved and time_left():
        improved = False
        for axis in [axis for axis in axes if axis in start]:
            for candidate in neighbours(best, axis, axes[axis]):
                key = tuple(sorted(candidate.items()))
                if key in tried or not time_left():
                    continue
                tried.add(key)
                seconds = seconds_of(candidate)
                if seconds is not None and (best_s is None or seconds < GAIN * best_s):
                    best, best_s, improved = candidate, seconds, True
    return best, first, best_s, len(tried)


def neighbours(config: Config, axis: str, values: Sequence[int]) -> list[Config]:
    """The next smaller and the next larger value."""
    below = [value for value in values if value < config[axis]]
    above = [value for value in values if value > config[axis]]
    return [{**config, axis: value} for value in (*below[-1:], *above[:1])]


def jobs(shapes: Sequence[Shape], regimes: Sequence[str]) -> list[tuple[str, Cell]]:
    """Each kernel of the regimes, in the cell that it is tuned in."""
    return [
        (kernel, Cell(shape, regime, tokens, TOP_K, ROUTINGS[0]))
        for shape in shapes
        for regime in regimes
        for tokens in TOKENS[regime]
        for kernel in KERNELS[regime]
    ]


def tune(
    jobs: Sequence[tuple[str, Cell]],
    device: Device,
    dtype: torch.dtype,
    minutes: float,
    table: Path = moe_configs.TABLE,
    progress: Callable[[int, str], None] = lambda done, label: None,
    now: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """Tune one kernel after the other, each with an equal part of the time that is left, and write the table after
    each. Returns what was tried and found; it is shorter than `jobs` where the time was. A kernel whose layer does not
    fit into the memory is named with that `reason`.

    Raises DeviceLost when a tile takes the device down.
    """
    deadline = now() + 60 * minutes
    found: list[dict[str, Any]] = []
    copies: list[Weights] = []
    made_for = None
    for index, (kernel, cell) in enumerate(jobs):
        progress(index, f"tune {cell.shape.name} {kernel} T={cell.tokens}")
        left = deadline - now()
        if left <= 0:
            break
        training = cell.regime == "train"
        until = now() + left / (len(jobs) - index)
        try:
            if made_for != (cell.shape, training):
                copies, made_for = [], None
                device.free()
                copies, made_for = make_copies(cell.shape, device, dtype, training), (cell.shape, training)
            found.append(tune_kernel(kernel, cell, copies, device, until, now))
        except torch.OutOfMemoryError:
            nothing = {"tried": 0, "config": None, "before_s": None, "after_s": None}
            reason = "the device has too little memory"
            found.append({**place(kernel, cell, device, dtype), **nothing, "reason": reason})
        write(table)
    return found


def place(kernel: str, cell: Cell, device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """What a tile of the table holds for."""
    shape = cell.shape
    if cell.regime == "decode":
        regime = moe_configs.decode_regime(cell.tokens, dtype)
    else:
        regime = moe_configs.grouped_regime(cell.tokens * cell.top_k, shape.experts, dtype)
    return {
        "device": device.name, "kernel": kernel, "hidden": shape.hidden, "intermediate": shape.intermediate,
        "regime": regime,
    }  # fmt: skip


def tune_kernel(
    kernel: str, cell: Cell, copies: Sequence[Weights], device: Device, until: float, now: Callable[[], float]
) -> dict[str, Any]:
    where = place(kernel, cell, device, copies[0].down.dtype)
    # a decode tile must hold all tokens of its regime
    axes = {axis: values for axis, values in AXES.items() if axis != "BM" or cell.regime != "decode"}
    timed = timer(where, cell, copies, device)

    def seconds_of(config: Config) -> float | None:
        # compiling a tile that is too large takes longer than others, and it never starts
        needed = moe_configs.least_shared_bytes(kernel, where["regime"], config)
        return None if device.shared_bytes is not None and needed > device.shared_bytes else timed(config)

    default = moe_configs.table()["default"][kernel][where["regime"]]
    start = installed(where) or default
    with way_of(kernel, where):
        if kernel == "slices":  # first whether, then how
            whether = {"most_mb": axes.pop("most_mb")}
            best, before, after, tried = search(start, whether, seconds_of, lambda: now() < until)
            if moe_configs.in_slices(cell.tokens, cell.top_k, cell.shape.hidden, cell.shape.intermediate, best):
                best, _, after, more = search(best, axes, seconds_of, lambda: now() < until)
                tried += more - 1
        else:
            best, before, after, tried = search(start, axes, seconds_of, lambda: now() < until)
    install(where, None if after is None or best == default else best)
    return {**where, "tried": tried, "config": best, "before_s": before, "after_s": after, "reason": None}


def timer(
    where: dict[str, Any], cell: Cell, copies: Sequence[Weights], device: Device
) -> Callable[[Config], float | None]:
    """How long the cell's layer takes with a tile in the kernel's place."""
    generator = torch.Generator(device.kind).manual_seed(1)
    logits_TE = router_logits(cell, device.kind, generator)
    x_TD, dy_TD = (
        torch.randn(cell.tokens, cell.shape.hidden, device=device.kind, generator=generator).to(copies[0].down.dtype)
        for _ in range(2)
    )
    expected = Expected(cell, copies[0], x_TD, logits_TE, dy_TD)
    (ours,) = (peer for peer in PEERS if peer.name == OURS)

    def seconds_of(config: Config) -> float | None:
        install(where, config)
        entry = Entry(ours)
        try:
            prepare(entry, cell, copies, device, expected)
            run = entry.passes.get("graph", entry.passes.get("eager"))
            return None if run is None else statistics.median(device.elapsed(run) for _ in range(SAMPLES)) / len(copies)
        except DeviceLost:  # what was found before is in the table
            raise
        except Exception as error:  # does not compile, or does not fit: Triton has many words for it
            raise_if_lost(device, ours, error)
            return None

    return seconds_of


@contextmanager
def way_of(kernel: str, where: dict[str, Any]) -> Iterator[None]:
    """The kernels of one way to decode are not launched where the layer goes the other: shut it meanwhile. Which way is
    better turns out last, when `slices` is tuned."""
    if kernel not in ("decode_up", "decode_down"):
        yield
        return
    slices = where | {"kernel": "slices"}
    before = installed(slices)
    install(slices, moe_configs.table()["default"]["slices"][where["regime"]] | {"most_mb": 0})
    try:
        yield
    finally:
        install(slices, before)


def installed(where: dict[str, Any]) -> Config | None:
    """The measured tile, where there is one."""
    entries = moe_configs.table()["tuned"]
    return next((e["config"] for e in entries if all(e[name] == value for name, value in where.items())), None)


def install(where: dict[str, Any], config: Config | None) -> None:
    """Use a tile from now on in this process; None: the default one."""
    tuned = moe_configs.table()["tuned"]
    tuned[:] = [entry for entry in tuned if any(entry[name] != value for name, value in where.items())]
    if config is not None:
        tuned.append({**where, "config": config})
    moe_configs.config.cache_clear()


def write(path: Path) -> None:
    """The table in use, one tile a line. Raises OSError where it cannot be written."""
    table = moe_configs.table()
    kernels = [
        f"    {json.dumps(kernel)}: {{\n"
        + ",\n".join(f"      {json.dumps(name)}: {json.dumps(config)}" for name, config in regimes.items())
        + "\n    }"
        for kernel, regimes in table["default"].items()
    ]
    tuned = ",\n".join(f"    {json.dumps(entry)}" for entry in table["tuned"])
    text = (
        f'{{\n  "about": {json.dumps(table["about"])},\n  "default": {{\n'
        + ",\n".join(kernels)
        + '\n  },\n  "tuned": ['
        + (f"\n{tuned}\n  " if tuned else "")
        + "]\n}\n"
    )
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)
