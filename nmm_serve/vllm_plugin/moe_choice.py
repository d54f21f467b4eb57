"""Whose kernels compute the experts under vLLM: vLLM's own, or ours where a benchmark on the same GPU showed them
faster. Imports nothing heavy.

The environment variable NMM_SERVE_MOE decides: `auto` (the default) looks into the table, `vllm` and `nmm-serve`
insist. The table is made of the records of `nmm-serve kernels bench` by `nmm-serve kernels choose`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "NMM_SERVE_MOE"
SETTINGS = ("auto", "vllm", "nmm-serve")
TABLE = Path(__file__).with_name("moe_choice.json")
OURS, THEIRS = "nmm-serve", "vLLM fused_moe"
"""Names of the peers in the benchmark's records."""

Choice = Literal["vllm", "nmm-serve"]


@dataclass(frozen=True)
class ExpertsLayer:
    """What a measurement holds for. `gpu` is None where there is none."""

    gpu: str | None
    dtype: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


def choose(layer: ExpertsLayer, obstacle: str | None = None, table: Path = TABLE) -> Choice:
    """Who computes this layer.

    Args:
        obstacle: why our kernels cannot, if they cannot: parallelism or quantization.

    Raises ValueError for an unknown setting, and when ours are insisted on but cannot be had.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise ValueError(f"{VARIABLE} is {setting!r}; set it to one of {', '.join(SETTINGS)}")
    if setting == "nmm-serve" and obstacle is not None:
        raise ValueError(f"{VARIABLE}=nmm-serve cannot be had with {obstacle}; unset it or drop the option")
    if setting != "auto":
        return "vllm" if setting == "vllm" else "nmm-serve"
    if obstacle is not None:
        return "vllm"
    faster = any(row["faster"] for row in read_table(table) if row["layer"] == asdict(layer))
    return "nmm-serve" if faster else "vllm"


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Rows of `layer`, `cells`, `worst_ratio`, `faster`, `measured`. Empty where nothing was measured."""
    return json.loads(path.read_text())["rows"]


def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a benchmark says of each layer that it timed with both. Ours are `faster` if they were nowhere slower: one
    serving process decodes and prefills with the same layer, and vLLM picks it once.

    Only inference counts, and CUDA graphs where both had them, since vLLM runs so.
    """
    ratios: dict[ExpertsLayer, list[float]] = {}
    for cell in record["cells"]:
        results = {result["peer"]: result for result in cell["results"]}
        mine, theirs = results.get(OURS, {}), results.get(THEIRS, {})
        mode = "graph" if "graph" in mine and "graph" in theirs else "eager"
        if cell["regime"] == "train" or mode not in mine or mode not in theirs:
            continue
        numbers = {name: cell[name] for name in ("hidden", "intermediate", "experts", "top_k")}
        layer = ExpertsLayer(gpu=record["device"]["name"], dtype=record["dtype"], **numbers)
        ratios.setdefault(layer, []).append(theirs[mode]["median_s"] / mine[mode]["median_s"])
    return [
        {
            "layer": asdict(layer),
            "cells": len(found),
            "worst_ratio": min(found),
            "faster": min(found) > 1,
            "measured": record["created"],
        }
        for layer, found in ratios.items()
    ]


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newer row wins where two are of one layer."""
    latest: dict[ExpertsLayer, dict[str, Any]] = {}
    for row in sorted([*old, *new], key=lambda row: row["measured"]):
        latest[ExpertsLayer(**row["layer"])] = row
    return list(latest.values())
