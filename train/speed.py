"""How fast a training step is: against a plain Hugging Face Trainer, the machine's matrix products, and experts.

Each variant lives in a process of its own, so that the most memory it holds is its own too, and the variants take
turns: one step each in a round, in random order, while the others wait. A change of the machine's load so meets all of
them, and ratios are taken within a round.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nmm_serve.errors import TrainingError
from nmm_serve.train.speed_variants import VARIANTS, Variant, speed_config, work

Step = dict[str, Any]
"""What a variant tells of one step: see `Turns.end`."""

SETTLE_S = 0.05
"""Between two turns: a thread pool goes on spinning for a moment, and would disturb the next one's."""
RESAMPLES = 1000
LOSS_TOLERANCE = 1e-4

DEFINITIONS = {
    "step": "one optimiser step, data included: reading, forward, backward, clipping, update, zeroing",
    "dense": "nmm-train's step on the dense early model; it reads, encodes and packs its documents meanwhile",
    "moe": "the same step on the same batches with 8 experts, top-1: the dense model's active parameters",
    "hf_padded": "transformers.Trainer with its defaults, the same model class and documents; a collator pads the "
    "documents of a batch to its longest. They lie in memory, encoded",
    "hf_packed": "transformers.Trainer with its defaults on nmm-train's own packed batches, which lie in memory",
    "tokens_per_s": "tokens that are no padding / seconds of the step",
    "gemm_flops": "2 n^3 / seconds of a square matrix product, n = 1024, on a GPU 8192, in the type and threads of the "
    "step; mean of just before and just after each step",
    "gemm_share": "matrix-product FLOPs of the step's real tokens, by the closed form, / seconds / gemm_flops",
    "peak_bytes": "on a CPU the most resident memory that the variant's process ever held, libraries included "
    "(`libraries_bytes`: before model and data were made); on a GPU the most that torch had allocated during a step",
    "data_wait": "share of the step that waited for documents; null where they lie in memory",
    "x_hf_padded, x_hf_packed": "tokens_per_s of dense / that of the other, of the same round",
    "moe_x_dense": "seconds of moe / seconds of dense, of the same round and batch",
    "first_loss": "of the step before any update; equal for dense and both hf variants, or nothing is reported",
    "value": "median over rounds, with a 95% percentile bootstrap interval over rounds",
}

BARS = {
    "x_hf_padded": (1.5, "at least"),
    "gemm_share": (0.7, "at least"),
    "moe_x_dense": (1.25, "at most"),
}
"""What a step should reach on a CPU; the share of the matrix rate at about 100M parameters."""


class _Child:
    """A variant's process, from the parent's side."""

    def __init__(self, name: str, setup: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, name, setup), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise TrainingError(
                f"the process of {self.name} ended with exit code {self._process.exitcode}; out of memory? "
                "Take a smaller preset or fewer rows"
            ) from None
        if "error" in answer:
            raise TrainingError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, turn: str) -> dict[str, Any]:
        self._pipe.send(turn)
        return self.receive()

    def end(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()


def measure(
    preset: str,
    variants: Sequence[Variant] = VARIANTS,
    *,
    threads: int,
    rows: int,
    context_length: int,
    rounds: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Time `rounds` rounds after one that warms up, each variant once however often it is named. `progress` counts
    steps: rounds + 1 of each variant.

    Raises ConfigError for what cannot be built and TrainingError when a variant's process ends.
    """
    variants = tuple(dict.fromkeys(variants))
    for name in variants:  # a wrong preset should not start processes
        speed_config(preset, name, rows, context_length)
    setup = {
        "preset": preset, "rows": rows, "context_length": context_length, "threads": threads, "steps": rounds + 1,
    }  # fmt: skip
    random = np.random.default_rng(0)
    children: dict[str, _Child] = {}
    steps: dict[str, list[Step]] = {name: [] for name in variants}
    try:
        about: dict[str, dict[str, Any]] = {}
        for name in variants:
            children[name] = _Child(name, setup)
        for name in variants:  # nothing is timed before all are built
            about[name] = children[name].receive()
        for _ in range(rounds + 1):
            for index in random.permutation(len(variants)):
                name = variants[index]
                time.sleep(SETTLE_S)
                steps[name].append(children[name].ask("step"))
                progress(1)
        for name in variants:
            about[name] |= children[name].ask("end")
    finally:
        for child in children.values():
            child.end()
    check_losses({name: done[0]["loss"] for name, done in steps.items()})
    return {
        "definitions": DEFINITIONS, "preset": preset, "threads": threads, "rows": rows,
        "context_length": context_length, "rounds": rounds,
        "variants": [describe(name, about[name], steps[name]) for name in variants],
        "comparisons": comparisons({name: done[1:] for name, done in steps.items()}),
    }  # fmt: skip


def check_losses(first: dict[str, float]) -> None:
    """Raise TrainingError where two dense variants did not do the same work."""
    losses = {name: loss for name, loss in first.items() if name != "moe"}
    if losses and max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * max(losses.values()):
        raise TrainingError(f"the variants do not compute the same: losses of the first step {losses}")


def describe(name: str, about: dict[str, Any], steps: Sequence[Step]) -> dict[str, Any]:
    """A variant's row; the first step warmed up and is not timed."""
    timed = steps[1:]

    def of(value: Callable[[Step], float]) -> dict[str, Any]:
        return summary([value(step) for step in timed])

    return {
        "variant": name,
        **about,
        "first_loss": steps[0]["loss"],
        "seconds": of(lambda s: s["seconds"]),
        "tokens": [int(s["tokens"]) for s in timed],
        "padding": [int(s["padding"]) for s in timed],
        "tokens_per_s": of(lambda s: s["tokens"] / s["seconds"]),
        "gemm_flops": of(lambda s: s["gemm_flops"]),
        "gemm_share": of(share),
        "data_wait": None if timed[0]["data_wait"] is None else of(lambda s: s["data_wait"]),
    }


def share(step: Step) -> float:
    return step["flops"] / step["seconds"] / step["gemm_flops"]


def comparisons(steps: dict[str, list[Step]]) -> list[dict[str, Any]]:
    """The ratios that the measured variants allow, with the bar that each is held against (null: none)."""

    def speed(name: str) -> np.ndarray:
        return np.array([s["tokens"] / s["seconds"] for s in steps[name]])

    found: dict[str, np.ndarray] = {}
    if "dense" in steps:
        for name in ("hf_padded", "hf_packed"):
            if name in steps:
                found[f"x_{name}"] = speed("dense") / speed(name)
        found["gemm_share"] = np.array([share(s) for s in steps["dense"]])
        if "moe" in steps:
            found["moe_x_dense"] = speed("dense") / speed("moe")
    rows = []
    for name, values in found.items():
        row = {"name": name, **summary(values), "bar": None, "reached": None}
        if name in BARS:
            bar, sense = BARS[name]
            row["bar"] = f"{sense} {bar:g}"
            row["reached"] = row["value"] >= bar if sense == "at least" else row["value"] <= bar
        rows.append(row)
    return rows


def summary(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Median, and its interval; null with fewer than two rounds, whose spread nobody knows."""
    values = np.asarray(values)
    interval = None
    if len(values) > 1:
        drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
        interval = {"low": float(low), "high": float(high), "level": 0.95, "resamples": RESAMPLES, "unit": "round"}
    return {"value": float(np.median(values)), "interval": interval, "n": len(values)}
