"""Which tile each matrix product runs with: a table by kernel, sizes and regime, `moe_configs.json`.

A regime is how many rows an expert has to expect, in few steps, so that a change in the number of tokens seldom
means another kernel and never a new compilation for each number.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("moe_configs.json")
FEW_ROWS = 128
"""Up to so many rows an expert, a tile of 128 rows would be mostly empty."""

SPARE_BYTES = 2048
"""Shared memory beside the stages: barriers, and what reductions exchange."""

Config = dict[str, int]


@lru_cache
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def decode_regime(tokens: int, dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "16" if tokens <= 16 else "64"


def grouped_regime(slots: int, num_experts: int, dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "few" if slots <= FEW_ROWS * num_experts else "many"


@dataclass(frozen=True)
class Device:
    name: str
    processors: int
    shared_bytes: int
    """Of one program, at most."""
    tma: bool
    """Whether it reads tiles through tensor descriptors by itself. Where it does not, Triton makes pointers of them, of
    which it no longer knows that they are aligned: numbers would be read one by one, without a pipeline."""


@lru_cache(maxsize=4096)
def config(kernel: str, hidden: int, intermediate: int, regime: str, device: Device) -> Config:
    """The measured tile where there is one for just this device, sizes and regime; else the default of the regime.

    Where the device's shared memory does not hold the default's stages, with as many as it holds, and a program for
    each tile: one that loops keeps the tile that it stores beside the next one's stages.
    """
    wanted = {"device": device.name, "kernel": kernel, "hidden": hidden, "intermediate": intermediate, "regime": regime}
    for entry in table()["tuned"]:
        if all(entry[key] == value for key, value in wanted.items()):
            return entry["config"]
    chosen = table()["default"][kernel][regime]
    fitting = (device.shared_bytes - SPARE_BYTES) // stage_bytes(kernel, regime, chosen)
    if fitting >= chosen["num_stages"]:
        return chosen
    return chosen | {"num_stages": max(1, fitting)} | ({"per_sm": 0} if "per_sm" in chosen else {})


def stage_bytes(kernel: str, regime: str, config: Config) -> int:
    """What one step of a tile's depth reads into shared memory; in `slices`, of the loop that reads more."""
    weight_tiles = 2 if kernel in ("up", "decode_up", "slices") else 1
    numbers = (config["BM"] + weight_tiles * config["BN"]) * config["BK"]
    return max(numbers, config.get("BD", 0) * config["BN"]) * (4 if regime == "fp32" else 2)


def in_slices(tokens: int, top_k: int, hidden: int, intermediate: int, config: Config) -> bool:
    """Whether a few tokens are better served in two launches, whose parts of sums are written and read once more.

    `most_mb` of the tile of `slices` says how many MB of parts are worth two launches; 0: none. The default is an
    estimate (two launches of 1.5 us, an L2 of 5 TB/s), which tuning puts to the test.
    """
    slices = -(-intermediate // config["BN"])
    return 8 * tokens * top_k * slices * hidden <= 1e6 * config["most_mb"]


def least_shared_bytes(kernel: str, regime: str, config: Config) -> int:
    """Shared memory that the compiled tile takes at the least: all steps under way but one, which may lie in registers.
    Of the weights' gradients Triton keeps still fewer before Hopper, so that nothing is known."""
    if kernel.endswith("weight_grad"):
        return 0
    return (config["num_stages"] - 1) * stage_bytes(kernel, regime, config)


def every_config() -> Iterator[tuple[str, str, Config]]:
    """Each (kernel, regime, config) of the table once."""
    seen = set()
    entries = [(k, r, c) for k, regimes in table()["default"].items() for r, c in regimes.items()]
    entries += [(e["kernel"], e["regime"], e["config"]) for e in table()["tuned"]]
    for kernel, regime, values in entries:
        key = (kernel, regime == "fp32", *sorted(values.items()))
        if key not in seen:
            seen.add(key)
            yield kernel, regime, values
